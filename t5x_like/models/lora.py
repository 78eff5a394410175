"""LoRA (Hu et al. 2021): kernels W + (alpha / rank) A B, of which A and B are trained and W is not.

It is a change of parameters. In the tree that a model is merged with, a `LowRank` stands where a kernel was, and a
layer that reads its kernel reads the sum: no layer knows of it. Stacked layers are cut into single ones before they are
read, so that the sum of one layer at a time is in memory.
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

from t5x_like.config.errors import ConfigError, Problem
from t5x_like.config.model import ModelConfig
from t5x_like.config.training import LoraConfig
from t5x_like.models.build import Kernel, kernels

Tree = Any
RANK = "lora_rank"
"""Logical axis of the narrow dimension of A and B."""
A, B = "lora_a", "lora_b"
"""Names of the adapters' arrays, below the path of their kernel."""
_SEED = 0x10AA
"""Folded into the run's key; the number is part of what a seed means."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "a", "b"),
    meta_fields=("inputs", "outputs", "scale"),
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A kernel with its adapter; read as `x[...]`, it is their sum.

    Attributes:
      base: [stacked..., inputs..., outputs...].
      a: [stacked..., inputs..., rank].
      b: [stacked..., rank, outputs...].
      inputs, outputs: How many dimensions of the kernel these are.
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
        # With a batch dimension (of 1), which "dots" does not keep for the backward pass: what is kept of products is
        # there for the tokens' sake, and this one would be as large as all kernels.
        product = f"Z{stacked}{inputs}{rank},Z{stacked}{rank}{outputs}->Z{stacked}{inputs}{outputs}"
        return self.base + self.scale * jnp.einsum(product, self.a[None], self.b[None])[0]

    def _letters(self) -> tuple[str, str, str, str]:
        letters = string.ascii_lowercase
        first, last = self.base.ndim - self.inputs - self.outputs, self.base.ndim - self.outputs
        return letters[:first], letters[first:last], letters[last : self.base.ndim], "R"


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """Which kernels of a model have adapters of which size.

    Attributes:
      kernels: By path.
      rank, scale: Of all of them.
    """

    kernels: Mapping[str, Kernel]
    rank: int
    scale: float

    @property
    def shapes(self) -> Tree:
        """The adapters, as `jax.ShapeDtypeStruct`s: {"lora_a", "lora_b"} in the place of each kernel."""
        return self._tree(
            lambda kernel: {
                A: jax.ShapeDtypeStruct((*kernel.shape[: kernel.split], self.rank), jnp.float32),
                B: jax.ShapeDtypeStruct(
                    (*kernel.shape[: kernel.stacked], self.rank, *kernel.shape[kernel.split :]), jnp.float32
                ),
            }
        )

    @property
    def logical_axes(self) -> Tree:
        """Those of the kernels, so that what splits a kernel splits its adapter."""
        return self._tree(
            lambda kernel: {
                A: (*kernel.axes[: kernel.split], RANK),
                B: (*kernel.axes[: kernel.stacked], RANK, *kernel.axes[kernel.split :]),
            }
        )

    def init(self, key: Array) -> Tree:
        """A normal with the standard deviation inputs**-0.5, B zero: the model is that of the base.

        What a kernel gets depends on `key` and its path, not on which others have adapters.
        """
        key = jax.random.fold_in(key, _SEED)

        def fresh(path: str, kernel: Kernel, shapes: Tree) -> Tree:
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            stddev = math.prod(kernel.shape[kernel.stacked : kernel.split]) ** -0.5
            return {A: stddev * jax.random.normal(own, shapes[A].shape), B: jnp.zeros(shapes[B].shape)}

        shapes = self.shapes
        return _nested({path: fresh(path, kernel, at(shapes, path)) for path, kernel in self.kernels.items()})

    def joined(self, base: Tree, adapters: Tree) -> Tree:
        """The parameters that a model is merged with: `base` with a `LowRank` for each kernel that has an adapter."""

        def low_rank(path: str, kernel: Kernel) -> LowRank:
            adapter = at(adapters, path)
            inputs, outputs = kernel.split - kernel.stacked, len(kernel.shape) - kernel.split
            return LowRank(at(base, path), adapter[A], adapter[B], inputs, outputs, self.scale)

        return _replaced(base, {path: low_rank(path, kernel) for path, kernel in self.kernels.items()})

    def merged(self, base: Tree, adapters: Tree) -> Tree:
        """Plain parameters: the sums."""
        joined = self.joined(base, adapters)
        return _replaced(base, {path: at(joined, path)[...] for path in self.kernels})

    def _tree(self, of: Any) -> Tree:
        return _nested({path: of(kernel) for path, kernel in self.kernels.items()})


def adapt(config: LoraConfig, model: ModelConfig) -> Adaptation:
    """The adaptation of a model's kernels that `config.paths` match in whole.

    Raises:
      ConfigError: patterns that match no kernel, or are no regular expressions; all are listed, with paths near them.
    """
    there = kernels(model)
    problems = []
    chosen: dict[str, Kernel] = {}
    for index, pattern in enumerate(config.paths):
        where = f"training.lora.paths.{index}"
        try:
            found = [path for path in there if re.fullmatch(pattern, path)]
        except re.error as error:
            problems.append(Problem(where, f"{pattern!r}, no regular expression ({error})", "one over paths"))
            continue
        if not found:
            near = difflib.get_close_matches(pattern, there, n=3, cutoff=0.0)
            expected = "a regular expression for whole paths of kernels"
            problems.append(Problem(where, f"{pattern!r}, which matches none", expected, f"near: {', '.join(near)}"))
        chosen |= {path: there[path] for path in found}
    if problems:
        raise ConfigError(problems)
    return Adaptation({path: there[path] for path in there if path in chosen}, config.rank, config.alpha / config.rank)


def at(tree: Tree, path: str) -> Any:
    """What is at `path` in nested dictionaries."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _nested(by_path: Mapping[str, Any]) -> Tree:
    tree: dict[str, Any] = {}
    for path, value in by_path.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def _replaced(tree: Tree, by_path: Mapping[str, Any], path: str = "") -> Tree:
    if path in by_path:
        return by_path[path]
    if not isinstance(tree, Mapping):
        return tree
    return {name: _replaced(child, by_path, f"{path}/{name}" if path else name) for name, child in tree.items()}
