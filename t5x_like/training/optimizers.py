"""Optimizers by configuration, and the logical axes of their state."""

from __future__ import annotations

from typing import Any

import jax
import optax

from t5x_like.config import Adafactor, TrainingConfig
from t5x_like.partitioning.rules import LogicalAxes
from t5x_like.training.adafactor import adafactor, moment_axes
from t5x_like.training.adamw import adamw
from t5x_like.training.freezing import paths_of, staged, starts

Tree = Any


def make_optimizer(config: TrainingConfig, logical_axes: Tree) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run, for parameters with these logical axes.

    `update(grads, opt_state, params, learning_rate=...)` takes the learning rate of the step, so that one schedule
    serves the update and the metric. Its own count is that of the updates it has made. Where parameters are frozen, it
    also takes the `step`, and has a state for those only that train.

    Raises:
      ConfigError: what is to be frozen is not there, or is all there is.
    """
    if config.freeze:
        of = starts(config.freeze, paths_of(logical_axes))
        return staged(lambda axes: _optimizer(config, axes), logical_axes, of)
    return _optimizer(config, logical_axes)


def _optimizer(config: TrainingConfig, logical_axes: Tree) -> optax.GradientTransformationExtraArgs:
    if isinstance(config.optimizer, Adafactor):
        return adafactor(config.optimizer, logical_axes)
    return adamw(config.optimizer, logical_axes)


def state_logical_axes(opt_state: Tree, params: Tree, logical_axes: Tree) -> Tree:
    """The logical axes of an optimizer's state: those of the parameter that each array belongs to.

    An array belongs to the parameter whose path is in its own. Adafactor's factored moments lack the axes they are
    means over; scalars have none.

    Args:
      opt_state: The state or its shapes.
      params: The parameters or their shapes.
      logical_axes: A tuple of names in the place of each parameter.

    Returns:
      A tree like `opt_state` with a tuple of names in the place of each array.

    Raises:
      ValueError: an array that is neither a scalar nor any parameter's.
    """
    by_path: dict[str, LogicalAxes] = {}
    jax.tree_util.tree_map_with_path(lambda path, _, axes: by_path.update({_name(path): axes}), params, logical_axes)

    def axes_of(path: Any, array: Any) -> LogicalAxes:
        name = _name(path)
        owners = [owner for owner in by_path if owner in name]
        if not owners:
            if array.shape == ():
                return ()
            raise ValueError(f"optimizer state {name} of shape {array.shape} belongs to no parameter")
        owner = max(owners, key=len)
        axes = by_path[owner]
        kind = name.rpartition(owner)[2].strip("/")
        axes = moment_axes(kind, axes) if kind else axes
        if len(axes) != len(array.shape):
            raise ValueError(f"optimizer state {name} has the shape {array.shape}, expected the axes {axes}")
        return axes

    return jax.tree_util.tree_map_with_path(axes_of, opt_state)


def _name(path: Any) -> str:
    return f"/{jax.tree_util.keystr(path, simple=True, separator='/')}/"
