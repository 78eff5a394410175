"""AdamW (Loshchilov and Hutter 2019), with nanoT5's scaling of updates by the size of the parameter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_like.config import AdamW
from t5x_like.partitioning.rules import LogicalAxes
from t5x_like.training.slices import rms

Tree = Any

MINIMAL_SCALE = 1e-3
"""Smallest factor of `rms_scaled`: the same floor as Adafactor's epsilon2, so that zeros can grow."""


def is_decayed(path: Any, axes: LogicalAxes) -> bool:
    """Whether weight decay applies: kernels, adapters and tables, but not norms, biases, relative-position tables."""
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return name in ("kernel", "embedding", "lora_a", "lora_b") and "relative_buckets" not in axes


def adamw(config: AdamW, logical_axes: Tree) -> optax.GradientTransformationExtraArgs:
    """The optimizer for parameters with these logical axes; `update` takes the learning rate as a keyword.

    p -= lr (scale d + weight_decay p), with d Adam's bias-corrected direction, and scale 1 or, if `rms_scaled`,
    max(rms(p), 1e-3) of the layer's slice. The state is optax's `ScaleByAdamState`: count, mu, nu.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def update(grads: Tree, state: Tree, params: Tree | None = None, *, learning_rate: jax.Array) -> tuple[Tree, Tree]:
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
