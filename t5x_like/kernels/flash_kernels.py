"""Pallas kernels of flash attention for TPUs (Dao et al. 2022): forward, gradient of the queries, of keys and values.

One block of queries with one block of keys is in fast memory at a time (`kernels.flash_block`). The caller looks T5's
relative bias up, one number per head and distance, and turns its gradient into that of the table.

Shapes: queries [B, H, Q, x], keys and values [B, G, K, x], statistics of queries [B, H, 1, Q], distances
[H, n, 1, b] with n = Q / b + K / b, so that entry i of the joined row belongs to distance i - Q.
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
    LANES,
    ROW_BY_COLUMN,
    SUBLANES,
    Cell,
    KernelMask,
    KernelSetting,
    as_row,
    diagonal_sums,
    dot,
)
from t5x_like.kernels.online_softmax import HIDDEN


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
      arrays: Inputs by name; those that are None are left out.
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
        body(Cell(setting, by_name, i, j), by_name, refs[len(names) :], at[len(grid) - sequential :])

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


def forward(
    setting: KernelSetting, q: Array, k: Array, v: Array, distances: Array | None, mask: KernelMask
) -> tuple[Array, Array, Array]:
    """Return the output [B, H, Q, x], and float32 [B, H, 1, Q]: the largest score of each query and the logarithm of
    its sum of exponentials."""
    rows, heads, q_length, width = q.shape
    grid = (rows, heads, q_length // setting.block, k.shape[2] // setting.block)

    def body(cell: Cell, refs: dict[str, Any], scratch: Any, at: list[Any]) -> None:
        out, maximum, total = scratch

        @pl.when(_is_first(at))
        def start() -> None:
            out[...] = jnp.zeros_like(out)
            # Finite, so that a block of queries that no key reaches has finite results.
            maximum[...] = jnp.full_like(maximum, HIDDEN)
            total[...] = jnp.zeros_like(total)

        @pl.when(cell.is_reached())
        def add() -> None:
            scores, _, _ = cell.scores()
            old = maximum[...]
            new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
            weights, decay = jnp.exp(scores - new[:, :1]), jnp.exp(old - new)
            maximum[...] = new
            total[...] = total[...] * decay + jnp.sum(weights, axis=1, keepdims=True)
            added = dot(weights.astype(v.dtype), refs["v"][0, 0], ROW_BY_COLUMN)
            out[...] = out[...] * decay[:, :1] + added

        @pl.when(_is_last(at, grid[3:]))
        def finish() -> None:
            # 1 for a block of queries that no key reaches.
            safe = jnp.where(total[:, :1] == 0.0, 1.0, total[:, :1])
            refs["out"][0, 0] = (out[...] / safe).astype(setting.result_type(q))
            refs["maximum"][0, 0] = as_row(maximum[:, :1])
            refs["log_total"][0, 0] = as_row(maximum[:, :1] + jnp.log(safe))

    statistic = jax.ShapeDtypeStruct((rows, heads, 1, q_length), jnp.float32)
    outputs = {
        "out": jax.ShapeDtypeStruct(q.shape, setting.result_type(q)),
        "maximum": statistic,
        "log_total": statistic,
    }
    columns = pltpu.VMEM((setting.block, LANES), jnp.float32)
    scratch = [pltpu.VMEM((setting.block, width), jnp.float32), columns, columns]
    arrays = {"q": q, "k": k, "v": v, "distances": distances, **_mask_arrays(mask)}
    out, maximum, log_total = _call(body, setting, grid, lambda b, h, i, j: (b, h, i, j), arrays, outputs, scratch, 1)
    return out, maximum, log_total


def _mask_arrays(mask: KernelMask) -> dict[str, Array | None]:
    return {"q_codes": mask.q_codes, "kv_codes": mask.kv_codes, "window": mask.window, "offset": mask.offset}


def query_gradient(
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

    def body(cell: Cell, refs: dict[str, Any], scratch: Any, at: list[Any]) -> None:
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
            d_q[...] += dot(d_products.astype(q.dtype), refs["k"][0, 0], ROW_BY_COLUMN)
            if distances is not None:
                sums, first = diagonal_sums(d_scores), cell.first_distances()
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
        body, setting, grid, lambda b, h, i, j: (b, h, i, j), arrays | _mask_arrays(mask), outputs, scratch, 2
    )
    return results[0], results[1] if distances is not None else None


def key_value_gradients(
    setting: KernelSetting, arrays: dict[str, Array | None], mask: KernelMask
) -> tuple[Array, Array]:
    """Return the gradients of keys and values, [B, G, K, x]; arguments as in `query_gradient`."""
    q, k = arrays["q"], arrays["k"]
    assert q is not None and k is not None
    repeats, q_blocks = q.shape[1] // k.shape[1], q.shape[2] // setting.block
    # For each block of keys all query heads of the key head, and all their blocks of queries.
    grid = (k.shape[0], k.shape[1], k.shape[2] // setting.block, repeats, q_blocks)

    def body(cell: Cell, refs: dict[str, Any], scratch: Any, at: list[Any]) -> None:
        d_k, d_v = scratch

        @pl.when(_is_first(at))
        def start() -> None:
            d_k[...] = jnp.zeros_like(d_k)
            d_v[...] = jnp.zeros_like(d_v)

        @pl.when(cell.is_reached())
        def add() -> None:
            weights, _, d_products = cell.gradients()
            d_k[...] += dot(d_products.astype(q.dtype), refs["q"][0, 0], COLUMN_BY_COLUMN)
            d_v[...] += dot(weights.astype(q.dtype), refs["d_out"][0, 0], COLUMN_BY_COLUMN)

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
        arrays | _mask_arrays(mask),
        outputs,
        scratch,
        2,
    )
    return d_k, d_v
