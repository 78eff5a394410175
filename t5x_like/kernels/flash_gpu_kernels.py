"""Pallas kernels of flash attention for GPUs (Triton): forward, and gradients of queries, keys, values and distances.

A program of the grid owns one block of results and loops over the blocks of keys or queries that the causal limit and
the window leave. `kernels.flash_block` has the arithmetic of a block. T5's relative bias depends on (key - query)
alone: the b * b numbers of a block are gathered from 2 b - 1 neighbours in the row of distances, which the cache holds.

The gradient of the distances has a kernel of its own, without atomic additions, whose order would differ from run to
run. All blocks with the same difference of the numbers of their keys and queries have the same distances at the same
places. A program adds the gradients of their scores up, entry by entry, and XLA sums the diagonals of the result. This
computes the scores once more: nine products per block in the backward pass in place of seven.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from t5x_like.kernels.flash_block import (
    COLUMN_BY_COLUMN,
    ROW_BY_COLUMN,
    Cell,
    FlashKernels,
    KernelGradients,
    KernelMask,
    KernelSetting,
    dot,
    mask_arrays,
    positive_total,
    softmax_step,
)
from t5x_like.kernels.online_softmax import HIDDEN, pad_to_blocks

MIN_BLOCK = 16
"""Smallest size of a side of Triton's matrix products."""
MAX_BLOCK = 64
_BLOCK_BYTES = 16384
"""Largest size of a block of keys or values. The four blocks that a loop has in shared memory must fit together."""
_PROGRAMS = 512
"""Number of programs from which the gradient of the distances is not divided further: a few per multiprocessor."""


class GpuKernels(FlashKernels):
    """Kernels for GPUs. Widths that are not a power of 2 are padded."""

    def block_size(self, q_length: int, kv_length: int, width: int, dtype: Any) -> int:
        fits = _BLOCK_BYTES // (_padded_width(width) * jnp.dtype(dtype).itemsize)
        return max(MIN_BLOCK, min(MAX_BLOCK, fits, pl.next_power_of_2(max(q_length, kv_length))))

    def forward(
        self, setting: KernelSetting, q: Array, k: Array, v: Array, distances: Array | None, mask: KernelMask
    ) -> tuple[Array, Array, Array]:
        width = q.shape[3]
        q, k, v = (_with_padded_width(x) for x in (q, k, v))
        out, maximum, log_total = _forward(setting, {"q": q, "k": k, "v": v, "distances": distances}, mask)
        return out[..., :width], maximum, log_total

    def gradients(self, setting: KernelSetting, arrays: dict[str, Array | None], mask: KernelMask) -> KernelGradients:
        width = _array(arrays, "q").shape[3]
        for name in ("q", "k", "v", "d_out"):
            arrays = arrays | {name: _with_padded_width(_array(arrays, name))}
        d_q = _query_gradient(setting, arrays, mask)
        d_k, d_v = _key_value_gradients(setting, arrays, mask)
        d_distances = None if arrays["distances"] is None else _distance_gradient(setting, arrays, mask)
        return KernelGradients(d_q[..., :width], d_k[..., :width], d_v[..., :width], d_distances)


def _array(arrays: dict[str, Array | None], name: str) -> Array:
    """Return an array that is always given."""
    found = arrays[name]
    assert found is not None
    return found


def _padded_width(width: int) -> int:
    return max(MIN_BLOCK, pl.next_power_of_2(width))


def _with_padded_width(x: Array) -> Array:
    return pad_to_blocks(x, x.ndim - 1, _padded_width(x.shape[-1]))


