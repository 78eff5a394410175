"""Products of sorted rows with the kernels of their groups on NVIDIA GPUs, by Pallas kernels for Triton (grouped GEMM).

Groups are cut into tiles of rows as on CPUs (`kernels.tiled_product`): largest tiles, and at most one of each smaller
size, so that only the last tile of a group has rows of no use. XLA computes a table of the tiles. Its length holds for
any sizes of groups, and programs of the grid without a tile return at once. Tensor cores multiply 16 rows or more, so
that groups of few rows have up to 15 rows of no use each.

JAX has nothing that does this without a build of its own: `jax.lax.ragged_dot` multiplies all rows with the kernels of
all groups, its lowering to Triton is not in the wheels (jax-ml/jax#40888), and the grouped products of
`jax.experimental.pallas.ops.gpu` are for Hopper or Blackwell alone. tokamax 0.0.12 pins a version of typeguard that
tyro, which this package needs, excludes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from t5x_like.errors import UserError
from t5x_like.kernels.tiled_product import tile_sizes

FEWEST_ROWS, MOST_ROWS = 16, 128
"""Rows of the smallest and the largest tile. Triton's products have 16 rows or more."""
_COLUMNS = 128
"""Columns of a tile of the results."""
_DEPTH_BYTES = 64
"""Bytes of the summed dimension that are loaded at a time from each row."""
_TOGETHER = 8
"""Tiles of rows that run side by side for each block of columns, so that caches serve both operands."""
# Four stages of two blocks of 128 times 64 bytes are 64 KiB of shared memory; GPUs since Ampere have 99 KiB or more.
_COMPILER = plgpu.CompilerParams(num_warps=4, num_stages=4)
_AMPERE = 8.0


def refuse_old_gpus() -> None:
    """Check that the GPUs of this process, if programs run on them by default, have kernels of Triton.

    Raises:
      UserError: a GPU is older than Ampere or not one of NVIDIA.
    """
    if jax.default_backend() != "gpu":
        return
    device = jax.local_devices()[0]
    capability = str(device.compute_capability)
    # NVIDIA's are numbers such as 9.0; AMD's are names such as gfx942.
    if not capability.replace(".", "").isdigit() or float(capability) < _AMPERE:
        raise UserError(
            f"experts: found the device {device.device_kind!r} with compute capability {capability}, expected an "
            "NVIDIA GPU from Ampere (8.0) on, for which the products of experts are written; use such a GPU, a TPU or "
            "a CPU"
        )


