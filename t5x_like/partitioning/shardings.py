"""Trees of shardings for trees of logical names, and what they cost per device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_like.config import ConfigError
from t5x_like.partitioning.rules import LogicalAxes, Rules, problems, spec

Tree = Any


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of a tree, with its logical axes beside it."""

    path: str
    axes: LogicalAxes
    array: Any


def leaves(logical_axes: Tree, abstract: Tree) -> list[Leaf]:
    """The arrays of `abstract` in order; `logical_axes` has a tuple in the place of each of them."""

    def leaf(path: Any, array: Any, axes: LogicalAxes) -> Leaf:
        return Leaf(jax.tree_util.keystr(path, simple=True, separator="/"), axes, array)

    return jax.tree.leaves(jax.tree_util.tree_map_with_path(leaf, abstract, logical_axes))


def tree_shardings(mesh: Mesh, rules: Rules, logical_axes: Tree, abstract: Tree) -> Tree:
    """The shardings of parameters, optimizer state, or a whole training state.

    Args:
      mesh: The mesh.
      rules: The rules, of which the table of parameters is used.
      logical_axes: A tree like `abstract` with a tuple of names (or None) in the place of each array.
      abstract: A tree of arrays or of their shapes.

    Raises:
      ConfigError: an axis without a rule, a mesh axis twice in an array, a dimension that its mesh axes do not divide.
    """
    table = rules.parameters
    found = [
        problem
        for leaf in leaves(logical_axes, abstract)
        for problem in problems(leaf.path, leaf.axes, table, leaf.array.shape, mesh)
    ]
    if found:
        raise ConfigError(found)
    return jax.tree.map(lambda x, axes: NamedSharding(mesh, spec(axes, table, x.shape, mesh)), abstract, logical_axes)


def batch_shardings(mesh: Mesh, rules: Rules, batch: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The shardings of a batch: rows by the rule of "batch", positions in the row by the rule of "length".

    Args:
      mesh: The mesh.
      rules: The rules, of which the table of activations is used.
      batch: Sub-batch name -> feature name -> anything with a shape of [rows] or [rows, length].
    """

    def sharding(feature: Any) -> NamedSharding:
        names = ("batch", "length", None)[: len(feature.shape)]
        return NamedSharding(mesh, spec(names, rules.activations, feature.shape, mesh))

    return {name: {key: sharding(x) for key, x in features.items()} for name, features in batch.items()}


class Row(NamedTuple):
    """One array in the report of shardings."""

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    bytes_per_device: int


def report(logical_axes: Tree, abstract: Tree, mesh: Mesh, rules: Rules) -> list[Row]:
    """How each array of parameters or training state is split, and its bytes on each device."""
    rows = []
    for leaf in leaves(logical_axes, abstract):
        shape = tuple(leaf.array.shape)
        sharding = NamedSharding(mesh, spec(leaf.axes, rules.parameters, shape, mesh))
        size = math.prod(sharding.shard_shape(shape)) * leaf.array.dtype.itemsize
        rows.append(Row(leaf.path, shape, sharding.spec, size))
    return rows
