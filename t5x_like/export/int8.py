"""Weights in eight bits: symmetric, a scale for each output of a matrix and for each row of a table.

Activations stay as they are; a matrix is scaled back where it is used. What is small or adds (norms, biases, tables of
positions) is left in its own type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.config.model import ModelConfig
from t5x_like.models.build import abstract, kernels

Tree = Any
SCALE = ".scale"
"""Behind the name of a quantised weight: the name of its scales."""
_LEVELS = 127


def contracted_axes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """By the path of each weight that is quantised: the dimensions that share a scale."""
    found = {path: tuple(range(kernel.stacked, kernel.split)) for path, kernel in kernels(config).items()}
    for path, axes in _leaves(abstract(config).logical_axes, is_leaf=lambda leaf: isinstance(leaf, tuple)).items():
        if axes == ("vocab", "embed"):
            found[path] = (1,)  # Of a token table: read by row, and by row too where it makes logits.
        elif axes == ("embed", "vocab"):
            found[path] = (0,)
    return dict(sorted(found.items()))


def quantized(params: Tree, config: ModelConfig) -> dict[str, Array]:
    """Weights by path: int8 with float32 scales under their path + ".scale", or as they were.

    An output whose weights are all zero keeps a scale of 1.
    """
    shared = contracted_axes(config)
    found: dict[str, Array] = {}
    for path, weight in _leaves(params).items():
        if path not in shared:
            found[path] = weight
            continue
        largest = jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=shared[path], keepdims=True)
        scale = jnp.where(largest > 0, largest / _LEVELS, 1.0)
        found[path] = jnp.clip(jnp.round(weight / scale), -_LEVELS, _LEVELS).astype(jnp.int8)
        found[path + SCALE] = scale
    return found


def unpacked(weights: Mapping[str, Array], dtype: jnp.dtype | None = None) -> Tree:
    """The tree of parameters of flat weights, quantised or not; scaled back in `dtype`, by default float32."""
    tree: dict[str, Any] = {}
    for path, weight in weights.items():
        if path.endswith(SCALE):
            continue
        scale = weights.get(path + SCALE)
        if scale is not None:
            weight = weight.astype(dtype or jnp.float32) * scale.astype(dtype or jnp.float32)
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = weight
    return tree


def flat(params: Tree) -> dict[str, Array]:
    """Weights by path, as they are."""
    return _leaves(params)


def _leaves(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}