class _GpuCell(Cell):
    """Blocks of arrays in global memory, of which a program sees some rows and heads.

    Attributes:
      row: Number of the row among those of the program.
      head: Number of the query head among those of the program, which have one key head.
      held: Blocks that a loop reads once.
    """

    def __init__(
        self,
        setting: KernelSetting,
        refs: dict[str, Any],
        i: Any,
        j: Any,
        *,
        row: Any = 0,
        head: Any = 0,
        held: dict[str, Array] | None = None,
    ):
        super().__init__(setting, refs, i, j)
        self.row, self.head, self.held = row, head, held or {}

    def _slice(self, index: Any) -> Any:
        return pl.ds(index * self.setting.block, self.setting.block)

    def _load(self, name: str) -> Array:
        match name:
            case "q" | "d_out":
                return self.refs[name][self.row, self.head, self._slice(self.i), :]
            case "k" | "v":
                return self.refs[name][self.row, 0, self._slice(self.j), :]
            case "log_total" | "delta":
                return self.refs[name][self.row, self.head, 0, self._slice(self.i)][:, None]
            case "q_codes":
                return self.refs[name][self._row_of_codes(name), 0, self._slice(self.i)][:, None]
            case "kv_codes":
                return self.refs[name][self._row_of_codes(name), 0, self._slice(self.j)][None]
            case _:
                raise AssertionError(f"unknown array {name!r}")

    def _row_of_codes(self, name: str) -> Any:
        # All rows may share the codes of their queries, of their keys or both.
        return self.row if self.refs[name].shape[0] > 1 else 0

    def hold(self, *names: str) -> dict[str, Array]:
        """Return blocks by name, those that are given."""
        return {name: self._load(name) for name in names if name in self.refs}

    def read(self, name: str) -> Array:
        return self.held[name] if name in self.held else self._load(name)

    def column(self, name: str) -> Array:
        return self.read(name)

    def kv_codes(self) -> Array:
        return self.read("kv_codes")

    def bias(self) -> Array:
        block = self.setting.block
        queries, keys = (jax.lax.broadcasted_iota(jnp.int32, (block, block), axis) for axis in (0, 1))
        first = (self.j - self.i) * block + self.refs["q"].shape[2]
        return self.refs["distances"][self.head, first + keys - queries]

    def key_blocks(self) -> tuple[Any, Any]:
        """Return the first block of keys that the block of queries reaches, and the one after the last."""
        left, right = self._limits()
        # `first_key` of block 0.
        start = self.i * self.setting.block - (self.first_key() - self.j * self.setting.block)
        return self._overlapping(start, left, right, self.refs["k"].shape[2])

    def query_blocks(self) -> tuple[Any, Any]:
        """Return the first block of queries that reaches the block of keys, and the one after the last."""
        left, right = self._limits()
        return self._overlapping(self.first_key(), right, left, self.refs["q"].shape[2])

    def _limits(self) -> tuple[Any, Any]:
        """Return the largest distances of visible keys to the left and to the right; None: any."""
        window = self.window()
        left, right = (None, None) if window is None else window
        if self.setting.causal and not self.setting.has_prefix:
            right = 0 if right is None else jnp.minimum(right, 0)
        return left, right

    def _overlapping(self, start: Any, before: Any, after: Any, length: int) -> tuple[Any, Any]:
        """Return the range of blocks that overlap a block at `start` and its surroundings."""
        block = self.setting.block
        count, bits = length // block, block.bit_length() - 1
        # Shifts round down, also negative numbers.
        low = 0 if before is None else jnp.clip((start - before) >> bits, 0, count)
        high = count if after is None else jnp.clip(((start + block - 1 + after) >> bits) + 1, 0, count)
        return low, high


def _call(
    body: Callable[[dict[str, Any]], None],
    setting: KernelSetting,
    grid: tuple[int, int, int],
    arrays: dict[str, Array | None],
    outputs: Mapping[str, tuple[tuple[int, ...], Any]],
    *,
    q_heads: int = 1,
    rows: int = 1,
) -> list[Array]:
    """Run a kernel over a grid (blocks of the results, heads, parts of the rows).

    Args:
      body: Function of the references by name.
      setting: Static part.
      grid: Numbers of programs.
      arrays: Inputs by name; None: the kernel has no such input.
      outputs: Shapes and types of the results by name.
      q_heads: Query heads of a program. More than one: the axis of heads is that of the key heads.
      rows: Rows of a program.
    """
    inputs = {name: x for name, x in arrays.items() if x is not None}
    repeats, block, width = inputs["q"].shape[1] // inputs["k"].shape[1], setting.block, inputs["q"].shape[3]

    def kv_head(head: Any) -> Any:
        return head if q_heads > 1 else jax.lax.div(head, jnp.int32(repeats))

    def input_spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        match name:
            case "q" | "d_out" | "log_total" | "delta":
                return pl.BlockSpec((rows, q_heads, *shape[2:]), lambda i, h, b: (b, h, 0, 0))
            case "k" | "v":
                return pl.BlockSpec((rows, 1, *shape[2:]), lambda i, h, b: (b, kv_head(h), 0, 0))
            case "distances":
                return pl.BlockSpec((q_heads, shape[1]), lambda i, h, b: (h, 0))
            case "q_codes" | "kv_codes":
                shared = shape[0] == 1
                return pl.BlockSpec((1 if shared else rows, 1, shape[2]), lambda i, h, b: (0 if shared else b, 0, 0))
            case "window" | "offset":
                return pl.BlockSpec(shape, lambda i, h, b: (0,))
            case _:
                raise AssertionError(f"unknown array {name!r}")

    def output_spec(name: str) -> pl.BlockSpec:
        match name:
            case "out" | "d_q" | "d_k" | "d_v":
                return pl.BlockSpec((1, 1, block, width), lambda i, h, b: (b, h, i, 0))
            case "maximum" | "log_total":
                return pl.BlockSpec((1, 1, 1, block), lambda i, h, b: (b, h, 0, i))
            case "d_scores":
                return pl.BlockSpec((1, 1, 1, block, block), lambda i, h, b: (b, h, i, 0, 0))
            case _:
                raise AssertionError(f"unknown array {name!r}")

    names = [*inputs, *outputs]

    def kernel(*refs: Any) -> None:
        body(dict(zip(names, refs, strict=True)))

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[input_spec(name, x.shape) for name, x in inputs.items()],
        out_specs=[output_spec(name) for name in outputs],
        out_shape=[jax.ShapeDtypeStruct(*x) for x in outputs.values()],
        # Not tuned on a GPU. With 4 warps, programs with two sums for heads of 64 spill registers.
        compiler_params=plgpu.CompilerParams(num_warps=4 if width <= 64 and "d_k" not in outputs else 8, num_stages=2),
        interpret=setting.interpret,
        name=f"flash_{'_'.join(outputs)}",
    )(*inputs.values())


