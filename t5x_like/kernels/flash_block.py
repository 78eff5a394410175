"""One block of queries with one block of keys inside a kernel of flash attention: scores, mask, bias, gradients.

Both have the same size b. T5's relative bias depends on (key - query) alone. A block needs 2 b numbers of it and lays
them out as its Toeplitz matrix by rolling row r by r. The gradient is the sum over each diagonal, made by the inverse
rolls.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from t5x_like.kernels.attention_masks import reaches
from t5x_like.kernels.online_softmax import HIDDEN

LANES = 128
"""Width of a tile of fast memory."""
SUBLANES = 8
"""Height of a tile of 32-bit numbers."""
ROW_BY_ROW = (((1,), (1,)), ((), ()))
ROW_BY_COLUMN = (((1,), (0,)), ((), ()))
COLUMN_BY_COLUMN = (((0,), (0,)), ((), ()))
"""Axes of a product that are summed, for `dot`."""


@dataclasses.dataclass(frozen=True)
class KernelSetting:
    """Static part of a call.

    Attributes:
      block: Number b of queries and of keys of a block, which divides both lengths: a power of 2, at
        least 8, and on a TPU at least 128.
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


def block_size(q_length: int, kv_length: int) -> int:
    """Return the size of the blocks of queries and keys with the least padding; the largest of several."""
    return min((512, 256, 128), key=lambda block: (-(-q_length // block) * -(-kv_length // block)) * block**2)


def dot(a: Array, b: Array, dimensions: Any) -> Array:
    """Return a product that is accumulated in float32."""
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _as_column(row: Array) -> Array:
    """Return [1, b] as [b, 1]. Transposes are of whole tiles."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def as_row(column: Array) -> Array:
    """Return [b, 1] as [1, b]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def _toeplitz(row: Array, block: int) -> Array:
    """Return T[r, c] = row[b + c - r] of a row [1, 2 b]."""
    tall = jnp.broadcast_to(row, (block, 2 * block))
    return pltpu.roll(tall, 0, 1, stride=1, stride_axis=0)[:, block:]


def diagonal_sums(x: Array) -> Array:
    """Return [8, 2 b] whose sum over rows has at b + d the sum of x[r, r + d]; the transpose of `_toeplitz`."""
    block = x.shape[0]
    x = jnp.concatenate([jnp.zeros_like(x), x], axis=1)
    # Row r is to be rolled by -r. The lower half of the rows is rolled by half their number and added to the upper
    # half, until one tile of rows is left.
    while block > SUBLANES:
        block //= 2
        x = x[:block] + pltpu.roll(x[block:], x.shape[1] - block, 1)
    rows = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    step = 1
    while step < block:
        x = jnp.where((rows & step) != 0, pltpu.roll(x, x.shape[1] - step, 1), x)
        step *= 2
    return x


class Cell:
    """One block of queries with one block of keys.

    Attributes:
      i: Number of the block of queries.
      j: Number of the block of keys.
    """

    def __init__(self, setting: KernelSetting, refs: dict[str, Any], i: Array, j: Array):
        self.setting, self.refs, self.i, self.j = setting, refs, i, j

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
            codes = _as_column(self.refs["q_codes"][0]), jnp.broadcast_to(self.refs["kv_codes"][0], shape)
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

    def first_distances(self) -> Array:
        """Return the number of the first of the two blocks of distances that this block needs."""
        return self.j - self.i + self.refs["q_blocks"] - 1

    def scores(self) -> tuple[Array, Array | None, Array | None]:
        """Return the scores [b, b], their slope by the products, and the mask."""
        scores, slope = dot(self.refs["q"][0, 0], self.refs["k"][0, 0], ROW_BY_ROW), None
        if self.setting.softcap is not None:
            tanh = jnp.tanh(scores / self.setting.softcap)
            scores, slope = self.setting.softcap * tanh, 1.0 - tanh * tanh
        if "distances" in self.refs:
            first = self.first_distances()
            row = jnp.concatenate([self.refs["distances"][0, first], self.refs["distances"][0, first + 1]], axis=1)
            scores = scores + _toeplitz(row, self.setting.block)
        visible = self.visible()
        return (scores if visible is None else jnp.where(visible, scores, HIDDEN)), slope, visible

    def gradients(self) -> tuple[Array, Array, Array]:
        """Return the probabilities, the gradients of the scores and those of the products, [b, b] each."""
        scores, slope, visible = self.scores()
        weights = jnp.exp(scores - _as_column(self.refs["log_total"][0, 0]))
        d_weights = dot(self.refs["d_out"][0, 0], self.refs["v"][0, 0], ROW_BY_ROW)
        d_scores = weights * (d_weights - _as_column(self.refs["delta"][0, 0]))
        if visible is not None:
            d_scores = jnp.where(visible, d_scores, 0.0)
        return weights, d_scores, d_scores if slope is None else d_scores * slope
