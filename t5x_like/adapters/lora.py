"""LoRA (Hu et al. 2021): kernels W + (alpha / rank) A B, in which A and B are trained and W is frozen.

Only the parameters change, not the layers: in the parameter tree a `LoraKernel` replaces a kernel, and a layer that
reads it gets the sum. Stacked layers are sliced into single ones before they are read, so that only the sum of one
layer at a time is in memory.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import string
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.adapters.quantized_base import QuantizedKernel, quantized_axes, quantized_kernel, replaced
from t5x_like.config.model import ModelConfig
from t5x_like.config.training import LoraConfig
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.models.factory import Kernel, kernels
from t5x_like.utils.tree_paths import at, nested
from t5x_like.utils.type_aliases import PyTree

RANK = "lora_rank"
"""Logical axis of the narrow dimension of A and B."""
A, B = "lora_a", "lora_b"
"""Names of the adapters' arrays, below the path of their kernel."""
_SEED = 0x10AA
"""Folded into the run's key. Another number would change the initial adapters of a given seed."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "a", "b"),
    meta_fields=("inputs", "outputs", "scale"),
)
@dataclasses.dataclass(frozen=True)
class LoraKernel:
    """Kernel with its adapter; indexed by `x[...]`, it returns their sum.

    Attributes:
      base: [stacked..., inputs..., outputs...], an array or a `QuantizedKernel`.
      a: [stacked..., inputs..., rank].
      b: [stacked..., rank, outputs...].
      inputs, outputs: Number of input and output dimensions of the kernel.
      scale: alpha / rank.
    """

    base: Any
    a: Any
    b: Any
    inputs: int
    outputs: int
    scale: float

    def __getitem__(self, key: Any) -> Array:
        if key is not Ellipsis:
            raise TypeError(f"a kernel with an adapter is read as a whole, x[...]; found x[{key!r}]")
        stacked, inputs, outputs, rank = self._letters()
        # The batch dimension Z (of size 1) keeps the remat policy "dots" from saving this product for the backward
        # pass: the policy saves products without batch dimensions, and this one is as large as all kernels together.
        product = f"Z{stacked}{inputs}{rank},Z{stacked}{rank}{outputs}->Z{stacked}{inputs}{outputs}"
        return self.base[...] + self.scale * jnp.einsum(product, self.a[None], self.b[None])[0]

    def _letters(self) -> tuple[str, str, str, str]:
        letters = string.ascii_lowercase
        first, last = self.base.ndim - self.inputs - self.outputs, self.base.ndim - self.outputs
        return letters[:first], letters[first:last], letters[last : self.base.ndim], "R"


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Kernels of a model that have adapters, and the size of the adapters.

    Attributes:
      kernels: Kernels by path.
      rank, scale: Rank and alpha / rank of all adapters.
      quantized: Kernels, by path, that the base keeps in 8 bits: all of the layers but routers, or none.
    """

    kernels: Mapping[str, Kernel]
    rank: int
    scale: float
    quantized: Mapping[str, Kernel] = dataclasses.field(default_factory=dict)

    @property
    def shapes(self) -> PyTree:
        """Adapters as `jax.ShapeDtypeStruct`s: {"lora_a", "lora_b"} at the path of each kernel."""
        return self._tree(
            lambda kernel: {
                A: jax.ShapeDtypeStruct((*kernel.shape[: kernel.split], self.rank), jnp.float32),
                B: jax.ShapeDtypeStruct(
                    (*kernel.shape[: kernel.stacked], self.rank, *kernel.shape[kernel.split :]), jnp.float32
                ),
            }
        )

    @property
    def logical_axes(self) -> PyTree:
        """Logical axes of the adapters: those of their kernels, so that an adapter is sharded like its kernel."""
        return self._tree(
            lambda kernel: {
                A: (*kernel.axes[: kernel.split], RANK),
                B: (*kernel.axes[: kernel.stacked], RANK, *kernel.axes[kernel.split :]),
            }
        )

    def init(self, key: Array) -> PyTree:
        """Return initial adapters: A is normal with the standard deviation inputs**-0.5, and B is zero.

        The adapter of a kernel depends on `key` and its path, not on which other kernels have adapters.
        """
        key = jax.random.fold_in(key, _SEED)

        def fresh(path: str, kernel: Kernel, shapes: PyTree) -> PyTree:
            # A checksum and not Python's `hash`, which differs between processes.
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            stddev = math.prod(kernel.shape[kernel.stacked : kernel.split]) ** -0.5
            # B = 0: at the start of training the model is the base model exactly (Hu et al. 2021).
            return {A: stddev * jax.random.normal(own, shapes[A].shape), B: jnp.zeros(shapes[B].shape)}

        shapes = self.shapes
        return nested({path: fresh(path, kernel, at(shapes, path)) for path, kernel in self.kernels.items()})

    def kept(self, base: PyTree) -> PyTree:
        """Return the parameters of a base as a run keeps them: with a `QuantizedKernel` for each kernel of 8 bits."""
        return replaced(
            base, {path: quantized_kernel(at(base, path), kernel) for path, kernel in self.quantized.items()}
        )

    def kept_axes(self, logical_axes: PyTree) -> PyTree:
        """Return the logical axes of `kept`, from those of the parameters."""
        return replaced(logical_axes, {path: quantized_axes(kernel) for path, kernel in self.quantized.items()})

    def joined(self, base: PyTree, adapters: PyTree) -> PyTree:
        """Return the parameters of the model: `base`, as kept, with a `LoraKernel` for each kernel with an adapter."""

        def low_rank(path: str, kernel: Kernel) -> LoraKernel:
            adapter = at(adapters, path)
            inputs, outputs = kernel.split - kernel.stacked, len(kernel.shape) - kernel.split
            return LoraKernel(at(base, path), adapter[A], adapter[B], inputs, outputs, self.scale)

        return replaced(base, {path: low_rank(path, kernel) for path, kernel in self.kernels.items()})

    def merged(self, base: PyTree, adapters: PyTree) -> PyTree:
        """Return plain parameters: the sums of the base, rounded as it is kept, and the adapters."""
        return summed(self.joined(self.kept(base), adapters))

    def _tree(self, of: Any) -> PyTree:
        return nested({path: of(kernel) for path, kernel in self.kernels.items()})


