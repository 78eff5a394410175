"""AdamW (Loshchilov and Hutter 2019), with nanoT5's scaling of updates by the size of the parameter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_like.config import AdamWConfig
from t5x_like.sharding.rules import LogicalAxes
from t5x_like.training.optimizers.per_layer import rms
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

MINIMAL_SCALE = 1e-3
"""Lower bound on the factor of `rms_scaled`, equal to Adafactor's epsilon2, so that parameters of 0 can grow."""


def is_decayed(path: Any, axes: LogicalAxes) -> bool:
    """Return whether weight decay applies: to kernels, adapters and embedding tables only."""
    name = tree_paths.path_string(path[-1:])
    return name in ("kernel", "embedding", "lora_a", "lora_b") and "relative_buckets" not in axes


def adamw(config: AdamWConfig, logical_axes: PyTree) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer for parameters with these logical axes; `update` takes the learning rate as a keyword.

    p -= lr (scale d + weight_decay p), with d Adam's bias-corrected direction, and scale 1 or, if `rms_scaled`,
    max(rms(p), 1e-3) of the layer's slice. The state is optax's `ScaleByAdamState`: count, mu, nu.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, *, learning_rate: jax.Array
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        directions, state = adam.update(grads, state, params)

        def one(path: Any, direction: jax.Array, param: jax.Array, axes: LogicalAxes) -> jax.Array:
            if config.rms_scaled:
                direction = direction * jnp.maximum(rms(param, axes), MINIMAL_SCALE)
            if config.weight_decay and is_decayed(path, axes):
                direction = direction + config.weight_decay * param
            return -learning_rate * direction

        return jax.tree_util.tree_map_with_path(one, directions, params, logical_axes), state

    return optax.GradientTransformationExtraArgs(adam.init, update)
