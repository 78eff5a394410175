"""Weighted sums over the depth of a stack (Pagliardini et al. 2024, DenseFormer).

After a branch the states become a sum of the embeddings and of the states after all branches so far, each with a weight
of its own. In the beginning the last weight is 1 and the others are 0: the sum is then what is added up without it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class DepthStates(NamedTuple):
    """States after the branches so far.

    Attributes:
      states: [B, L, d] each: the embeddings, then the sum of each branch and of the states that it read.
      weights: float32, weights of all branches, one branch after the other.
    """

    states: tuple[Array, ...]
    weights: Array

    def add(self, x_BxLxd: Array) -> tuple[Array, DepthStates]:
        """Return the weighted sum with the states after a further branch, and all states with them."""
        states = (*self.states, x_BxLxd)
        start = _start(len(self.states) - 1)
        weights = self.weights[start : start + len(states)].astype(x_BxLxd.dtype)
        weighted = [weight * state for weight, state in zip(weights, states, strict=True)]
        return functools.reduce(jnp.add, weighted), DepthStates(states, self.weights)


def _start(branch: int) -> int:
    """Return the index of the first weight of a branch; branch n has n + 2 weights."""
    return branch * (branch + 3) // 2


def initial_weights(branches: int) -> Array:
    """Return the initial weights of all branches."""
    weights = jnp.zeros(_start(branches))
    return weights.at[jnp.array([_start(branch + 1) - 1 for branch in range(branches)])].set(1.0)
