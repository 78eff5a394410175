"""Frozen kernels of a base in 8 bits, dequantized where they are read (QLoRA: Dettmers et al. 2023, with int8)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.models.factory import Kernel

LEVELS = 127


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """Kernel values * scale; indexed by `x[...]`, it returns this product, float32.

    Attributes:
      values: int8 [stacked..., inputs..., outputs...].
      scale: float32, 1 in place of each input: one scale for each output of each layer and expert.
    """

    values: Any
    scale: Any

    def __getitem__(self, key: Any) -> Array:
        if key is not Ellipsis:
            raise TypeError(f"a quantized kernel is read as a whole, x[...]; found x[{key!r}]")
        weights: Array = self.values.astype(self.scale.dtype) * self.scale
        return weights

    @property
    def ndim(self) -> int:
        """Number of dimensions of the kernel."""
        return int(self.values.ndim)


def quantized_kernel(weight: Array, kernel: Kernel) -> QuantizedKernel:
    """Return a kernel rounded to the nearest of 255 values between the largest absolute one of its output and its
    negative. An output whose weights are all 0 has the scale 1."""
    inputs = tuple(range(kernel.stacked, kernel.split))
    largest = jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=inputs, keepdims=True)
    scale = jnp.where(largest > 0, largest / LEVELS, 1.0)
    values = jnp.clip(jnp.round(weight / scale), -LEVELS, LEVELS).astype(jnp.int8)
    return QuantizedKernel(values, scale)


def quantized_axes(kernel: Kernel) -> QuantizedKernel:
    """Return the logical axes of a quantized kernel."""
    inputs = range(kernel.stacked, kernel.split)
    scale = tuple(None if dim in inputs else name for dim, name in enumerate(kernel.axes))
    return QuantizedKernel(kernel.axes, scale)


def replaced(tree: Any, by_path: Mapping[str, Any], path: str = "") -> Any:
    """Return nested dictionaries with the nodes at these paths replaced."""
    if path in by_path:
        return by_path[path]
    if not isinstance(tree, Mapping):
        return tree
    return {name: replaced(child, by_path, f"{path}/{name}" if path else name) for name, child in tree.items()}
