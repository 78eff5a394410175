"""Freezing of parameters by path, permanently or until a step.

A frozen parameter has no gradient and no optimizer state, and is excluded from the norm that clipping uses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from t5x_like.config import FreezeConfig, LearningRateGroup
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

Entry = TypeVar("Entry", FreezeConfig, LearningRateGroup)
UnfreezeSteps = Mapping[str, int | None]
"""Step from which each parameter trains, by path: 0: from the start; None: never."""


def unfreeze_steps(freeze: Sequence[FreezeConfig], paths: Iterable[str]) -> dict[str, int | None]:
    """Return the step at which each parameter begins to train by gradients. Of several entries the first one applies.

    Biases of routers never do: `router_bias` moves them.

    Raises:
      ConfigError: a pattern matches no parameter, or no parameter is left to train.
    """
    starts = start_steps(freeze, list(paths))
    found = {path: None if is_router_bias(path) else start for path, start in starts.items()}
    if freeze and all(start is None for start in found.values()):
        raise ConfigError([ConfigProblem("training.freeze", "all parameters", "some that train")])
    return found


def start_steps(freeze: Sequence[FreezeConfig], paths: Sequence[str]) -> dict[str, int | None]:
    """Return the step at which each parameter begins to change, by whatever means; see `unfreeze_steps`."""
    entry_of = first_matches("training.freeze", freeze, paths)
    return {path: entry_of[path].until_step if path in entry_of else 0 for path in paths}


def is_router_bias(path: str) -> bool:
    """Return whether a parameter is the bias of a router, which has no gradient."""
    return path.rpartition("/")[2] == "router_bias"


def first_matches(where: str, entries: Sequence[Entry], paths: Sequence[str]) -> dict[str, Entry]:
    """Return the first entry whose `paths` match each parameter; parameters that none matches are left out.

    Raises:
      ConfigError: a pattern matches no parameter. `where` is the field of the entries.
    """
    found: dict[str, Entry] = {}
    problems = []
    for index, entry in enumerate(entries):
        for number, pattern in enumerate(entry.paths):
            matched = [path for path in paths if re.fullmatch(pattern, path)]
            if not matched:
                expected = f"a regular expression for whole paths of parameters, such as {paths[0]}"
                problem = f"{pattern!r}, which matches no parameter"
                problems.append(ConfigProblem(f"{where}.{index}.paths.{number}", problem, expected))
            for path in matched:
                # `setdefault`: an entry never overrules one that is listed before it.
                found.setdefault(path, entry)
    if problems:
        raise ConfigError(problems)
    return found


def chosen(tree: PyTree, choose: Callable[[str], bool], prefix: str = "") -> PyTree:
    """Return the part of nested dicts whose leaves are chosen by path."""
    found = {}
    for key, child in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(child, dict):
            if inner := chosen(child, choose, path):
                found[key] = inner
        elif choose(path):
            found[key] = child
    return found


def joined(first: PyTree, second: PyTree) -> PyTree:
    """Return the union of two nested dicts that share no leaf."""
    return first | {
        key: joined(first[key], child) if isinstance(first.get(key), dict) else child for key, child in second.items()
    }


def split(params: PyTree, of: UnfreezeSteps) -> tuple[PyTree, PyTree]:
    """Return (parameters that train at some step, parameters that never train)."""
    return (
        chosen(params, lambda path: of[path] is not None),
        chosen(params, lambda path: of[path] is None),
    )


def mask_frozen_grads(grads: PyTree, of: UnfreezeSteps, step: jax.Array) -> PyTree:
    """Return the gradients, with 0 for parameters that do not train yet at `step`."""

    def masked(path: str, grad: jax.Array) -> jax.Array:
        start = of[path]
        return jnp.where(step >= start, grad, 0) if start else grad

    return tree_paths.map_by_path(masked, grads)
