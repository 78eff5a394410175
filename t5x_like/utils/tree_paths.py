"""Trees of arrays by path, as in `params/decoder/final_norm/scale`, and the strict comparison of two trees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5x_like.errors import DataError, SafetyError

_MAX_LISTED = 40
"""Number of differences that a message lists; further ones are only counted."""


def path_string(key_path: Any) -> str:
    """Return a key path of jax as text: its keys, joined by slashes. Fields of named tuples appear by name."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return the leaves of a tree by path, in jax's order (dictionaries by sorted key).

    Args:
      tree: The tree.
      is_leaf: Function that makes a node a leaf, as in `jax.tree_util.tree_flatten`.

    Raises:
      ValueError: two leaves have the same path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    named = {path_string(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same path; keys must not contain '/'")
    return named


def paths(tree: Any) -> list[str]:
    """Return the paths of the leaves of nested dictionaries; every other node, a tuple for example, is a leaf."""
    return [*by_path(tree, is_leaf=lambda node: not isinstance(node, dict))]


def map_by_path(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map `function(path, leaf, *others)` over a tree, with paths as text; see `jax.tree_util.tree_map_with_path`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, *others: function(path_string(path), leaf, *others), tree, *rest
    )


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dictionaries of leaves by path: the inverse of `by_path` for trees of dictionaries."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def at(tree: Any, path: str) -> Any:
    """Return the node of nested dictionaries at `path`.

    Raises:
      KeyError: there is no such node.
    """
    for name in path.split("/"):
        tree = tree[name]
    return tree


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of a tree by path."""
    return {path: tuple(leaf.shape) for path, leaf in by_path(tree).items()}


def describe(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Return type and shape of each leaf by path, as in `float32[512,64]`."""
    return {path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in leaves.items()}


def require_finite(tree: Any, source: str) -> None:
    """Raise DataError, which names them, if arrays of a tree contain NaN or infinity.

    Args:
      tree: Tree of arrays.
      source: Name of the model, for the message.
    """
    leaves = {path: leaf for path, leaf in by_path(tree).items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    bad = [path for path, leaf in leaves.items() if not bool(jnp.isfinite(leaf).all())]
    if bad:
        more = f" and {len(bad) - _MAX_LISTED} more" if len(bad) > _MAX_LISTED else ""
        raise DataError(
            f"{source}: found NaN or infinity in {len(bad)} of {len(leaves)} arrays, expected finite weights: "
            f"{', '.join(bad[:_MAX_LISTED])}{more}; use another checkpoint"
        )


def require_same(found: Mapping[str, str], expected: Mapping[str, str], source: str) -> None:
    """Compare the descriptions of two trees.

    Args:
      found: Description of the saved tree.
      expected: Description of the tree that the model needs.
      source: Name of the checkpoint, for the message.

    Raises:
      SafetyError: a leaf is missing, unexpected, or of another type or shape; all differences are listed.
    """
    differences = [
        f"{path}: found {found.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
        for path in sorted({*found, *expected})
        if found.get(path) != expected.get(path)
    ]
    if not differences:
        return
    listed = "\n".join(f"  - {line}" for line in differences[:_MAX_LISTED])
    more = f"\n  ... and {len(differences) - _MAX_LISTED} more" if len(differences) > _MAX_LISTED else ""
    raise SafetyError(
        f"{source} does not fit this model, nothing was read. Arrays that differ: {len(differences)}.\n{listed}{more}\n"
        "Use the configuration that the checkpoint was saved with (config.json in its run directory)."
    )
