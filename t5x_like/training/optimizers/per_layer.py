"""Statistics of parameters that are stacked over layers or experts: each slice counts as a parameter."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from t5x_like.sharding.rules import LogicalAxes

STACKED = frozenset({"layers", "experts"})


def averaged_dims(axes: LogicalAxes) -> tuple[int, ...]:
    """Return the dimensions within the slice of one layer or expert."""
    return tuple(dim for dim, name in enumerate(axes) if name not in STACKED)


def rms(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Return the root mean square of each slice, with the rank of `x`, so that it broadcasts against `x`."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=averaged_dims(axes), keepdims=True))
