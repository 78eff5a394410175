"""The training state: a plain tree of arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

Tree = Any

_DROPOUT = 0xD509
"""Folded into the seed's key; the number is part of what a seed means."""


def init_state(params: Tree, optimizer: optax.GradientTransformation, seed: int) -> dict[str, Tree]:
    """The state before the first step.

    Returns:
      {"params", "opt_state", "step": int32 [], the steps done, "rng": uint32 [2], the data of the key that all dropout
      masks come from}. The key never changes: a step's own key is folded from it and the step.
    """
    # A stream of its own: fold_in(key, n) of the seed's own key is also the key of the n-th parameter's initial values.
    rng = jax.random.fold_in(jax.random.key(seed), _DROPOUT)
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
        "rng": jax.random.key_data(rng),
    }
