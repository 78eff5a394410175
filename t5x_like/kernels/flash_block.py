"""One block of queries with one block of keys inside a kernel of flash attention: scores, mask, bias, gradients.

This arithmetic is the same in the kernels for TPUs (`kernels.flash_tpu_kernels`) and for GPUs
(`kernels.flash_gpu_kernels`), which differ in how a block is read and in how T5's bias is laid out. Both blocks have
the same size b.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.attention_masks import reaches
from t5x_like.kernels.online_softmax import HIDDEN

ROW_BY_ROW = (((1,), (1,)), ((), ()))
ROW_BY_COLUMN = (((1,), (0,)), ((), ()))
COLUMN_BY_COLUMN = (((0,), (0,)), ((), ()))
"""Axes of a product that are summed, for `dot`."""


@dataclasses.dataclass(frozen=True)
class KernelSetting:
    """Static part of a call.

    Attributes:
      block: Number b of queries and of keys of a block, which divides both lengths: a power of 2, at least 8, on a
        TPU at least 128 and on a GPU at least 16.
      causal: A query attends to keys at its own index and before it.
      has_prefix: Where the prefix bits of query and key are set, `causal` does not apply.
      window: (left, right) distances of visible keys, or None.
      softcap: Soft cap of the scores, or None.
      is_partial: Results are float32, because the caller adds them to those of further keys or queries; otherwise they
        have the type of queries, keys and values.
      interpret: Run the kernels as ordinary operations, on any platform.
    """

    block: int
    causal: bool
    has_prefix: bool
    window: tuple[int, int] | None
    softcap: float | None
    is_partial: bool
    interpret: bool

    def result_type(self, of: Array) -> Any:
        """Return the type of a result that belongs to an array."""
        return jnp.float32 if self.is_partial else of.dtype


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["q_codes", "kv_codes", "window", "offset"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class KernelMask:
    """Arrays of the mask.

    Attributes:
      q_codes: int32 [1 or B, 1, Q], 2 * segment + prefix bit; None: every pair is in the same segment.
      kv_codes: int32 [1 or B, 1, K], present with `q_codes`. A query sees keys of its own segment.
      window: int32 [2], window that is an array, or None.
      offset: int32 [1], index of the first key minus that of the first query in the whole sequence; None: 0.
    """

    q_codes: Array | None
    kv_codes: Array | None
    window: Array | None
    offset: Array | None


class KernelGradients(NamedTuple):
    """Gradients of the arguments of a kernel.

    Attributes:
      q: [B, H, Q, x].
      k: [B, G, K, x].
      v: [B, G, K, x].
      distances: float32 [H, Q + K], or None without a bias.
    """

    q: Array
    k: Array
    v: Array
    distances: Array | None


class FlashKernels(abc.ABC):
    """Kernels of flash attention for one platform (Dao et al. 2022).

    The caller looks T5's relative bias up, one number per head and distance, and turns its gradient into that of the
    table. Shapes: queries [B, H, Q, x], keys and values [B, G, K, x], statistics of queries [B, H, 1, Q], distances
    [H, Q + K], where entry i belongs to distance i - Q. An instance is static and hashable.
    """

    @abc.abstractmethod
    def block_size(self, q_length: int, kv_length: int, width: int, dtype: Any) -> int:
        """Return the number of queries and of keys of a block, for heads of a width and a type."""

    @abc.abstractmethod
    def forward(
        self, setting: KernelSetting, q: Array, k: Array, v: Array, distances: Array | None, mask: KernelMask
    ) -> tuple[Array, Array, Array]:
        """Return the output [B, H, Q, x], and float32 [B, H, 1, Q]: the largest score of each query and the logarithm
        of its sum of exponentials.

        The output of a query without any visible key is finite and has no meaning; its largest score is `HIDDEN`.
        """

    @abc.abstractmethod
    def gradients(self, setting: KernelSetting, arrays: dict[str, Array | None], mask: KernelMask) -> KernelGradients:
        """Return the gradients.

        Args:
          setting: Static part.
          arrays: q, k, v, distances (or None), d_out, log_total, and `online_softmax.correction` as delta. A query
            with a log_total of infinity passes no gradient.
          mask: Arrays of the mask.
        """


def dot(a: Array, b: Array, dimensions: Any) -> Array:
    """Return a product that is accumulated in float32."""
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def mask_arrays(mask: KernelMask) -> dict[str, Array | None]:
    """Return the arrays of a mask by name."""
    return {"q_codes": mask.q_codes, "kv_codes": mask.kv_codes, "window": mask.window, "offset": mask.offset}


class SoftmaxStep(NamedTuple):
    """Update of the running sums of the queries by a block of keys. All columns of a [b, n] array are equal.

    Attributes:
      weights: [b, b], exponentials of the scores.
      decay: [b, n], factor on the sums so far.
      maximum: [b, n], the largest score.
      total: [b, n], sum of the exponentials.
    """

    weights: Array
    decay: Array
    maximum: Array
    total: Array


def softmax_step(scores: Array, maximum: Array, total: Array) -> SoftmaxStep:
    """Return the step with the scores [b, b] of one more block of keys, from the statistics so far, [b, n] each.

    They start as `HIDDEN`, which is finite, so that a block of queries that no key reaches has finite results, and 0.
    """
    new = jnp.maximum(maximum, jnp.max(scores, axis=1, keepdims=True))
    weights, decay = jnp.exp(scores - new[:, :1]), jnp.exp(maximum - new)
    return SoftmaxStep(weights, decay, new, total * decay + jnp.sum(weights, axis=1, keepdims=True))


def positive_total(total: Array) -> Array:
    """Return the sums of exponentials, and 1 for a block of queries that no key reaches."""
    return jnp.where(total == 0.0, 1.0, total)


class Cell(abc.ABC):
    """One block of queries with one block of keys.

    Attributes:
      setting: Static part.
      refs: References of the kernel by name; arrays that are not given have none.
      i: Number of the block of queries.
      j: Number of the block of keys.
    """

    def __init__(self, setting: KernelSetting, refs: dict[str, Any], i: Any, j: Any):
        self.setting, self.refs, self.i, self.j = setting, refs, i, j

    @abc.abstractmethod
    def read(self, name: str) -> Array:
        """Return the block [b, x] of q, d_out, k or v."""

    @abc.abstractmethod
    def column(self, name: str) -> Array:
        """Return the block [b, 1] of log_total, delta or q_codes, numbers of queries."""

    @abc.abstractmethod
    def kv_codes(self) -> Array:
        """Return the codes of the keys, [1 or b, b]."""

    @abc.abstractmethod
    def bias(self) -> Array:
        """Return the bias [b, b], the Toeplitz matrix of the distances key - query."""

    def first_key(self) -> Any:
        """Return the index of the first key of the block; that of the first of all queries is 0."""
        start = self.j * self.setting.block
        return start + self.refs["offset"][0] if "offset" in self.refs else start

    def window(self) -> tuple[Any, Any] | None:
        return (self.refs["window"][0], self.refs["window"][1]) if "window" in self.refs else self.setting.window

    def is_reached(self) -> Array | bool:
        """Return whether the causal limit and the window reach some pair of the block."""
        block = self.setting.block
        causal = self.setting.causal and not self.setting.has_prefix
        return reaches(self.i * block, block, self.first_key(), block, causal=causal, window=self.window())

    def visible(self) -> Array | None:
        """Return the mask, bool [b, b]; None if every key is visible."""
        setting, conditions = self.setting, []
        shape = (setting.block, setting.block)
        distance = (
            (self.i * setting.block - self.first_key())
            + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            - jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        )
        codes = None
        if "q_codes" in self.refs:
            codes = self.column("q_codes"), self.kv_codes()
            conditions.append(codes[0] >> 1 == codes[1] >> 1)
        if setting.causal:
            seen = distance >= 0
            if setting.has_prefix:
                assert codes is not None
                seen = seen | ((codes[0] & codes[1] & 1) == 1)
            conditions.append(seen)
        window = self.window()
        if window is not None:
            conditions.append((distance <= window[0]) & (distance >= -window[1]))
        return functools.reduce(jnp.logical_and, conditions) if conditions else None

    def scores(self) -> tuple[Array, Array | None, Array | None]:
        """Return the scores [b, b], their slope by the products, and the mask."""
        scores, slope = dot(self.read("q"), self.read("k"), ROW_BY_ROW), None
        if self.setting.softcap is not None:
            tanh = jnp.tanh(scores / self.setting.softcap)
            scores, slope = self.setting.softcap * tanh, 1.0 - tanh * tanh
        if "distances" in self.refs:
            scores = scores + self.bias()
        visible = self.visible()
        return (scores if visible is None else jnp.where(visible, scores, HIDDEN)), slope, visible

    def gradients(self) -> tuple[Array, Array, Array]:
        """Return the probabilities, the gradients of the scores and those of the products, [b, b] each."""
        scores, slope, visible = self.scores()
        weights = jnp.exp(scores - self.column("log_total"))
        d_weights = dot(self.read("d_out"), self.read("v"), ROW_BY_ROW)
        d_scores = weights * (d_weights - self.column("delta"))
        if visible is not None:
            d_scores = jnp.where(visible, d_scores, 0.0)
        return weights, d_scores, d_scores if slope is None else d_scores * slope
