"""LAMB (You et al. 2020): AdamW's step, scaled to the size of its parameter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_like.config import LambConfig
from t5x_like.sharding.rules import LogicalAxes
from t5x_like.training.optimizers.adamw import is_decayed
from t5x_like.training.optimizers.per_layer import rms
from t5x_like.utils.type_aliases import PyTree


def lamb(config: LambConfig, logical_axes: PyTree) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer for parameters with these logical axes; `update` takes the learning rate as a keyword.

    With d Adam's bias-corrected direction and u = d + weight_decay p: p -= lr (||p|| / ||u||) u, where the norms are
    those of the slice of one layer or expert, and the ratio is 1 if one of them is 0. The state is optax's
    `ScaleByAdamState`.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, *, learning_rate: jax.Array
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        directions, state = adam.update(grads, state, params)

        def one(path: Any, direction: jax.Array, param: jax.Array, axes: LogicalAxes) -> jax.Array:
            if config.weight_decay and is_decayed(path, axes):
                direction = direction + config.weight_decay * param
            size, step = rms(param, axes), rms(direction, axes)
            ratio = jnp.where((size == 0.0) | (step == 0.0), 1.0, size / jnp.where(step == 0.0, 1.0, step))
            return -learning_rate * ratio * direction

        return jax.tree_util.tree_map_with_path(one, directions, params, logical_axes), state

    return optax.GradientTransformationExtraArgs(adam.init, update)
