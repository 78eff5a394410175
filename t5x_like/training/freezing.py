"""Parameters that do not train, or not yet: chosen by path, without a gradient, an optimizer's state or a part in the
norm that clipping looks at."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_like.config import ConfigError, Freeze, Problem

Tree = Any
Starts = Mapping[str, int | None]
"""The step from which each parameter trains, by path: 0 for always, None for never."""


def starts(freeze: Sequence[Freeze], paths: Iterable[str]) -> dict[str, int | None]:
    """When each parameter begins to train. Of several entries that name it, the first counts.

    Raises:
      ConfigError: a pattern that matches no parameter, or nothing is left to train.
    """
    paths = list(paths)
    found: dict[str, int | None] = {}
    problems = []
    for place, entry in enumerate(freeze):
        for number, pattern in enumerate(entry.paths):
            matched = [path for path in paths if re.fullmatch(pattern, path)]
            if not matched:
                where = f"training.freeze.{place}.paths.{number}"
                expected = f"a regular expression for whole paths of parameters, such as {paths[0]}"
                problems.append(Problem(where, f"{pattern!r}, which no parameter matches", expected))
            for path in matched:
                found.setdefault(path, entry.until_step)
    if not problems and freeze and all(found.get(path, 0) is None for path in paths):
        problems.append(Problem("training.freeze", "all parameters", "some that train"))
    if problems:
        raise ConfigError(problems)
    return {path: found.get(path, 0) for path in paths}


def paths_of(tree: Tree, prefix: str = "") -> list[str]:
    """Paths of the leaves of nested dicts; what is no dict is a leaf."""
    if not isinstance(tree, dict):
        return [prefix]
    return [path for key, child in tree.items() for path in paths_of(child, f"{prefix}/{key}" if prefix else str(key))]


def chosen(tree: Tree, choose: Callable[[str], bool], prefix: str = "") -> Tree:
    """The part of nested dicts whose leaves are chosen by path."""
    found = {}
    for key, child in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(child, dict):
            if inner := chosen(child, choose, path):
                found[key] = inner
        elif choose(path):
            found[key] = child
    return found


def joined(first: Tree, second: Tree) -> Tree:
    """Two parts of nested dicts that share no leaf, as one."""
    return first | {
        key: joined(first[key], child) if isinstance(first.get(key), dict) else child for key, child in second.items()
    }


def split(params: Tree, of: Starts) -> tuple[Tree, Tree]:
    """(parameters that train at some time, those that never do)."""
    return (
        chosen(params, lambda path: of[path] is not None),
        chosen(params, lambda path: of[path] is None),
    )


def not_yet(grads: Tree, of: Starts, step: jax.Array) -> Tree:
    """The gradients, 0 for parameters that do not train yet at `step`."""

    def masked(path: Any, grad: jax.Array) -> jax.Array:
        start = of[jax.tree_util.keystr(path, simple=True, separator="/")]
        return jnp.where(step >= start, grad, 0) if start else grad

    return jax.tree_util.tree_map_with_path(masked, grads)


def staged(
    make: Callable[[Tree], optax.GradientTransformationExtraArgs], logical_axes: Tree, of: Starts
) -> optax.GradientTransformationExtraArgs:
    """One optimizer for all parameters that begin to train at the same step, which it takes for its first.

    So a parameter that waits is trained from its start on as in a run that begins there: moments and their bias
    corrections count its own steps. `update` takes the run's step as a further keyword. The state is
    {"from_step_N": the state of that optimizer}.

    Args:
      make: Logical axes of parameters to an optimizer for them.
    """
    optimizers = {
        start: make(chosen(logical_axes, lambda path, start=start: of[path] == start))  # type: ignore[misc]
        for start in sorted({start for start in of.values() if start is not None})
    }

    def part(tree: Tree, start: int) -> Tree:
        return chosen(tree, lambda path: of[path] == start)

    def init(params: Tree) -> Tree:
        return {f"from_step_{start}": optimizer.init(part(params, start)) for start, optimizer in optimizers.items()}

    def update(
        grads: Tree, state: Tree, params: Tree | None = None, *, learning_rate: jax.Array, step: jax.Array
    ) -> tuple[Tree, Tree]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        updates: Tree = {}
        new_state = {}
        for start, optimizer in optimizers.items():
            name = f"from_step_{start}"
            own, new = optimizer.update(
                part(grads, start), state[name], part(params, start), learning_rate=learning_rate
            )
            if start:
                trains = step >= start
                own = jax.tree.map(lambda x, trains=trains: jnp.where(trains, x, 0), own)
                new = jax.tree.map(lambda x, old, trains=trains: jnp.where(trains, x, old), new, state[name])
            updates = joined(updates, own)
            new_state[name] = new
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init, update)
