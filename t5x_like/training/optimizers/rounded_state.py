"""Optimizer state in bfloat16, rounded stochastically: half the memory of float32, without a bias."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_like.training.stochastic_rounding import rounded_like, widened
from t5x_like.utils.type_aliases import PyTree

_SEED = 0xB16
"""Seed of the rounding. Another number would change the states of a run."""


def with_rounded_state(optimizer: Any, *, takes_step: bool) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer that keeps the matrices of its state in bfloat16 and computes in float32.

    `update` takes the step as a keyword, from which the random numbers of the rounding follow, so that a resumed run
    rounds alike.

    Args:
      optimizer: Optimizer whose `update` takes the learning rate as a keyword.
      takes_step: Whether its `update` takes the step as well.
    """

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if is_rounded(x) else x, optimizer.init(params))

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, *, step: jax.Array, **arguments: Any
    ) -> tuple[PyTree, PyTree]:
        if takes_step:
            arguments["step"] = step
        updates, new = optimizer.update(grads, widened(state), params, **arguments)
        return updates, rounded_like(new, state, jax.random.fold_in(jax.random.key(_SEED), step))

    return optax.GradientTransformationExtraArgs(init, update)


def is_rounded(x: jax.Array) -> bool:
    """Return whether an array of the state is kept in bfloat16: counts and vectors are not, which take no memory."""
    return x.ndim >= 2 and x.dtype == jnp.float32
