"""Lookup of rows of a table that is split over devices, without the whole table on any of them.

With FSDP the devices that split the tokens also split the columns of the token table. Instead of the table, which may
be larger than all activations of a step, the token ids travel: each device looks up its columns for the tokens of all
devices, and sends each of them its tokens (an all-to-all). The gradient returns the same way and is added up where the
columns are stored, so that it needs no reduction over these devices and is never whole either.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec


class LookupSharding(NamedTuple):
    """Mesh axes that split the arrays of a lookup; () for a dimension that is whole on every device.

    Attributes:
      mesh: The mesh.
      batch: Axes of the rows of the ids.
      length: Axes of their length.
      rows: Axes of the rows of the table.
      columns: Axes of its columns.
      scattered: Axes of `rows` that split no ids and by which the length of the result is split in addition.
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
    def exchanged(self) -> tuple[str, ...]:
        """Axes that split both the ids and the table."""
        return tuple(axis for axis in (*self.rows, *self.columns) if axis in (*self.batch, *self.length))


class _Lookup(NamedTuple):
    """Constants of a lookup: shape and type of the table, type of the result, placement."""

    shape: tuple[int, ...]
    table_dtype: jnp.dtype
    dtype: jnp.dtype
    sharding: LookupSharding | None


def lookup(table_VxD: Array, ids_BxL: Array, dtype: jnp.dtype, sharding: LookupSharding | None) -> Array:
    """Return the rows of a table, [B, L, D] in `dtype`. Ids beyond the table take its last row.

    The gradients of a row are added up in float32 and have the type of the table.

    Args:
      table_VxD: float [V, D].
      ids_BxL: int [B, L].
      dtype: Type of the result, in which it and its gradient travel between devices.
      sharding: Placement of the arrays; None: the table is whole.
    """
    return _lookup(_Lookup(table_VxD.shape, table_VxD.dtype, jnp.dtype(dtype), sharding), table_VxD, ids_BxL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(constants: _Lookup, table: Array, ids: Array) -> Array:
    sharding = constants.sharding
    if sharding is None:
        return _take(table, ids).astype(constants.dtype)
    local = functools.partial(_rows_on_device, sharding, constants.dtype)
    in_specs = (sharding.of_table, sharding.of_ids)
    return jax.shard_map(local, mesh=sharding.mesh, in_specs=in_specs, out_specs=sharding.of_result, check_vma=False)(
        table, ids
    )


def _forward(constants: _Lookup, table: Array, ids: Array) -> tuple[Array, Array]:
    return _lookup(constants, table, ids), ids


def _backward(constants: _Lookup, ids: Array, cotangent: Array) -> tuple[Array, np.ndarray]:
    sharding = constants.sharding
    if sharding is None:
        gradient = _added(constants.shape, ids, cotangent)
    else:
        sizes = [_size(sharding.mesh, axes) for axes in (sharding.rows, sharding.columns)]
        shape = tuple(dim // size for dim, size in zip(constants.shape, sizes, strict=True))
        local = functools.partial(_gradient_on_device, sharding, shape)
        in_specs = (sharding.of_ids, sharding.of_result)
        gradient = jax.shard_map(
            local, mesh=sharding.mesh, in_specs=in_specs, out_specs=sharding.of_table, check_vma=False
        )(ids, cotangent)
    return gradient.astype(constants.table_dtype), np.zeros(ids.shape, jax.dtypes.float0)


_lookup.defvjp(_forward, _backward)


def _take(table: Array, ids: Array) -> Array:
    return jnp.take(table, ids, axis=0, mode="clip")


def _added(shape: tuple[int, ...], ids: Array, cotangent: Array) -> Array:
    """Return zeros, float32, with the cotangents [..., D] of ids [...] added to their rows."""
    ids = jnp.minimum(ids, shape[0] - 1)
    return jnp.zeros(shape, jnp.float32).at[ids].add(cotangent.astype(jnp.float32), mode="drop")


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))


def _of_all_devices(sharding: LookupSharding, ids: Array) -> Array:
    """Return the ids of all devices along the exchanged axes, [n, ..., rows, length] with a dimension for each axis."""
    for axis in reversed(sharding.exchanged):
        ids = jax.lax.all_gather(ids, axis)
    return ids


def _own_rows(sharding: LookupSharding, ids: Array, count: int) -> tuple[Array, Array]:
    """Return the ids as numbers of the `count` rows on this device, and which of them it has."""
    last = count * _size(sharding.mesh, sharding.rows) - 1
    ids = jnp.clip(ids, 0, last) - count * jax.lax.axis_index(sharding.rows)
    return ids, (ids >= 0) & (ids < count)


def _rows_on_device(sharding: LookupSharding, dtype: jnp.dtype, table: Array, ids: Array) -> Array:
    ids = _of_all_devices(sharding, ids)
    if sharding.rows:
        own, is_own = _own_rows(sharding, ids, table.shape[0])
        x = jnp.where(is_own[..., None], _take(table, own), 0).astype(dtype)
    else:
        x = _take(table, ids).astype(dtype)
    # Exactly one device has a row, so that these sums are exact.
    for axis in sharding.rows:
        if axis in sharding.exchanged:
            dim = sharding.exchanged.index(axis)
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
        elif axis not in sharding.scattered:
            x = jax.lax.psum(x, axis)
    if sharding.scattered:
        x = jax.lax.psum_scatter(x, sharding.scattered, scatter_dimension=x.ndim - 2, tiled=True)
    # Columns are joined from the innermost axis to the outermost, so that they are contiguous after each axis.
    for axis in reversed(sharding.columns):
        if axis in sharding.exchanged:
            dim = sharding.exchanged.index(axis)
            x = jax.lax.all_to_all(x, axis, split_axis=dim, concat_axis=x.ndim - 1, tiled=True)
        else:
            x = jax.lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True)
    return x.reshape(x.shape[len(sharding.exchanged) :])


def _gradient_on_device(sharding: LookupSharding, shape: tuple[int, ...], ids: Array, cotangent: Array) -> Array:
    """Return the gradient of this device's part of the table, `shape`: the steps of `_rows_on_device` backwards."""
    x = cotangent.reshape(*(1,) * len(sharding.exchanged), *cotangent.shape)
    for axis in sharding.columns:
        if axis in sharding.exchanged:
            dim = sharding.exchanged.index(axis)
            x = jax.lax.all_to_all(x, axis, split_axis=x.ndim - 1, concat_axis=dim, tiled=True)
        else:
            size = x.shape[-1] // sharding.mesh.shape[axis]
            x = jax.lax.dynamic_slice_in_dim(x, size * jax.lax.axis_index(axis), size, axis=x.ndim - 1)
    if sharding.scattered:
        x = jax.lax.all_gather(x, sharding.scattered, axis=x.ndim - 2, tiled=True)
    for axis in sharding.rows:
        if axis in sharding.exchanged:
            x = jax.lax.all_gather(x, axis, axis=sharding.exchanged.index(axis), tiled=True)
    ids = _of_all_devices(sharding, ids)
    if sharding.rows:
        own, is_own = _own_rows(sharding, ids, shape[0])
        ids, x = jnp.where(is_own, own, 0), jnp.where(is_own[..., None], x, 0)
    gradient = _added(shape, ids, x)
    summed = tuple(axis for axis in (*sharding.batch, *sharding.length) if axis not in sharding.exchanged)
    return jax.lax.psum(gradient, summed) if summed else gradient