def tile_rows(rows: int, groups: int) -> tuple[int, ...]:
    """Return the numbers of rows of the tiles, the largest one first: powers of two between the limits of a GPU."""
    sizes = tile_sizes(rows, groups)
    size, smallest = (min(max(limit, FEWEST_ROWS), MOST_ROWS) for limit in (sizes[0], sizes[-1]))
    found = [size]
    while found[-1] > smallest:
        found.append(found[-1] // 2)
    return tuple(found)


class Tiles(NamedTuple):
    """Tiles of rows, int32 [T] each: their group, their first row, their number of rows (0: no tile) and the end of
    their group."""

    group: Array
    start: Array
    rows: Array
    end: Array


def tiles_of(sizes_E: Array, rows: int) -> Tiles:
    """Return the tiles of groups of these sizes, as many for any sizes; `rows` is the number of all rows."""
    groups = sizes_E.shape[0]
    largest, *smaller = tile_rows(rows, groups)
    smallest = (largest, *smaller)[-1]
    ends_E = jnp.cumsum(sizes_E)
    starts_E = ends_E - sizes_E
    rounded_E = (sizes_E + smallest - 1) // smallest * smallest
    full_E = rounded_E // largest
    # Rounding adds less than the smallest tile to each group.
    number = jnp.arange((rows + groups * (smallest - 1)) // largest)
    last_E = jnp.cumsum(full_E)
    of_number = jnp.searchsorted(last_E, number, side="right")
    group = jnp.minimum(of_number, groups - 1)
    start = starts_E[group] + (number - (last_E - full_E)[group]) * largest
    parts = [(group, start, jnp.where(of_number < groups, largest, 0))]
    start_E = starts_E + full_E * largest
    for size in smaller:
        # The binary digits of what is left say which of the smaller tiles a group needs.
        rows_E = rounded_E & size
        parts.append((jnp.arange(groups), start_E, rows_E))
        start_E = start_E + rows_E
    group, start, tile = (jnp.concatenate(each).astype(jnp.int32) for each in zip(*parts, strict=True))
    return Tiles(group, start, tile, ends_E[group].astype(jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def triton_product(x_Nxd: Array, kernels_Exdxf: Array, sizes_E: Array, interpret: bool = False) -> Array:
    """Return the product [N, f] of each row with the kernel of its group; undefined for rows after the last group.

    Args:
      x_Nxd: Rows, those of the first group first.
      kernels_Exdxf: Kernels in the type of the rows.
      sizes_E: int32, number of rows of each group.
      interpret: Run the kernels on another platform than a GPU, for tests.
    """
    return _product(x_Nxd, kernels_Exdxf, sizes_E, contracted=0, interpret=interpret)


def _forward(x: Array, kernels: Array, sizes: Array, interpret: bool) -> tuple[Array, tuple[Array, Array, Array]]:
    return _product(x, kernels, sizes, contracted=0, interpret=interpret), (x, kernels, sizes)


def _backward(interpret: bool, residuals: tuple[Array, Array, Array], d_out: Array) -> tuple[Array, Array, None]:
    x, kernels, sizes = residuals
    d_x = _product(d_out, kernels, sizes, contracted=1, interpret=interpret)
    return d_x, _kernel_gradient(x, d_out, sizes, kernels.dtype, interpret=interpret), None


triton_product.defvjp(_forward, _backward)


def _product(x: Array, kernels: Array, sizes: Array, *, contracted: int, interpret: bool) -> Array:
    """Return the product of each row with the kernel of its group, of which the dimension `contracted` is summed."""
    outputs = kernels.shape[2 - contracted]
    columns = _block(outputs)
    tiles = tiles_of(sizes, x.shape[0])
    # Programs without a tile fill the last ones that run together.
    table = jnp.pad(jnp.stack(tiles), ((0, 0), (0, -tiles.rows.shape[0] % _TOGETHER)))
    body = functools.partial(
        _multiply_tile,
        tile_rows=tile_rows(x.shape[0], sizes.shape[0]),
        columns=columns,
        depth=_DEPTH_BYTES // x.dtype.itemsize,
        contracted=contracted,
    )
    return pl.pallas_call(
        body,
        # The first index changes fastest.
        grid=(_TOGETHER, pl.cdiv(outputs, columns), table.shape[1] // _TOGETHER),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], outputs), x.dtype),
        compiler_params=_COMPILER,
        interpret=interpret,
    )(table, x, kernels)


def _multiply_tile(
    table: Any, x: Any, kernels: Any, out: Any, *, tile_rows: tuple[int, ...], columns: int, depth: int, contracted: int
) -> None:
    tile = pl.program_id(2) * _TOGETHER + pl.program_id(0)
    group, start, size, end = (table[field, tile] for field in range(len(Tiles._fields)))
    inputs = x.shape[1]
    column = _axis(pl.program_id(1) * columns, columns, out.shape[1])

    def multiply(rows: int) -> None:
        row = start + jnp.arange(rows)
        # A tile can go beyond the last row, and its rows of the next group are not stored.
        source = Axis(jnp.minimum(row, x.shape[0] - 1), None)

        def step(number: Any, total: Array) -> Array:
            inner = _axis(number * depth, depth, inputs)
            # Both are stored with the last dimension contiguous, whichever of them is summed.
            kernel = _load(kernels, column, inner, group) if contracted else _load(kernels, inner, column, group)
            return total + plgpu.dot(_load(x, source, inner), kernel, trans_b=contracted == 1)

        total = jnp.zeros((rows, columns), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(inputs, depth), step, total)
        _store(out, total, Axis(row, row < end), column)

    for rows in tile_rows:
        pl.when(size == rows)(functools.partial(multiply, rows))


def _kernel_gradient(x: Array, d_out: Array, sizes: Array, dtype: Any, *, interpret: bool) -> Array:
    """Return the gradient of the kernels [E, d, f]: the product of x and d_out over the rows of each group."""
    shape = (sizes.shape[0], x.shape[1], d_out.shape[1])
    blocks = (_block(shape[1]), _block(shape[2]))
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    return pl.pallas_call(
        functools.partial(_multiply_group, blocks=blocks, depth=_DEPTH_BYTES // x.dtype.itemsize),
        grid=(pl.cdiv(shape[1], blocks[0]), pl.cdiv(shape[2], blocks[1]), shape[0]),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        compiler_params=_COMPILER,
        interpret=interpret,
    )(jnp.stack([ends - sizes, ends]), x, d_out)


def _multiply_group(bounds: Any, x: Any, d_out: Any, out: Any, *, blocks: tuple[int, int], depth: int) -> None:
    group = pl.program_id(2)
    start, end = bounds[0, group], bounds[1, group]
    inputs = _axis(pl.program_id(0) * blocks[0], blocks[0], x.shape[1])
    outputs = _axis(pl.program_id(1) * blocks[1], blocks[1], d_out.shape[1])

    def multiply(rows: Axis) -> Array:
        return plgpu.dot(_load(x, rows, inputs), _load(d_out, rows, outputs), trans_a=True)

    def whole(number: Any, total: Array) -> Array:
        return total + multiply(Axis(start + number * depth + jnp.arange(depth), None))

    # `lax.div` and not `//`, which would add code for negative numbers.
    full = jax.lax.div(end - start, jnp.int32(depth))
    total = jax.lax.fori_loop(0, full, whole, jnp.zeros(blocks, jnp.float32))
    rest = start + full * depth

    def partial(number: Any, total: Array) -> Array:
        row = rest + number * FEWEST_ROWS + jnp.arange(FEWEST_ROWS)
        return total + multiply(Axis(row, row < end))

    parts = jax.lax.div(end - rest + FEWEST_ROWS - 1, jnp.int32(FEWEST_ROWS))
    total = jax.lax.fori_loop(0, parts, partial, total)
    _store(out, total, inputs, outputs, group)


class Axis(NamedTuple):
    """Indices [n] of a dimension, and bool [n] which of them exist; None: all of them."""

    indices: Array
    valid: Array | None


def _axis(start: Any, count: int, size: int) -> Axis:
    indices = start + jnp.arange(count)
    return Axis(indices, None if size % count == 0 else indices < size)


def _block(size: int) -> int:
    """Return the number of columns of a block: a power of two, since Triton has no other shapes."""
    return min(_COLUMNS, max(FEWEST_ROWS, pl.next_power_of_2(size)))


def _load(ref: Any, rows: Axis, columns: Axis, *leading: Any) -> Array:
    mask = _mask(rows, columns)
    place = ref.at[(*leading, rows.indices[:, None], columns.indices[None, :])]
    return plgpu.load(place, mask=mask, other=None if mask is None else 0)


def _store(ref: Any, value: Array, rows: Axis, columns: Axis, *leading: Any) -> None:
    place = ref.at[(*leading, rows.indices[:, None], columns.indices[None, :])]
    plgpu.store(place, value.astype(ref.dtype), mask=_mask(rows, columns))


def _mask(rows: Axis, columns: Axis) -> Array | None:
    by_row = None if rows.valid is None else rows.valid[:, None]
    by_column = None if columns.valid is None else columns.valid[None, :]
    if by_row is None or by_column is None:
        return by_row if by_column is None else by_column
    return by_row & by_column
