"""Schedule-free AdamW (Defazio et al. 2024): an average of the iterates in place of a decay of the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_like.config import ScheduleFreeConfig
from t5x_like.sharding.rules import LogicalAxes
from t5x_like.training.optimizers.adamw import is_decayed
from t5x_like.utils.type_aliases import PyTree


class AveragingOptimizer(NamedTuple):
    """`optax.GradientTransformationExtraArgs` whose gradients are taken at another point than the parameters.

    Attributes:
      gradient_point: Function (params, state) -> parameters at which the loss is differentiated.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]
    gradient_point: Callable[[PyTree, PyTree], PyTree]


def gradient_point(optimizer: Any, params: PyTree, state: PyTree) -> PyTree:
    """Return the parameters at which an optimizer takes the gradient: `params`, unless it says otherwise."""
    return optimizer.gradient_point(params, state) if hasattr(optimizer, "gradient_point") else params


def schedule_free(config: ScheduleFreeConfig, logical_axes: PyTree) -> AveragingOptimizer:
    """Return the optimizer for parameters with these logical axes; `update` takes the learning rate as a keyword.

    The parameters x are the average, so that checkpoints and evaluations contain what the method returns. The gradient
    is taken at y = (1 - b1) z + b1 x, where the state keeps z. With v Adam's second moment, bias-corrected, lr the
    learning rate and lr_max the largest one so far:
      z -= lr (g / (sqrt(v) + eps) + weight_decay y); c = lr_max**2 / (sum of lr_max**2 so far); x = (1 - c) x + c z.

    The state is {"z", "rms": the state of `optax.scale_by_rms`, "max_learning_rate", "weight_sum"}.
    """
    rms_prop = optax.scale_by_rms(config.b2, eps=config.eps, eps_in_sqrt=False, bias_correction=True)

    def init(params: PyTree) -> PyTree:
        return {
            "z": jax.tree.map(jnp.copy, params),
            "rms": rms_prop.init(params),
            "max_learning_rate": jnp.zeros(()),
            "weight_sum": jnp.zeros(()),
        }

    def point(params: PyTree, state: PyTree) -> PyTree:
        return jax.tree.map(lambda x, z: (1.0 - config.b1) * z + config.b1 * x, params, state["z"])

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, *, learning_rate: jax.Array
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        directions, rms = rms_prop.update(grads, state["rms"], params)
        largest = jnp.maximum(state["max_learning_rate"], learning_rate)
        total = state["weight_sum"] + largest**2
        share = jnp.where(total > 0, largest**2 / jnp.where(total > 0, total, 1.0), 0.0)

        def moved(path: Any, z: jax.Array, direction: jax.Array, y: jax.Array, axes: LogicalAxes) -> jax.Array:
            if config.weight_decay and is_decayed(path, axes):
                direction = direction + config.weight_decay * y
            return z - learning_rate * direction

        z = jax.tree_util.tree_map_with_path(moved, state["z"], directions, point(params, state), logical_axes)
        updates = jax.tree.map(lambda new, x: share * (new - x), z, params)
        return updates, {"z": z, "rms": rms, "max_learning_rate": largest, "weight_sum": total}

    return AveragingOptimizer(init, update, point)
