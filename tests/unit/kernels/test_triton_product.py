"""Grouped products by kernels for Triton: in JAX's interpreter, their tiles, and lowered for CUDA without a GPU."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import Array

from t5x_like.errors import UserError
from t5x_like.kernels.triton_product import (
    FEWEST_ROWS,
    MOST_ROWS,
    Tiles,
    refuse_old_gpus,
    tile_rows,
    tiles_of,
    triton_product,
)

# Widths that no block divides; the outputs have two blocks of columns.
ROWS, WIDTH, OUTPUTS, GROUPS = 203, 40, 136, 3
SIZES = {
    "uneven": (63, 65, 75),
    "empty groups": (0, ROWS, 0),
    "rows after the last group": (10, 0, 101),
    "no rows": (0, 0, 0),
}


@jax.jit
def product_and_gradients(x: Array, kernels: Array, d_out: Array, sizes: Array) -> tuple[Array, Array, Array]:
    out, gradients = jax.vjp(lambda x, kernels: triton_product(x, kernels, sizes, interpret=True), x, kernels)
    return out, *gradients(d_out)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_product_and_gradients_are_those_of_a_loop_over_groups(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    shapes = ((ROWS, WIDTH), (GROUPS, WIDTH, OUTPUTS), (ROWS, OUTPUTS))
    x, kernels, d_out = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    used, starts = sum(sizes), np.cumsum(sizes) - np.array(sizes)
    # What follows the last group must not reach any result.
    x[used:], d_out[used:] = np.nan, np.nan
    out, d_x, d_kernels = product_and_gradients(x, kernels, d_out, jnp.array(sizes, jnp.int32))
    for start, size, kernel, d_kernel in zip(starts, sizes, kernels, d_kernels, strict=True):
        rows = slice(start, start + size)
        np.testing.assert_allclose(out[rows], x[rows] @ kernel, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(d_x[rows], d_out[rows] @ kernel.T, rtol=1e-5, atol=5e-5)
        np.testing.assert_allclose(d_kernel, x[rows].T @ d_out[rows], rtol=1e-5, atol=5e-5)


TILED_ROWS, TILED_GROUPS = 1200, 5
ENDS = st.lists(st.integers(0, TILED_ROWS), min_size=TILED_GROUPS, max_size=TILED_GROUPS).map(sorted)


@functools.partial(jax.jit, static_argnums=1)
def tiles(sizes: Array, rows: int) -> Tiles:
    return tiles_of(sizes, rows)


@given(ENDS.map(lambda ends: np.diff([0, *ends])))
@example(np.array([TILED_ROWS, 0, 0, 0, 0]))
@example(np.array([0, 0, 1, 0, 0]))
@example(np.array([113, 128, 129, 127, 1]))
@settings(max_examples=50, deadline=None)
def test_tiles_hold_each_row_of_a_group_once_and_fewer_rows_of_no_use_than_the_smallest_tile(sizes: Any) -> None:
    possible, ends = tile_rows(TILED_ROWS, TILED_GROUPS), np.cumsum(sizes)
    assert possible == (128, 64, 32, 16)
    found: list[list[int]] = [[] for _ in sizes]
    for group, start, number, end in zip(*jax.device_get(tiles(sizes.astype(np.int32), TILED_ROWS)), strict=True):
        assert number in (0, *possible)
        if number:
            assert start < end == ends[group]
            found[group].extend(range(start, start + number))
    for multiplied, end, size in zip(found, ends, sizes, strict=True):
        assert multiplied == list(range(end - size, end - size + -(-size // possible[-1]) * possible[-1]))


@given(rows=st.integers(1, 10**6), count=st.integers(1, 512))
def test_rows_of_no_use_are_at_most_a_sixteenth_from_256_rows_per_group_on(rows: int, count: int) -> None:
    sizes = tile_rows(rows, count)
    assert FEWEST_ROWS <= sizes[-1] <= sizes[0] <= MOST_ROWS
    assert all(larger == 2 * smaller for larger, smaller in zip(sizes, sizes[1:], strict=False))
    if rows >= 256 * count:
        assert count * (sizes[-1] - 1) <= rows / 16


@pytest.mark.parametrize(
    ("rows", "shape"),
    [(8192, (8, 4096, 14336)), (32768, (128, 2048, 768)), (24, (8, 40, 136))],
    ids=["Mixtral", "128 experts", "few rows"],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_gradients_are_three_kernels_of_triton_on_cuda(rows: int, shape: tuple[int, int, int], dtype: type) -> None:
    def loss(x: Array, kernels: Array, sizes: Array) -> Array:
        return jnp.sum(jnp.square(triton_product(x, kernels, sizes).astype(jnp.float32)))

    arguments = ((rows, shape[1]), dtype), (shape, dtype), (shape[:1], jnp.int32)
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(*(jax.ShapeDtypeStruct(*argument) for argument in arguments))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r'name = "(\w+)", num_stages', text) == ["_multiply_tile", "_multiply_tile", "_multiply_group"]
    assert text.count("@__gpu$xla.gpu.triton(") == 3
    assert "stablehlo.dot_general" not in text


@pytest.mark.parametrize(
    ("capability", "is_old"), [("7.5", True), ("gfx942", True), ("8.0", False), ("9.0", False), ("12.0", False)]
)
def test_gpus_older_than_ampere_are_refused(capability: str, is_old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_old_gpus()
    device = SimpleNamespace(compute_capability=capability, device_kind="a GPU")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    if not is_old:
        refuse_old_gpus()
        return
    with pytest.raises(UserError, match=f"capability {capability}, expected an NVIDIA GPU from Ampere"):
        refuse_old_gpus()
