"""Pallas kernels of flash attention for TPUs (Mosaic): forward, gradient of the queries, of keys and values.

One block of queries with one block of keys is in fast memory at a time (`kernels.flash_block`). T5's relative bias
depends on (key - query) alone: a block needs 2 b numbers of it and lays them out as its Toeplitz matrix by rolling row
r by r. The gradient is the sum over each diagonal, made by the inverse rolls.

Inside this module the distances are in blocks, [H, n, 1, b] with n = Q / b + K / b, so that entry i of the joined row
belongs to distance i - Q.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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
from t5x_like.kernels.online_softmax import HIDDEN

LANES = 128
"""Width of a tile of fast memory."""
SUBLANES = 8
"""Height of a tile of 32-bit numbers."""


class TpuKernels(FlashKernels):
    """Kernels for TPUs."""

    def block_size(self, q_length: int, kv_length: int, width: int, dtype: Any) -> int:
        return block_size(q_length, kv_length)

    def forward(
        self, setting: KernelSetting, q: Array, k: Array, v: Array, distances: Array | None, mask: KernelMask
    ) -> tuple[Array, Array, Array]:
        return _forward(setting, q, k, v, _in_blocks(setting, distances), mask)

    def gradients(self, setting: KernelSetting, arrays: dict[str, Array | None], mask: KernelMask) -> KernelGradients:
        arrays = arrays | {"distances": _in_blocks(setting, arrays["distances"])}
        d_q, d_distances = _query_gradient(setting, arrays, mask)
        d_k, d_v = _key_value_gradients(setting, arrays, mask)
        if d_distances is not None:
            d_distances = jnp.sum(d_distances, axis=(0, 3)).reshape(d_distances.shape[1], -1)
        return KernelGradients(d_q, d_k, d_v, d_distances)


def block_size(q_length: int, kv_length: int) -> int:
    """Return the size of the blocks of queries and keys with the least padding; the largest of several."""
    return min((512, 256, 128), key=lambda block: (-(-q_length // block) * -(-kv_length // block)) * block**2)


def _in_blocks(setting: KernelSetting, distances: Array | None) -> Array | None:
    return None if distances is None else distances.reshape(distances.shape[0], -1, 1, setting.block)


def _as_column(row: Array) -> Array:
    """Return [1, b] as [b, 1]. Transposes are of whole tiles."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _as_row(column: Array) -> Array:
    """Return [b, 1] as [1, b]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def _toeplitz(row: Array, block: int) -> Array:
    """Return T[r, c] = row[b + c - r] of a row [1, 2 b]."""
    tall = jnp.broadcast_to(row, (block, 2 * block))
    return pltpu.roll(tall, 0, 1, stride=1, stride_axis=0)[:, block:]


def _diagonal_sums(x: Array) -> Array:
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


class _TpuCell(Cell):
    """Blocks that the grid has moved to fast memory."""

    def read(self, name: str) -> Array:
        return self.refs[name][0, 0]

    def column(self, name: str) -> Array:
        return _as_column(self.refs[name][0] if name == "q_codes" else self.refs[name][0, 0])

    def kv_codes(self) -> Array:
        return jnp.broadcast_to(self.refs["kv_codes"][0], (self.setting.block,) * 2)

    def first_distances(self) -> Array:
        """Return the number of the first of the two blocks of distances that this block needs."""
        return self.j - self.i + self.refs["q_blocks"] - 1

    def bias(self) -> Array:
        first = self.first_distances()
        row = jnp.concatenate([self.refs["distances"][0, first], self.refs["distances"][0, first + 1]], axis=1)
        return _toeplitz(row, self.setting.block)


def _call(
    body: Callable[..., None],
    setting: KernelSetting,
    grid: tuple[int, ...],
    cell: Callable[..., tuple[Any, Any, Any, Any]],
    arrays: dict[str, Array | None],
    outputs: dict[str, jax.ShapeDtypeStruct],
    scratch: list[Any],
    sequential: int,
) -> list[Array]:
    """Run a kernel over a grid.

    Args:
      body: Function of the references by name and the numbers (i, j) of the blocks.
      setting: Static part.
      grid: Its last `sequential` axes run in order.
      cell: Function from the grid's indices to (row, query head, block of queries, block of keys).
      arrays: Inputs by name; None: the kernel has no such input.
      outputs: Shapes of the results by name.
      scratch: Fast memory that lives over the grid.
      sequential: Number of axes that add to the same results.
    """
    inputs = {name: x for name, x in arrays.items() if x is not None}
    repeats = inputs["q"].shape[1] // inputs["k"].shape[1]
    block = setting.block

    def kv_head(head: Any) -> Any:
        # Not `//`, whose rounding of negative numbers asks for the device's kind, which compiling ahead of time lacks.
        return jax.lax.div(head, jnp.int32(repeats))

    def spec(name: str, x: Any) -> pl.BlockSpec:
        width = x.shape[-1]
        match name:
            case "window" | "offset":
                return pl.BlockSpec(memory_space=pltpu.SMEM)
            case "q" | "d_out" | "out" | "d_q":
                return pl.BlockSpec((1, 1, block, width), lambda *at: (*cell(*at)[:3], 0))
            case "k" | "v" | "d_k" | "d_v":
                return pl.BlockSpec(
                    (1, 1, block, width), lambda *at: (cell(*at)[0], kv_head(cell(*at)[1]), cell(*at)[3], 0)
                )
            case "maximum" | "log_total" | "delta":
                return pl.BlockSpec((1, 1, 1, block), lambda *at: (*cell(*at)[:2], 0, cell(*at)[2]))
            case "q_codes" | "kv_codes":
                of = 2 if name == "q_codes" else 3
                rows = x.shape[0]
                return pl.BlockSpec((1, 1, block), lambda *at: (cell(*at)[0] if rows > 1 else 0, 0, cell(*at)[of]))
            case "distances":
                return pl.BlockSpec((1, *x.shape[1:]), lambda *at: (cell(*at)[1], 0, 0, 0))
            case "d_distances":
                return pl.BlockSpec((1, 1, *x.shape[2:]), lambda *at: (*cell(*at)[:2], 0, 0, 0))
            case _:
                raise AssertionError(f"unknown array {name!r}")

    names = [*inputs, *outputs]

    def kernel(*refs: Any) -> None:
        at = [pl.program_id(axis) for axis in range(len(grid))]
        by_name = dict(zip(names, refs, strict=False)) | {"q_blocks": inputs["q"].shape[2] // block}
        _, _, i, j = cell(*at)
        # All axes that run in order count as one.
        body(_TpuCell(setting, by_name, i, j), by_name, refs[len(names) :], at[len(grid) - sequential :])

    semantics: Any = ("parallel",) * (len(grid) - sequential) + ("arbitrary",) * sequential
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[spec(name, x) for name, x in inputs.items()],
        out_specs=[spec(name, x) for name, x in outputs.items()],
        out_shape=list(outputs.values()),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=setting.interpret,
    )(*inputs.values())


def _is_first(at: list[Any]) -> Array:
    return functools.reduce(jnp.logical_and, [index == 0 for index in at])


def _is_last(at: list[Any], sizes: tuple[int, ...]) -> Array:
    return functools.reduce(jnp.logical_and, [index == size - 1 for index, size in zip(at, sizes, strict=True)])


def _forward(
    setting: KernelSetting, q: Array, k: Array, v: Array, distances: Array | None, mask: KernelMask
) -> tuple[Array, Array, Array]:
    """Return the output [B, H, Q, x], and float32 [B, H, 1, Q]: the largest score of each query and the logarithm of
    its sum of exponentials."""
    rows, heads, q_length, width = q.shape
    grid = (rows, heads, q_length // setting.block, k.shape[2] // setting.block)

    def body(cell: _TpuCell, refs: dict[str, Any], scratch: Any, at: list[Any]) -> None:
        out, maximum, total = scratch

        @pl.when(_is_first(at))
        def start() -> None:
            out[...] = jnp.zeros_like(out)
            maximum[...] = jnp.full_like(maximum, HIDDEN)
            total[...] = jnp.zeros_like(total)

        @pl.when(cell.is_reached())
        def add() -> None:
            scores, _, _ = cell.scores()
            step = softmax_step(scores, maximum[...], total[...])
            maximum[...], total[...] = step.maximum, step.total
            added = dot(step.weights.astype(v.dtype), cell.read("v"), ROW_BY_COLUMN)
            out[...] = out[...] * step.decay[:, :1] + added

        @pl.when(_is_last(at, grid[3:]))
        def finish() -> None:
            safe = positive_total(total[:, :1])
            refs["out"][0, 0] = (out[...] / safe).astype(setting.result_type(q))
            refs["maximum"][0, 0] = _as_row(maximum[:, :1])
            refs["log_total"][0, 0] = _as_row(maximum[:, :1] + jnp.log(safe))

    statistic = jax.ShapeDtypeStruct((rows, heads, 1, q_length), jnp.float32)
    outputs = {
        "out": jax.ShapeDtypeStruct(q.shape, setting.result_type(q)),
        "maximum": statistic,
        "log_total": statistic,
    }
    columns = pltpu.VMEM((setting.block, LANES), jnp.float32)
    scratch = [pltpu.VMEM((setting.block, width), jnp.float32), columns, columns]
    arrays = {"q": q, "k": k, "v": v, "distances": distances, **mask_arrays(mask)}
    out, maximum, log_total = _call(body, setting, grid, lambda b, h, i, j: (b, h, i, j), arrays, outputs, scratch, 1)
    return out, maximum, log_total


def _query_gradient(
    setting: KernelSetting, arrays: dict[str, Array | None], mask: KernelMask
) -> tuple[Array, Array | None]:
    """Return the gradients of the queries, [B, H, Q, x], and of the distances, float32 [B, H, n, 8, b] to be
    summed over rows and the next to last axis, or None without them.

    Args:
      setting: Static part.
      arrays: q, k, v, distances (or None), d_out, log_total and delta.
      mask: Arrays of the mask.
    """
    q, k, distances = arrays["q"], arrays["k"], arrays["distances"]
    assert q is not None and k is not None
    rows, heads, q_length, width = q.shape
    grid = (rows, heads, q_length // setting.block, k.shape[2] // setting.block)

    def body(cell: _TpuCell, refs: dict[str, Any], scratch: Any, at: list[Any]) -> None:
        (d_q,) = scratch

        @pl.when(at[1] == 0)
        def start_queries() -> None:
            d_q[...] = jnp.zeros_like(d_q)

        if distances is not None:

            @pl.when(_is_first(at))
            def start() -> None:
                refs["d_distances"][...] = jnp.zeros_like(refs["d_distances"])

        @pl.when(cell.is_reached())
        def add() -> None:
            _, d_scores, d_products = cell.gradients()
            d_q[...] += dot(d_products.astype(q.dtype), cell.read("k"), ROW_BY_COLUMN)
            if distances is not None:
                sums, first = _diagonal_sums(d_scores), cell.first_distances()
                refs["d_distances"][0, 0, first] += sums[:, : setting.block]
                refs["d_distances"][0, 0, first + 1] += sums[:, setting.block :]

        @pl.when(at[1] == grid[3] - 1)
        def finish() -> None:
            refs["d_q"][0, 0] = d_q[...].astype(setting.result_type(q))

    outputs = {"d_q": jax.ShapeDtypeStruct(q.shape, setting.result_type(q))}
    if distances is not None:
        shape = (rows, heads, distances.shape[1], SUBLANES, setting.block)
        outputs["d_distances"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    scratch = [pltpu.VMEM((setting.block, width), jnp.float32)]
    # Blocks of queries run in order as well, because all of them add to the gradient of the distances.
    results = _call(
        body, setting, grid, lambda b, h, i, j: (b, h, i, j), arrays | mask_arrays(mask), outputs, scratch, 2
    )
    return results[0], results[1] if distances is not None else None


def _key_value_gradients(
    setting: KernelSetting, arrays: dict[str, Array | None], mask: KernelMask
) -> tuple[Array, Array]:
    """Return the gradients of keys and values, [B, G, K, x]; arguments as in `_query_gradient`."""
    q, k = arrays["q"], arrays["k"]
    assert q is not None and k is not None
    repeats, q_blocks = q.shape[1] // k.shape[1], q.shape[2] // setting.block
    # For each block of keys all query heads of the key head, and all their blocks of queries.
    grid = (k.shape[0], k.shape[1], k.shape[2] // setting.block, repeats, q_blocks)

    def body(cell: _TpuCell, refs: dict[str, Any], scratch: Any, at: list[Any]) -> None:
        d_k, d_v = scratch

        @pl.when(_is_first(at))
        def start() -> None:
            d_k[...] = jnp.zeros_like(d_k)
            d_v[...] = jnp.zeros_like(d_v)

        @pl.when(cell.is_reached())
        def add() -> None:
            weights, _, d_products = cell.gradients()
            d_k[...] += dot(d_products.astype(q.dtype), cell.read("q"), COLUMN_BY_COLUMN)
            d_v[...] += dot(weights.astype(q.dtype), cell.read("d_out"), COLUMN_BY_COLUMN)

        @pl.when(_is_last(at, grid[3:]))
        def finish() -> None:
            refs["d_k"][0, 0] = d_k[...].astype(setting.result_type(k))
            refs["d_v"][0, 0] = d_v[...].astype(setting.result_type(k))

    outputs = {name: jax.ShapeDtypeStruct(k.shape, setting.result_type(k)) for name in ("d_k", "d_v")}
    scratch = [pltpu.VMEM((setting.block, k.shape[3]), jnp.float32)] * 2
    d_k, d_v = _call(
        body,
        setting,
        grid,
        lambda b, g, j, r, i: (b, g * repeats + r, i, j),
        arrays | mask_arrays(mask),
        outputs,
        scratch,
        2,
    )
    return d_k, d_v
