"""Broadcast of arrays from their first replica to the others by the devices, for restores in which one replica reads.

An array is replicated over the axes of the mesh that its sharding does not use. Its first replica is on the devices
whose coordinates on these axes are 0. Reading a checkpoint once, and not once per slice, matters where the network
between the devices is faster than that of the storage, or where the bytes that leave the storage are paid for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Index = tuple[slice, ...]


def index_key(index: Index) -> tuple[tuple[int | None, int | None], ...]:
    """Return the place of a part of an array as a key of a dictionary."""
    return tuple((part.start, part.stop) for part in index)


def first_replica_indices(sharding: Any, shape: tuple[int, ...]) -> list[Index]:
    """Return the distinct parts of an array that devices of this process hold in its first replica; empty if this
    process has no device of that replica."""
    on_devices = sharding.addressable_devices_indices_map(shape)
    first = _first_replica(sharding)
    return list({index_key(index): index for device, index in on_devices.items() if device in first}.values())


def from_parts(sharding: Any, shape: tuple[int, ...], parts: Mapping[Any, np.ndarray]) -> jax.Array:
    """Return an array of which each process holds, by `index_key`, the parts that its devices need."""
    return jax.make_array_from_callback(shape, sharding, lambda index: parts[index_key(index or ())])


def from_first_replica(sharding: Any, shape: tuple[int, ...], dtype: Any, parts: Mapping[Any, np.ndarray]) -> jax.Array:
    """Return an array of which each process holds the parts of `first_replica_indices`. All processes must call it.

    Args:
      sharding: Sharding of the array.
      shape: Its shape.
      dtype: Its type.
      parts: The parts by `index_key`.
    """
    axes = _replica_axes(sharding)
    if not axes:
        return from_parts(sharding, shape, parts)
    number = math.prod(sharding.mesh.shape[axis] for axis in axes)
    spread = NamedSharding(sharding.mesh, PartitionSpec(axes, *sharding.spec))

    def part(index: Index | None) -> np.ndarray:
        first, *rest = index or ()
        if (first.start or 0) == 0:
            return parts[index_key(tuple(rest))][None]
        sizes = [len(range(*place.indices(size))) for place, size in zip(rest, shape, strict=True)]
        return np.zeros((1, *sizes), dtype)

    stacked = jax.make_array_from_callback((number, *shape), spread, part)
    result: jax.Array = _sum_of_bits(sharding)(stacked)
    return result


def _replica_axes(sharding: Any) -> tuple[str, ...]:
    """Return the axes of the mesh, longer than 1, over which the array is replicated."""
    if not isinstance(sharding, NamedSharding):
        return ()
    used = {axis for entry in sharding.spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
    return tuple(axis for axis, size in sharding.mesh.shape.items() if size > 1 and axis not in used)


def _first_replica(sharding: Any) -> set[Any]:
    axes = _replica_axes(sharding)
    if not isinstance(sharding, NamedSharding):
        return set(sharding.device_set)
    place = tuple(0 if axis in axes else slice(None) for axis in sharding.mesh.axis_names)
    return set(np.asarray(sharding.mesh.devices[place]).flat)


@functools.lru_cache(maxsize=256)
def _sum_of_bits(sharding: NamedSharding) -> Any:
    """Return a function that sums [replicas, ...] over its first dimension, of which all but one element are zeros."""

    def of_bits(stacked: jax.Array) -> jax.Array:
        dtype = stacked.dtype
        if dtype == jnp.bool_:
            return jnp.any(stacked, axis=0)
        # As integers: the sum of a float and 0 has other bits if the float is -0 or NaN.
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(stacked, unsigned)
        # Not all libraries of collectives have 8 and 16 bits.
        total = jnp.sum(words.astype(jnp.uint32), axis=0, dtype=jnp.uint32).astype(unsigned)
        return jax.lax.bitcast_convert_type(total, dtype)

    return jax.jit(of_bits, out_shardings=sharding)
