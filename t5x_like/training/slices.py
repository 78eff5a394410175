"""Statistics of parameters that are stacked over layers or experts: each slice counts as a parameter of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from t5x_like.partitioning.rules import LogicalAxes

STACKED = frozenset({"layers", "experts"})


def averaged_dims(axes: LogicalAxes) -> tuple[int, ...]:
    """The dimensions within one layer's slice."""
    return tuple(dim for dim, name in enumerate(axes) if name not in STACKED)


def rms(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Root mean square of each layer's slice, with `x`'s rank so that it broadcasts against it."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=averaged_dims(axes), keepdims=True))
