"""Groups of parameters that start to train at different steps or have different learning rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_like.config import TrainingConfig
from t5x_like.training.freezing import chosen, first_matches, is_router_bias, joined, unfreeze_steps
from t5x_like.training.optimizers.schedule_free import AveragingOptimizer, gradient_point
from t5x_like.utils.type_aliases import PyTree


class Group(NamedTuple):
    """Properties that the parameters of a group share.

    Attributes:
      start: Step from which they train; None: never.
      factor: Factor on the learning rate.
    """

    start: int | None
    factor: float

    @property
    def name(self) -> str:
        """Name of the group's state in checkpoints."""
        return f"from_step_{self.start}" + ("" if self.factor == 1.0 else f"_rate_{self.factor}")


def has_groups(config: TrainingConfig, paths: Iterable[str]) -> bool:
    """Return whether a run has an optimizer for each group of parameters: some are frozen, have a learning rate of
    their own, or have no gradient."""
    return bool(config.freeze or config.learning_rate_groups) or any(map(is_router_bias, paths))


def group_of_each(config: TrainingConfig, paths: Sequence[str]) -> dict[str, Group]:
    """Return the group of each parameter.

    Raises:
      ConfigError: a pattern matches no parameter, or no parameter is left to train.
    """
    starts = unfreeze_steps(config.freeze, paths)
    entries = first_matches("training.learning_rate_groups", config.learning_rate_groups, paths)
    return {path: Group(starts[path], entries[path].factor if path in entries else 1.0) for path in paths}


def per_group_optimizer(
    make: Callable[[PyTree], Any], logical_axes: PyTree, of: Mapping[str, Group]
) -> AveragingOptimizer:
    """Return an optimizer with one inner optimizer for each group of parameters.

    An inner optimizer counts its steps from the group's start, so that a parameter is trained as in a run that begins
    at that step: moments and their bias corrections count its own steps. `update` takes the run's step as a further
    keyword. The state is {name of the group: the state of its optimizer}.

    Args:
      make: Function from the logical axes of parameters to an optimizer for them.
      logical_axes: Logical axes of all parameters that train.
      of: Group of each parameter.
    """
    groups = sorted({group for group in of.values() if group.start is not None})

    def part(tree: PyTree, group: Group) -> PyTree:
        return chosen(tree, lambda path: of[path] == group)

    optimizers = {group: make(part(logical_axes, group)) for group in groups}

    def init(params: PyTree) -> PyTree:
        return {group.name: optimizer.init(part(params, group)) for group, optimizer in optimizers.items()}

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, *, learning_rate: jax.Array, step: jax.Array
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        updates: PyTree = {}
        new_state = {}
        for group, optimizer in optimizers.items():
            old = state[group.name]
            own, new = optimizer.update(
                part(grads, group), old, part(params, group), learning_rate=learning_rate * group.factor
            )
            if group.start:
                # The inner optimizer runs at every step, so that the program has no branch. Before its first
                # step the results are dropped and its state, the step count included, is kept as it was.
                trains = step >= group.start
                own = jax.tree.map(lambda x, trains=trains: jnp.where(trains, x, 0), own)
                new = jax.tree.map(lambda x, old, trains=trains: jnp.where(trains, x, old), new, old)
            updates = joined(updates, own)
            new_state[group.name] = new
        return updates, new_state

    def point(params: PyTree, state: PyTree) -> PyTree:
        points: PyTree = {}
        for group, optimizer in optimizers.items():
            points = joined(points, gradient_point(optimizer, part(params, group), state[group.name]))
        return points

    return AveragingOptimizer(init, update, point)
