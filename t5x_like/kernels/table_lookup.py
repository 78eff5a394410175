"""Lookup of rows of a table that is split over devices, without the whole table on any of them.

With FSDP the columns of a token table are split over the devices that also split the tokens. A device needs whole rows
of its own tokens. The table is gathered in chunks of rows, of which each device keeps what its tokens look up; the
gradient is added up chunk by chunk in the same way, and each chunk is reduced to the columns that the device stores.
So no more memory is needed than for the rows that were looked up, whatever the size of the vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

CHUNK_BYTES = 64 * 2**20
"""Bytes of a chunk of the table in float32, unless the rows that were looked up take more: then as many as they do."""


class LookupSharding(NamedTuple):
    """Mesh axes that split the arrays of a lookup; () for a dimension that is whole on every device.

    Attributes:
      mesh: The mesh.
      batch: Axes of the rows of the ids.
      length: Axes of their length.
      rows: Axes of the rows of the table. They split no ids.
      columns: Axes of its columns.
      scattered: Axes of `rows` by which the length of the result is split in addition.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    length: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    scattered: tuple[str, ...]

    @property
    def of_ids(self) -> PartitionSpec:
        return PartitionSpec(self.batch or None, self.length or None)

    @property
    def of_table(self) -> PartitionSpec:
        return PartitionSpec(self.rows or None, self.columns or None)

    @property
    def of_result(self) -> PartitionSpec:
        return PartitionSpec(self.batch or None, (*self.length, *self.scattered) or None, None)

    @property
    def of_tokens(self) -> tuple[str, ...]:
        return (*self.batch, *self.length)


class _Lookup(NamedTuple):
    """Constants of a lookup: shape and type of the table, type of the result, placement, bytes of a chunk."""

    shape: tuple[int, ...]
    table_dtype: jnp.dtype
    dtype: jnp.dtype
    sharding: LookupSharding | None
    chunk_bytes: int


