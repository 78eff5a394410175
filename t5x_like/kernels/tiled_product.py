"""Products of sorted rows with the kernels of their groups on CPUs, a tile of rows of one group at a time.

A group is cut into tiles of the largest size and at most one of each smaller size, so that only its last tile can have
rows of no use: fewer than the smallest size. Sizes are powers of two and follow from the mean number of rows per group,
of which the smallest is at most a sixteenth. The loops run as often as the groups need, so that the multiplied rows
exceed the groups' by at most 1 / 16 for any sizes.

XLA's ragged product on CPUs multiplies all rows with the kernels of all groups and masks the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

_HALVINGS = 4
"""Number of times that the largest tile is halved."""
_UNKNOWN_MEAN = 8
"""Mean number of rows per group if an exported program does not know the number of rows."""

Carry = TypeVar("Carry")


def tile_sizes(rows: int, groups: int) -> tuple[int, ...]:
    """Return the sizes of tiles, the largest one first: powers of two, of which the first is at most the mean."""
    mean = max(1, rows // groups) if isinstance(rows, int) else _UNKNOWN_MEAN
    largest = mean.bit_length() - 1
    return tuple(2**power for power in range(largest, max(0, largest - _HALVINGS) - 1, -1))


@jax.custom_vjp
def tiled_product(x_Nxd: Array, kernels_Exdxf: Array, sizes_E: Array) -> Array:
    """Return the product [N, f] of each row with the kernel of its group; undefined for rows after the last group."""
    return _product(x_Nxd, kernels_Exdxf, sizes_E, contracted=0)


def _forward(x: Array, kernels: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _product(x, kernels, sizes, contracted=0), (x, kernels, sizes)


def _backward(residuals: tuple[Array, Array, Array], d_out: Array) -> tuple[Array, Array, None]:
    x, kernels, sizes = residuals
    d_x = _product(d_out, kernels, sizes, contracted=1)
    return d_x, _kernel_gradient(x, d_out, sizes).astype(kernels.dtype), None


tiled_product.defvjp(_forward, _backward)


def _product(x: Array, kernels: Array, sizes: Array, *, contracted: int) -> Array:
    """Return the product of each row with the kernel of its group, of which the dimension `contracted` is summed."""
    count, tiles = x.shape[0], tile_sizes(x.shape[0], kernels.shape[0])
    # The last tile can begin at the last row.
    x = jnp.pad(x, ((0, tiles[0]), (0, 0)))
    starts = jnp.cumsum(sizes) - sizes

    def group(number: Array, out: Array) -> Array:
        kernel = jax.lax.dynamic_index_in_dim(kernels, number, keepdims=False)

        def tile(out: Array, start: Array, rows: int) -> Array:
            # Rows of the next groups are overwritten by these, which come later.
            product = _multiply(_rows(x, start, rows), kernel, ((1,), (contracted,)))
            return jax.lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), start, 0)

        return _over_tiles(starts[number], sizes[number], tiles, tile, out)

    out = jnp.zeros((x.shape[0], kernels.shape[2 - contracted]), x.dtype)
    return _over_groups(sizes, group, out)[:count]


def _kernel_gradient(x: Array, d_out: Array, sizes: Array) -> Array:
    """Return the gradient of the kernels, float32 [E, d, f]: the product of x and d_out over the rows of each group."""
    tiles = tile_sizes(x.shape[0], sizes.shape[0])
    x, d_out = (jnp.pad(rows, ((0, tiles[0]), (0, 0))) for rows in (x, d_out))
    ends = jnp.cumsum(sizes)

    def group(number: Array, gradient: Array) -> Array:
        def tile(total: Array, start: Array, rows: int) -> Array:
            own = (start + jnp.arange(rows) < ends[number])[:, None]
            # Both are masked: a product of 0 with a value of another group that is not finite would not be 0.
            inputs, outputs = (jnp.where(own, _rows(each, start, rows), 0) for each in (x, d_out))
            return total + _multiply(inputs, outputs, ((0,), (0,)))

        total = jnp.zeros(gradient.shape[1:], gradient.dtype)
        total = _over_tiles(ends[number] - sizes[number], sizes[number], tiles, tile, total)
        return jax.lax.dynamic_update_index_in_dim(gradient, total, number, 0)

    return _over_groups(sizes, group, jnp.zeros((sizes.shape[0], x.shape[1], d_out.shape[1]), jnp.float32))


def _multiply(rows: Array, kernel: Array, contracted: tuple[tuple[int], tuple[int]]) -> Array:
    return jax.lax.dot_general(rows, kernel, (contracted, ((), ())), preferred_element_type=jnp.float32)


def _rows(x: Array, start: Array, count: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, count)


def _over_groups(sizes: Array, group: Callable[[Array, Carry], Carry], carry: Carry) -> Carry:
    """Return the carry after the function of each group that has rows, in their order."""

    def one(number: Array, carry: Carry) -> Carry:
        # A condition and not a loop of no tiles, so that kernels of groups without rows are not read.
        return jax.lax.cond(sizes[number] > 0, lambda carry: group(number, carry), lambda carry: carry, carry)

    return jax.lax.fori_loop(0, sizes.shape[0], one, carry)


def _over_tiles(
    start: Array, size: Array, tiles: tuple[int, ...], step: Callable[[Carry, Array, int], Carry], carry: Carry
) -> Carry:
    """Return the carry after `step(carry, first row, number of rows)` of each tile of a group, in their order."""
    largest, smallest = tiles[0], tiles[-1]
    rounded = (size + smallest - 1) // smallest * smallest
    full = rounded // largest

    def tile(carry: Carry, start: Array, *, rows: int) -> Carry:
        return step(carry, start, rows)

    carry = jax.lax.fori_loop(0, full, lambda number, carry: step(carry, start + number * largest, largest), carry)
    start = start + full * largest
    # The binary digits of what is left say which of the smaller tiles it needs.
    for rows in tiles[1:]:
        needed = rounded & rows != 0
        carry = jax.lax.cond(needed, functools.partial(tile, rows=rows), lambda carry, start: carry, carry, start)
        start = start + jnp.where(needed, rows, 0)
    return carry
