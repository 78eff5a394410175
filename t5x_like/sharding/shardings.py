"""Trees of shardings for trees of logical axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from t5x_like.errors import ConfigError
from t5x_like.sharding.rules import MAY_STAY_WHOLE, LogicalAxes, Rules, problems, spec
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree


@dataclasses.dataclass(frozen=True)
class LogicalArray:
    """An array of a tree, with its path and its logical axes."""

    path: str
    axes: LogicalAxes
    array: Any


def logical_leaves(logical_axes: PyTree, abstract: PyTree) -> list[LogicalArray]:
    """Return the arrays of `abstract` in order; `logical_axes` has a tuple of names in place of each array."""

    def leaf(path: str, array: Any, axes: LogicalAxes) -> LogicalArray:
        return LogicalArray(path, axes, array)

    # `LogicalArray` is no pytree, so that each one is a leaf.
    return jax.tree.leaves(tree_paths.map_by_path(leaf, abstract, logical_axes))


def tree_shardings(
    mesh: Mesh, rules: Rules, logical_axes: PyTree, abstract: PyTree, *, may_stay_whole: Set[str] = MAY_STAY_WHOLE
) -> PyTree:
    """Return the shardings of parameters, optimizer state, or a whole training state.

    Args:
      mesh: The mesh.
      rules: The rules; the parameter table is used.
      logical_axes: A tree like `abstract` with a tuple of names (or None) in place of each array.
      abstract: A tree of arrays or of their shapes.
      may_stay_whole: Logical axes that stay whole if the mesh does not divide them.

    Raises:
      ConfigError: An axis has no rule, a mesh axis splits an array twice, or mesh axes do not divide a dimension that
        they split.
    """
    table = rules.parameters
    # All problems of all parameters are collected first: a wrong degree usually concerns many of them.
    all_problems = [
        problem
        for leaf in logical_leaves(logical_axes, abstract)
        for problem in problems(leaf.path, leaf.axes, table, leaf.array.shape, mesh, may_stay_whole=may_stay_whole)
    ]
    if all_problems:
        raise ConfigError(all_problems)
    return jax.tree.map(lambda x, axes: NamedSharding(mesh, spec(axes, table, x.shape, mesh)), abstract, logical_axes)


def batch_shardings(mesh: Mesh, rules: Rules, batch: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the shardings of a batch: rows split by the rule of "batch", positions by the rule of "length".

    Args:
      mesh: The mesh.
      rules: The rules; the activation table is used.
      batch: Sub-batch name -> feature name -> anything with a shape of [rows] or [rows, length].
    """

    def sharding(feature: Any) -> NamedSharding:
        # Ranks differ: labels and denoiser ids are [rows], token features [rows, length].
        names = ("batch", "length", None)[: len(feature.shape)]
        return NamedSharding(mesh, spec(names, rules.activations, feature.shape, mesh))

    return {name: {key: sharding(x) for key, x in features.items()} for name, features in batch.items()}