def lookup(
    table_VxD: Array,
    ids_BxL: Array,
    dtype: jnp.dtype,
    sharding: LookupSharding | None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Array:
    """Return the rows of a table, [B, L, D] in `dtype`. Ids beyond the table take its first or last row.

    The gradients of a row are added up in float32 and have the type of the table.

    Args:
      table_VxD: float [V, D].
      ids_BxL: int [B, L].
      dtype: Type of the result, in which parts of the table are gathered.
      sharding: Placement of the arrays; None: the table is whole.
      chunk_bytes: See `CHUNK_BYTES`.
    """
    constants = _Lookup(table_VxD.shape, table_VxD.dtype, jnp.dtype(dtype), sharding, chunk_bytes)
    return _lookup(constants, table_VxD, ids_BxL)


def chunk_rows(rows: int, columns: int, tokens: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Return the number of rows of a table that are gathered at once.

    Args:
      rows: Rows of the table on a device.
      columns: Columns of the whole table.
      tokens: Tokens of a device.
      chunk_bytes: See `CHUNK_BYTES`.
    """
    most = max(tokens, chunk_bytes // (4 * columns), 1)
    return math.ceil(rows / math.ceil(rows / most))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(constants: _Lookup, table: Array, ids: Array) -> Array:
    sharding = constants.sharding
    if sharding is None:
        return jnp.take(table, ids, axis=0, mode="clip").astype(constants.dtype)
    return jax.shard_map(
        functools.partial(_rows_on_device, constants, sharding),
        mesh=sharding.mesh,
        in_specs=(sharding.of_table, sharding.of_ids),
        out_specs=sharding.of_result,
        check_vma=False,
    )(table, ids)


def _forward(constants: _Lookup, table: Array, ids: Array) -> tuple[Array, Array]:
    return _lookup(constants, table, ids), ids


def _backward(constants: _Lookup, ids: Array, cotangent: Array) -> tuple[Array, np.ndarray]:
    sharding = constants.sharding
    if sharding is None:
        rows = jnp.clip(ids, 0, constants.shape[0] - 1)
        gradient = jnp.zeros(constants.shape, jnp.float32).at[rows].add(cotangent.astype(jnp.float32))
    else:
        gradient = jax.shard_map(
            functools.partial(_gradient_on_device, constants, sharding),
            mesh=sharding.mesh,
            in_specs=(sharding.of_ids, sharding.of_result),
            out_specs=sharding.of_table,
            check_vma=False,
        )(ids, cotangent)
    return gradient.astype(constants.table_dtype), np.zeros(ids.shape, jax.dtypes.float0)


_lookup.defvjp(_forward, _backward)


class _Chunk(NamedTuple):
    """Chunk of the rows of a table on a device.

    Attributes:
      start: First row of the chunk.
      size: Number of rows.
      rows: int32 [rows, length], the row of each id within the chunk; any other row if `is_inside` is False.
      is_inside: bool [rows, length], whether the id is looked up in this chunk.
    """

    start: Array
    size: int
    rows: Array
    is_inside: Array


def _over_chunks(
    constants: _Lookup, sharding: LookupSharding, ids: Array, add: Callable[[_Chunk, Array], Array], zeros: Array
) -> Array:
    """Return the result of `add` for all chunks of the rows of a device, one after the other."""
    vocabulary, columns = constants.shape
    count = vocabulary // math.prod(sharding.mesh.shape[axis] for axis in sharding.rows)
    own = jnp.clip(ids, 0, vocabulary - 1) - (count * jax.lax.axis_index(sharding.rows) if sharding.rows else 0)
    size = chunk_rows(count, columns, ids.size, constants.chunk_bytes)

    def step(index: Any, total: Array) -> Array:
        begin = index * size
        # The last chunk begins earlier, so that it is as long; it takes none of the rows of the one before.
        start = jnp.minimum(begin, count - size)
        is_inside = (own >= begin) & (own < jnp.minimum(begin + size, count))
        return add(_Chunk(start, size, jnp.where(is_inside, own - start, 0), is_inside), total)

    return jax.lax.fori_loop(0, math.ceil(count / size), step, zeros)


def _gathered(sharding: LookupSharding) -> list[str]:
    """Return the axes over which the columns are gathered before the lookup: those that split the tokens. Over the
    others all devices have the same tokens, so that the rows are gathered after it, which are fewer."""
    return [axis for axis in sharding.columns if axis in sharding.of_tokens]


def _rows_on_device(constants: _Lookup, sharding: LookupSharding, table: Array, ids: Array) -> Array:
    gathered = _gathered(sharding)
    sizes = [sharding.mesh.shape[axis] for axis in gathered]

    def add(chunk: _Chunk, total: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(table, chunk.start, chunk.size).astype(constants.dtype)
        for axis in reversed(gathered):
            part = jax.lax.all_gather(part, axis, axis=1)
        rows = jnp.take(part, chunk.rows, axis=0, mode="clip")
        return jnp.where(jnp.expand_dims(chunk.is_inside, range(2, rows.ndim)), rows, total)

    zeros = jnp.zeros((*ids.shape, *sizes, table.shape[1]), constants.dtype)
    x = _over_chunks(constants, sharding, ids, add, zeros)
    # One device has the row of a token, and the others have zeros: the sums are exact.
    if sharding.scattered:
        x = jax.lax.psum_scatter(x, sharding.scattered, scatter_dimension=1, tiled=True)
    if summed := [axis for axis in sharding.rows if axis not in sharding.scattered]:
        x = jax.lax.psum(x, summed)
    for place, axis in enumerate(sharding.columns):
        if axis not in gathered:
            x = jax.lax.all_gather(x, axis, axis=2 + place)
    return x.reshape(*x.shape[:2], constants.shape[1])


def _gradient_on_device(constants: _Lookup, sharding: LookupSharding, ids: Array, cotangent: Array) -> Array:
    """Return the gradient of this device's part of the table: the steps of `_rows_on_device` backwards."""
    gathered = _gathered(sharding)
    sizes = [sharding.mesh.shape[axis] for axis in sharding.columns]
    x = cotangent.reshape(*cotangent.shape[:2], *sizes, constants.shape[1] // math.prod(sizes))
    for place, axis in reversed(list(enumerate(sharding.columns))):
        if axis not in gathered:
            x = jax.lax.dynamic_index_in_dim(x, jax.lax.axis_index(axis), axis=2 + place, keepdims=False)
    if sharding.scattered:
        x = jax.lax.all_gather(x, sharding.scattered, axis=1, tiled=True)

    def add(chunk: _Chunk, total: Array) -> Array:
        own = jnp.where(jnp.expand_dims(chunk.is_inside, range(2, x.ndim)), x, 0).astype(jnp.float32)
        part = jnp.zeros((chunk.size, *x.shape[2:]), jnp.float32).at[chunk.rows].add(own)
        for axis in gathered:
            part = jax.lax.psum_scatter(part, axis, scatter_dimension=1)
        before = jax.lax.dynamic_slice_in_dim(total, chunk.start, chunk.size)
        return jax.lax.dynamic_update_slice_in_dim(total, before + part, chunk.start, axis=0)

    count = constants.shape[0] // math.prod(sharding.mesh.shape[axis] for axis in sharding.rows)
    gradient = _over_chunks(constants, sharding, ids, add, jnp.zeros((count, x.shape[-1]), jnp.float32))
    summed = [axis for axis in sharding.of_tokens if axis not in gathered]
    return jax.lax.psum(gradient, summed) if summed else gradient
