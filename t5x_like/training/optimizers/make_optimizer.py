"""The optimizer of a run, and the logical axes of its state."""

from __future__ import annotations

import itertools
import math
from typing import Any, assert_never

import jax
import optax

from t5x_like.config import OptimizerConfig, ScheduleFreeConfig, TrainingConfig
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.sharding.rules import LogicalAxes
from t5x_like.training.optimizers.adafactor import moment_axes
from t5x_like.training.optimizers.layer_decay import with_layer_decay
from t5x_like.training.optimizers.parameter_groups import group_of_each, has_groups, per_group_optimizer
from t5x_like.training.optimizers.rounded_state import with_rounded_state
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

MAX_UNSHARDED_ELEMENTS = 2**20
"""Largest array of optimizer state that belongs to no parameter and may be kept whole on every device."""


def make_optimizer(config: TrainingConfig, logical_axes: PyTree) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a run, for parameters with these logical axes.

    `update(grads, opt_state, params, learning_rate=...)` takes the learning rate of the step, so that one schedule
    serves the update and the metric. The optimizer's own count is the number of updates that it has made. If
    `takes_step` says so, `update` also takes the `step`. If parameters are frozen or have learning rates of their own,
    the state holds only the parameters that train. `schedule_free.gradient_point` says at which parameters the
    gradient is taken.

    Raises:
      ConfigError: the optimizer cannot be made from its configuration, or `training.freeze` matches no parameter or all
        of them, or a learning-rate group matches none, or layers cannot have learning rates of their own.
    """
    if config.layer_decay != 1.0 and isinstance(config.optimizer, ScheduleFreeConfig):
        expected = "1.0: schedule-free AdamW averages iterates, which are not proportional to the learning rate"
        raise ConfigError([ConfigProblem("training.layer_decay", str(config.layer_decay), expected)])
    if config.optimizer_state_type != "float32" and isinstance(config.optimizer, ScheduleFreeConfig):
        expected = "float32: the state of schedule-free AdamW has parameters, at which gradients are taken"
        raise ConfigError([ConfigProblem("training.optimizer_state_type", config.optimizer_state_type, expected)])
    if config.parameter_type != "float32" and isinstance(config.optimizer, ScheduleFreeConfig):
        expected = "float32: schedule-free AdamW returns an average, whose changes are much smaller than the rounding"
        raise ConfigError([ConfigProblem("training.parameter_type", config.parameter_type, expected)])
    if has_groups(config, tree_paths.paths(logical_axes)):
        of = group_of_each(config, tree_paths.paths(logical_axes))
        optimizer = per_group_optimizer(lambda axes: _build(config.optimizer, axes), logical_axes, of)
    else:
        optimizer = _build(config.optimizer, logical_axes)
    if config.layer_decay != 1.0:
        optimizer = with_layer_decay(optimizer, logical_axes, config.layer_decay)
    match config.optimizer_state_type:
        case "float32":
            return optimizer
        case "bfloat16":
            return with_rounded_state(optimizer, takes_step=has_groups(config, tree_paths.paths(logical_axes)))
        case unknown:
            assert_never(unknown)


def takes_step(config: TrainingConfig, logical_axes: PyTree) -> bool:
    """Return whether the `update` of a run's optimizer takes the step: its parameters have groups, or its state is
    rounded."""
    return config.optimizer_state_type != "float32" or has_groups(config, tree_paths.paths(logical_axes))


def _build(config: OptimizerConfig, logical_axes: PyTree) -> optax.GradientTransformationExtraArgs:
    optimizer = config.build(logical_axes)
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        found = f"{type(config).__name__}.build, which returns a {type(optimizer).__name__}"
        expected = "an optax.GradientTransformationExtraArgs whose update takes learning_rate"
        raise ConfigError([ConfigProblem("training.optimizer", found, expected)])
    return optimizer


def state_logical_axes(opt_state: PyTree, params: PyTree, logical_axes: PyTree) -> PyTree:
    """Return the logical axes of an optimizer's state, so that it is sharded like the parameters.

    An array belongs to the parameter whose path is part of its own path:
      - Of the parameter's shape, it has the parameter's axes.
      - Below the parameter under the name `v_row` or `v_col`, it lacks the axes that it is a mean over
        (`adafactor.moment_axes`).
      - Of a shape that remains when dimensions are removed from the parameter's, it has the axes that remain.
    An array that belongs to no parameter, or fits its parameter in none of these ways, is kept whole on every device,
    which is refused above `MAX_UNSHARDED_ELEMENTS`.

    Args:
      opt_state: The state or its shapes.
      params: The parameters or their shapes.
      logical_axes: A tuple of names in place of each parameter.

    Returns:
      A tree like `opt_state` with a tuple of names in place of each array; None is an axis that is not sharded.

    Raises:
      ConfigError: a large array that belongs to no parameter.
    """
    by_path: dict[str, tuple[LogicalAxes, tuple[int, ...]]] = {}
    jax.tree_util.tree_map_with_path(
        lambda path, param, axes: by_path.update({_name(path): (axes, tuple(param.shape))}), params, logical_axes
    )

    def axes_of(path: Any, array: Any) -> LogicalAxes:
        name, shape = _name(path), tuple(array.shape)
        # The longest match: a parameter's path can be part of another one's.
        owner = max((owner for owner in by_path if owner in name), key=len, default=None)
        if owner is not None:
            axes, full = by_path[owner]
            kind = name.rpartition(owner)[2].strip("/")
            if kind in ("v_row", "v_col") and len(moment_axes(kind, axes)) == len(shape):
                return moment_axes(kind, axes)
            remaining = _remaining_axes(axes, full, shape)
            if remaining is not None:
                return remaining
        if math.prod(shape) > MAX_UNSHARDED_ELEMENTS:
            belongs = "belongs to no parameter" if owner is None else f"does not fit the parameter {owner.strip('/')}"
            found = f"state {name.strip('/')} of shape {shape}, which {belongs}"
            expected = f"state of the shape of its parameter, or at most {MAX_UNSHARDED_ELEMENTS:,} elements"
            raise ConfigError([ConfigProblem("training.optimizer", found, expected)])
        return (None,) * len(shape)

    return jax.tree_util.tree_map_with_path(axes_of, opt_state)


def _remaining_axes(axes: LogicalAxes, full: tuple[int, ...], shape: tuple[int, ...]) -> LogicalAxes | None:
    """Return the axes of the dimensions of `full` that make up `shape`, in order; None if it is no part of `full`."""
    for dims in itertools.combinations(range(len(full)), len(shape)):
        if tuple(full[dim] for dim in dims) == shape:
            return tuple(axes[dim] for dim in dims)
    return None


def _name(path: Any) -> str:
    return f"/{tree_paths.path_string(path)}/"
