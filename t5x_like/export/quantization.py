"""Symmetric int8 quantization of weights, with a scale for each output of a matrix and for each row of a table.

Activations are not quantized: a matrix is dequantized where it is used. Small or additive weights (norms, biases,
position tables) keep their own type.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from t5x_like.config.model import ModelConfig
from t5x_like.models.factory import abstract_model, kernels
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

SCALE = ".scale"
"""Suffix of the name of a quantized weight that names its scales."""
_LEVELS = 127


def contracted_axes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the dimensions that share a scale, by the path of each weight that is quantized."""
    # One scale per output: the contracted dimensions share it, so that it can be applied to the product instead of the
    # weights.
    found = {path: tuple(range(kernel.stacked, kernel.split)) for path, kernel in kernels(config).items()}
    for path, axes in tree_paths.by_path(
        abstract_model(config).logical_axes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    ).items():
        if axes == ("vocab", "embed"):
            # A token table is read by rows, both as an embedding and as the output projection of tied embeddings.
            found[path] = (1,)
        elif axes == ("embed", "vocab"):
            found[path] = (0,)
    return dict(sorted(found.items()))


def quantized(params: PyTree, config: ModelConfig) -> dict[str, Array]:
    """Return weights by path: int8 with float32 scales at path + ".scale", or unchanged if they are not quantized.

    An output whose weights are all zero has the scale 1.
    """
    shared = contracted_axes(config)
    found: dict[str, Array] = {}
    for path, weight in tree_paths.by_path(params).items():
        if path not in shared:
            found[path] = weight
            continue
        largest = jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=shared[path], keepdims=True)
        scale = jnp.where(largest > 0, largest / _LEVELS, 1.0)
        found[path] = jnp.clip(jnp.round(weight / scale), -_LEVELS, _LEVELS).astype(jnp.int8)
        found[path + SCALE] = scale
    return found


def unpacked(weights: Mapping[str, Array], dtype: jnp.dtype | None = None) -> PyTree:
    """Return the parameter tree of flat weights; quantized ones are dequantized to `dtype`, by default float32."""
    restored: dict[str, Array] = {}
    for path, weight in weights.items():
        if path.endswith(SCALE):
            continue
        scale = weights.get(path + SCALE)
        if scale is not None:
            weight = weight.astype(dtype or jnp.float32) * scale.astype(dtype or jnp.float32)
        restored[path] = weight
    return tree_paths.nested(restored)
