"""Guard of the training state, on the device: which steps are rejected.

Everything here is computed from values that are the same on all devices, so all processes reject the same steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from t5x_like.config import GuardConfig
from t5x_like.utils.type_aliases import PyTree

_DEVIATIONS = 1.4826
"""Standard deviation of a normal distribution, in units of its median absolute deviation."""
_MIN_RELATIVE_DEVIATION = 1e-3
"""Smallest standard deviation, relative to the median: in a constant series no rounding error is a spike."""


def init_guard(config: GuardConfig) -> dict[str, jax.Array]:
    """Return the values of no steps: "loss" and "update_norm", float32 [spike_window], and "count", int32 []."""
    return {
        "loss": jnp.zeros(config.spike_window, jnp.float32),
        "update_norm": jnp.zeros(config.spike_window, jnp.float32),
        "count": jnp.zeros((), jnp.int32),
    }


def is_spike(window: PyTree, config: GuardConfig, values: dict[str, jax.Array]) -> jax.Array:
    """Return whether one of the values, scalars by name, lies far above the window of its name; bool []."""
    spikes = [_exceeds(window[name], value, config.spike_threshold or jnp.inf) for name, value in values.items()]
    return (window["count"] >= config.spike_window) & jnp.stack(spikes).any()


def _exceeds(window: jax.Array, value: jax.Array, threshold: float | jax.Array) -> jax.Array:
    median = jnp.median(window)
    deviation = _DEVIATIONS * jnp.median(jnp.abs(window - median))
    return value - median > threshold * jnp.maximum(deviation, _MIN_RELATIVE_DEVIATION * jnp.abs(median))


def with_values(window: PyTree, values: dict[str, jax.Array]) -> PyTree:
    """Return the window with the values of one more step, in place of its oldest ones."""
    place = window["count"] % window["loss"].shape[0]
    updated = {name: window[name].at[place].set(value.astype(jnp.float32)) for name, value in values.items()}
    return {**updated, "count": window["count"] + 1}


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
    """Return whether all numbers of a tree are finite; bool []."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
