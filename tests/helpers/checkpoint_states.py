"""States as runs save them, and their comparison."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def make_state(seed: int = 0) -> dict[str, Any]:
    """Return a state with what real ones have: named tuples, empty nodes, several types, scalars."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "decoder": {"layers": {"mlp": {"wi": {"kernel": jax.random.normal(keys[0], (2, 16, 32))}}}},
        "head": {"kernel": jax.random.normal(keys[1], (16, 8)), "bias": jnp.zeros(8, jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = jax.tree.map(lambda leaf: leaf + 1, optimizer.init(params))
    return {
        "params": params,
        "opt_state": opt_state,
        "step": jnp.int32(seed),
        "rng": jax.random.key_data(keys[2]),
    }


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def assert_same_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
