"""Products of sorted rows on CPUs, against a loop over the groups for any sizes, and the number of multiplied rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import Array

from t5x_like.kernels import tiled_product as module
from t5x_like.kernels.tiled_product import tile_sizes, tiled_product

ROWS, WIDTH, HIDDEN, GROUPS = 203, 6, 5, 3
TILES = (64, 32, 16, 8, 4)

ENDS = st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS).map(sorted)
SIZES = ENDS.map(lambda ends: tuple(np.diff([0, *ends]).tolist()))


def arrays() -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    shapes = ((ROWS, WIDTH), (GROUPS, WIDTH, HIDDEN), (ROWS, HIDDEN))
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)  # type: ignore[return-value]


@jax.jit
def product_and_gradients(x: Array, kernels: Array, d_out: Array, sizes: Array) -> tuple[Array, Array, Array]:
    out, gradients = jax.vjp(lambda x, kernels: tiled_product(x, kernels, sizes), x, kernels)
    return out, *gradients(d_out)


def loop(x: Array, kernels: Array, d_out: Array, sizes: tuple[int, ...]) -> tuple[list[Any], list[Any], list[Any]]:
    starts = np.cumsum(sizes) - np.array(sizes)
    groups = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return (
        [x[rows] @ kernel for rows, kernel in zip(groups, kernels, strict=True)],
        [d_out[rows] @ kernel.T for rows, kernel in zip(groups, kernels, strict=True)],
        [x[rows].T @ d_out[rows] for rows in groups],
    )


@given(SIZES)
@example((ROWS, 0, 0))
@example((0, 0, ROWS))
@example((0, 0, 0))
@example((63, 65, 75))
@settings(max_examples=25, deadline=None)
def test_product_and_gradients_are_those_of_a_loop_over_groups(sizes: tuple[int, ...]) -> None:
    x, kernels, d_out = (np.array(each) for each in arrays())
    used = sum(sizes)
    # What follows the last group must not reach any result.
    x[used:], d_out[used:] = np.nan, np.nan
    out, d_x, d_kernels = product_and_gradients(x, kernels, d_out, jnp.array(sizes, jnp.int32))
    expected = loop(x, kernels, d_out, sizes)
    np.testing.assert_allclose(out[:used], np.concatenate(expected[0]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_x[:used], np.concatenate(expected[1]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_kernels, np.stack(expected[2]), rtol=1e-5, atol=5e-5)


@given(SIZES)
@settings(max_examples=5, deadline=None)
def test_multiplied_rows_exceed_those_of_the_groups_by_less_than_the_smallest_tile_each(sizes: tuple[int, ...]) -> None:
    multiplied = []
    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        multiply = module._multiply
        patch.setattr(
            module, "_multiply", lambda rows, *other: (multiplied.append(len(rows)), multiply(rows, *other))[1]
        )
        tiled_product(*arrays()[:2], np.array(sizes, np.int32))
    assert set(multiplied) <= set(TILES)
    assert sum(multiplied) == sum(-(-size // TILES[-1]) * TILES[-1] for size in sizes)


@given(rows=st.integers(1, 10**6), groups=st.integers(1, 512))
def test_smallest_tile_is_at_most_a_sixteenth_of_the_mean(rows: int, groups: int) -> None:
    tiles = tile_sizes(rows, groups)
    assert tiles[0] <= max(1, rows / groups)
    assert all(larger == 2 * smaller for larger, smaller in zip(tiles, tiles[1:], strict=False))
    assert groups * (tiles[-1] - 1) <= rows / 16


def test_tiles_of_the_tests_have_rows_of_no_use() -> None:
    assert tile_sizes(ROWS, GROUPS) == TILES