def summed(params: PyTree) -> PyTree:
    """Return plain parameters: an array in place of each `LoraKernel` and `QuantizedKernel`."""

    def is_composed(node: Any) -> bool:
        return isinstance(node, LoraKernel | QuantizedKernel)

    return jax.tree.map(lambda node: node[...] if is_composed(node) else node, params, is_leaf=is_composed)


def lora_spec(config: LoraConfig, model: ModelConfig) -> LoraSpec:
    """Return the adapters of the kernels whose whole path matches one of `config.paths`.

    Raises:
      ConfigError: patterns match no kernel or are not regular expressions; all are listed, with similar paths.
    """
    there = kernels(model)
    problems = []
    chosen: dict[str, Kernel] = {}
    for index, pattern in enumerate(config.paths):
        where = f"training.lora.paths.{index}"
        try:
            found = [path for path in there if re.fullmatch(pattern, path)]
        except re.error as error:
            problems.append(
                ConfigProblem(
                    where, f"{pattern!r}, not a regular expression ({error})", "a regular expression over paths"
                )
            )
            continue
        if not found:
            near = difflib.get_close_matches(pattern, there, n=3, cutoff=0.0)
            expected = "a regular expression for whole paths of kernels"
            problems.append(
                ConfigProblem(where, f"{pattern!r}, which matches no kernel", expected, f"similar: {', '.join(near)}")
            )
        chosen |= {path: there[path] for path in found}
    if problems:
        raise ConfigError(problems)
    adapted = {path: there[path] for path in there if path in chosen}
    # A router of 8 bits would send tokens to other experts; heads and projections of embeddings are outside the layers.
    rounded = {path: one for path, one in there.items() if "layers" in one.axes and "router" not in one.axes}
    quantized = rounded if config.base_type == "int8" else {}
    return LoraSpec(adapted, config.rank, config.alpha / config.rank, quantized)
