"""Trees of arrays by path, and the strict comparison of two of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from t5x_like.config.errors import RefusedError

_SHOWN = 40
"""Differences that a message lists before it only counts."""


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves by their path, as in `params/decoder/final_norm/scale`. Fields of named tuples go by their name.

    Raises:
      ValueError: two leaves with the same path.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same path; keys must not contain '/'")
    return named


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries out of leaves by path: a tree without classes, which any program can read."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def describe(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Path -> type and shape, as in `float32[512,64]`."""
    return {path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in leaves.items()}


def require_same(found: Mapping[str, str], expected: Mapping[str, str], source: str) -> None:
    """Compares the descriptions of two trees.

    Raises:
      RefusedError: a leaf is missing, not expected, or of another type or shape; all of them are listed.
    """
    differences = [
        f"{path}: found {found.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
        for path in sorted({*found, *expected})
        if found.get(path) != expected.get(path)
    ]
    if not differences:
        return
    listed = "\n".join(f"  - {line}" for line in differences[:_SHOWN])
    more = f"\n  ... and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    raise RefusedError(
        f"{source} does not fit this model, nothing was read. Arrays that differ: {len(differences)}.\n{listed}{more}\n"
        "Use the configuration that the checkpoint was saved with (config.json in its run directory)."
    )