def _forward(setting: KernelSetting, arrays: dict[str, Array | None], mask: KernelMask) -> tuple[Array, Array, Array]:
    """Return output, largest score and logarithm of the sum of exponentials, as `FlashKernels.forward`."""
    q, v = _array(arrays, "q"), _array(arrays, "v")
    rows, heads, q_length, width = q.shape

    def body(refs: dict[str, Any]) -> None:
        i = pl.program_id(0)
        of_queries = _GpuCell(setting, refs, i, 0)
        held = of_queries.hold("q", "q_codes")

        def add(j: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, maximum, total = state
            cell = _GpuCell(setting, refs, i, j, held=held)
            step = softmax_step(cell.scores()[0], maximum, total)
            added = dot(step.weights.astype(v.dtype), cell.read("v"), ROW_BY_COLUMN)
            return out * step.decay + added, step.maximum, step.total

        column = (setting.block, 1)
        start = jnp.zeros((setting.block, width), jnp.float32), jnp.full(column, HIDDEN), jnp.zeros(column)
        out, maximum, total = jax.lax.fori_loop(*of_queries.key_blocks(), add, start)
        # Triton's maximum passes over NaN; the sum of exponentials does not.
        maximum, safe = jnp.where(jnp.isnan(total), total, maximum), positive_total(total)
        refs["out"][0, 0] = (out / safe).astype(setting.result_type(q))
        refs["maximum"][0, 0, 0] = maximum[:, 0]
        refs["log_total"][0, 0, 0] = (maximum + jnp.log(safe))[:, 0]

    statistic = ((rows, heads, 1, q_length), jnp.float32)
    outputs = {"out": (q.shape, setting.result_type(q)), "maximum": statistic, "log_total": statistic}
    grid = (q_length // setting.block, heads, rows)
    out, maximum, log_total = _call(body, setting, grid, arrays | mask_arrays(mask), outputs)
    return out, maximum, log_total


def _query_gradient(setting: KernelSetting, arrays: dict[str, Array | None], mask: KernelMask) -> Array:
    """Return the gradient of the queries; arguments as in `FlashKernels.gradients`."""
    q = _array(arrays, "q")
    rows, heads, q_length, width = q.shape

    def body(refs: dict[str, Any]) -> None:
        i = pl.program_id(0)
        of_queries = _GpuCell(setting, refs, i, 0)
        held = of_queries.hold("q", "d_out", "log_total", "delta", "q_codes")

        def add(j: Any, d_q: Array) -> Array:
            cell = _GpuCell(setting, refs, i, j, held=held)
            d_products = cell.gradients()[2]
            return d_q + dot(d_products.astype(q.dtype), cell.read("k"), ROW_BY_COLUMN)

        start = jnp.zeros((setting.block, width), jnp.float32)
        d_q = jax.lax.fori_loop(*of_queries.key_blocks(), add, start)
        refs["d_q"][0, 0] = d_q.astype(setting.result_type(q))

    grid = (q_length // setting.block, heads, rows)
    return _call(body, setting, grid, arrays | mask_arrays(mask), {"d_q": (q.shape, setting.result_type(q))})[0]


def _key_value_gradients(
    setting: KernelSetting, arrays: dict[str, Array | None], mask: KernelMask
) -> tuple[Array, Array]:
    """Return the gradients of keys and values; arguments as in `FlashKernels.gradients`."""
    q, k = _array(arrays, "q"), _array(arrays, "k")
    rows, kv_heads, kv_length, width = k.shape
    repeats = q.shape[1] // kv_heads

    def body(refs: dict[str, Any]) -> None:
        j = pl.program_id(0)
        of_keys = _GpuCell(setting, refs, 0, j)
        held, limits = of_keys.hold("k", "v", "kv_codes"), of_keys.query_blocks()

        def add_head(head: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
            def add(i: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
                d_k, d_v = state
                cell = _GpuCell(setting, refs, i, j, head=head, held=held)
                weights, _, d_products = cell.gradients()
                d_k = d_k + dot(d_products.astype(q.dtype), cell.read("q"), COLUMN_BY_COLUMN)
                return d_k, d_v + dot(weights.astype(q.dtype), cell.read("d_out"), COLUMN_BY_COLUMN)

            return jax.lax.fori_loop(*limits, add, state)

        start = (jnp.zeros((setting.block, width), jnp.float32),) * 2
        d_k, d_v = add_head(0, start) if repeats == 1 else jax.lax.fori_loop(0, repeats, add_head, start)
        refs["d_k"][0, 0] = d_k.astype(setting.result_type(k))
        refs["d_v"][0, 0] = d_v.astype(setting.result_type(k))

    outputs = {name: (k.shape, setting.result_type(k)) for name in ("d_k", "d_v")}
    grid = (kv_length // setting.block, kv_heads, rows)
    d_k, d_v = _call(body, setting, grid, arrays | mask_arrays(mask), outputs, q_heads=repeats)
    return d_k, d_v


def _distance_gradient(setting: KernelSetting, arrays: dict[str, Array | None], mask: KernelMask) -> Array:
    """Return the gradient of the distances [H, Q + K]; arguments as in `FlashKernels.gradients`."""
    q, k, block = _array(arrays, "q"), _array(arrays, "k"), setting.block
    rows, heads, q_length, _ = q.shape
    q_blocks, kv_blocks = q_length // block, k.shape[2] // block
    # Rows are divided as far as few heads and short rows need to fill a GPU: each part has a result of its own.
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and (n == rows or n * heads * q_blocks >= _PROGRAMS))

    def body(refs: dict[str, Any]) -> None:
        shift = pl.program_id(0) - (q_blocks - 1)
        low, high = jnp.maximum(0, -shift), jnp.minimum(q_blocks, kv_blocks - shift)
        # The causal limit and the window depend on the distance alone: all blocks are reached, or none.
        high = jnp.where(_GpuCell(setting, refs, 0, shift).is_reached(), high, low)

        def add_row(row: Any, d_scores: Array) -> Array:
            def add(i: Any, d_scores: Array) -> Array:
                return d_scores + _GpuCell(setting, refs, i, i + shift, row=row).gradients()[1]

            return jax.lax.fori_loop(low, high, add, d_scores)

        start = jnp.zeros((block, block), jnp.float32)
        refs["d_scores"][0, 0, 0] = jax.lax.fori_loop(0, rows // parts, add_row, start)

    shape = (parts, heads, q_blocks + kv_blocks - 1, block, block)
    grid = (shape[2], heads, parts)
    outputs = {"d_scores": (shape, jnp.float32)}
    (d_scores,) = _call(body, setting, grid, arrays | mask_arrays(mask), outputs, rows=rows // parts)
    return _sum_diagonals(jnp.sum(d_scores, axis=0))


def _sum_diagonals(d_scores: Array) -> Array:
    """Return the sum over each diagonal of a row of blocks [H, n, b, b], each b to the right of the one before.

    Returns:
      [H, (n + 1) b], at (p + 1) b + d the sum of [p, r, r + d] over r, of two blocks that share a diagonal.
    """
    heads, count, block, _ = d_scores.shape
    # With its rows from the last to the first, and row r moved by r to the right, the diagonals of a block are columns.
    # Rows of length 2 b that are read as rows of length 2 b - 1 move that way.
    flat = jnp.pad(d_scores[:, :, ::-1], ((0, 0), (0, 0), (0, 0), (0, block))).reshape(heads, count, -1)
    moved = flat[:, :, : block * (2 * block - 1)].reshape(heads, count, block, 2 * block - 1)
    # Diagonal -b has no entry.
    sums = jnp.pad(jnp.sum(moved, axis=2), ((0, 0), (0, 0), (1, 0)))
    left, right = (
        jnp.pad(half, ((0, 0), more, (0, 0)))
        for half, more in ((sums[:, :, :block], (0, 1)), (sums[:, :, block:], (1, 0)))
    )
    return (left + right).reshape(heads, -1)
