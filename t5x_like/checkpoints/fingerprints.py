"""Fingerprints of arrays, computed on the devices that hold them: from memory to disk and back, no bit may change.

Checksums of files protect bytes from the moment when they are written. A fingerprint is taken of the arrays in the
memory of the devices when a save begins, and compared with that of the restored ones, so that it covers the copies in
between as well.

Accelerators compute it of whole arrays in one program. XLA's compiler for CPUs would write the weighted words to memory
before it adds them, so CPUs take each shard in blocks that stay in their caches, and read each byte once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.experimental import multihost_utils

from t5x_like.sharding.batch_placement import on_host
from t5x_like.sharding.host_memory import on_device

FINGERPRINTS = "fingerprints_2"
"""Entry of meta.json: the fingerprint of each array when it was saved."""
FIRST_FINGERPRINTS = "fingerprints"
"""Entry of meta.json in checkpoints of earlier versions, which are still verified by it."""
_BLOCK_WORDS = 2**14
"""Words that a CPU reads at once."""
_SMALL_WORDS = 2**16
"""Size of shards that CPUs read by NumPy, for which nothing is compiled."""
_MAX_ROW_WORDS = 2**30
"""Largest length of a row that is read in blocks: places in it are numbers of 32 bits."""

Summand = Callable[[Any, Any], Any]
"""Returns what words (uint32) at their places (uint32) add to a fingerprint. It is a permutation of the words."""


def weighted(words: Any, places: Any) -> Any:
    # An odd weight is invertible. The shifts keep two words that differ in their highest bit, or two blocks at a
    # distance of a power of two, from being exchanged without a difference.
    weights = places * np.uint32(0x9E3779B1)
    return (words ^ (words >> 15)) * (weights ^ (weights >> 16) | np.uint32(1))


def mixed(words: Any, places: Any) -> Any:
    return _mix(words ^ _mix(places + np.uint32(0x9E3779B9)))


def _mix(x: Any) -> Any:
    """Return the finalizer of MurmurHash3 (Appleby 2011), a permutation of uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


_SUMMANDS: dict[str, Summand] = {FINGERPRINTS: weighted, FIRST_FINGERPRINTS: mixed}
"""The newest first."""


class SavedFingerprints(NamedTuple):
    """Fingerprints in the record of a checkpoint.

    Attributes:
      by_path: Fingerprint of each array.
      summand: Function by which they are computed.
    """

    by_path: Mapping[str, str]
    summand: Summand


def saved_fingerprints(record: Mapping[str, Any]) -> SavedFingerprints | None:
    """Return the fingerprints in the record of a checkpoint, None if the version that wrote it had none."""
    return next((SavedFingerprints(record[key], summand) for key, summand in _SUMMANDS.items() if key in record), None)


def fingerprints(leaves: Mapping[str, jax.Array], summand: Summand = weighted) -> dict[str, str]:
    """Return the fingerprint of each array by path, in hexadecimal. All processes must call it.

    It depends on the bits, on their places and on nothing else: not on the sharding, and not on the order in which
    devices add. Arrays that differ in one element never have the same one; others have with a probability of about
    2**-31.
    """
    return begin_fingerprints(leaves, summand)()


def begin_fingerprints(leaves: Mapping[str, jax.Array], summand: Summand = weighted) -> Callable[[], dict[str, str]]:
    """Start to compute what `fingerprints` returns for the values that the arrays have now.

    Returns:
      A function that waits for the result. All processes must call both.
    """
    # One program serves all arrays that the same devices hold.
    by_devices: dict[frozenset[jax.Device], list[str]] = {}
    for path, leaf in leaves.items():
        by_devices.setdefault(frozenset(leaf.sharding.device_set), []).append(path)
    begun: list[tuple[list[str], Callable[[], npt.NDArray[np.uint32]]]] = []
    for devices, paths in by_devices.items():
        arrays = [leaves[path] for path in paths]
        if all(device.platform == "cpu" for device in devices):
            begun.append((paths, _on_cpus(arrays, summand)))
        else:
            begun.append((paths, functools.partial(on_host, fingerprints_of_whole_arrays(arrays, summand))))

    def finish() -> dict[str, str]:
        found = {path: int(value) for paths, values in begun for path, value in zip(paths, values(), strict=True)}
        return {path: f"{found[path]:08x}" for path in leaves}

    return finish


def changes(leaves: Mapping[str, jax.Array], record: Mapping[str, Any]) -> str | None:
    """Return which restored arrays differ from those that were saved; None if none do. All processes must call it.

    Args:
      leaves: The restored arrays by path.
      record: Record of the checkpoint, with the fingerprints of at least these.
    """
    saved = saved_fingerprints(record)
    if saved is None:
        return None
    found = fingerprints(leaves, saved.summand)
    changed = [path for path, value in found.items() if saved.by_path[path] != value]
    listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} others" if len(changed) > 5 else "")
    return f"found other values than were in memory when it was saved, in {listed}" if changed else None


@functools.partial(jax.jit, static_argnums=1)
def fingerprints_of_whole_arrays(leaves: list[jax.Array], summand: Summand) -> jax.Array:
    """Return the fingerprints of arrays as accelerators compute them, uint32 [N]."""
    return jnp.stack([_of_whole(leaf, summand) for leaf in on_device(leaves)])


def _on_cpus(leaves: Sequence[jax.Array], summand: Summand) -> Callable[[], npt.NDArray[np.uint32]]:
    """Start to compute the fingerprints of arrays from the shards of all processes.

    Returns:
      A function that waits for them and returns them, uint32 [N].
    """
    shares: list[list[Any]] = []
    for leaf in leaves:
        # Of the devices that hold the same shard, one is the first. NumPy sees the memory of the device.
        shards = [shard for shard in leaf.addressable_shards if not shard.replica_id]
        shares.append([_of_part(np.asarray(shard.data), shard.index, leaf.shape, summand) for shard in shards])
    is_local = all(leaf.is_fully_addressable for leaf in leaves)

    def finish() -> npt.NDArray[np.uint32]:
        sums = np.array([sum(map(int, share)) % 2**32 for share in shares], np.uint32)
        if is_local:
            return sums
        return np.asarray(multihost_utils.process_allgather(sums)).sum(axis=0, dtype=np.uint32)

    return finish


def fingerprint_of_part(
    values: np.ndarray, index: Sequence[slice], shape: Sequence[int], summand: Summand = weighted
) -> int:
    """Return what a part of an array adds to its fingerprint, computed by the CPU.

    Args:
      values: The part.
      index: Its place in the array, a slice for each dimension.
      shape: Shape of the array.
      summand: What a word adds.
    """
    return int(_of_part(values, index, shape, summand))


def _of_part(values: np.ndarray, index: Sequence[slice], shape: Sequence[int], summand: Summand) -> Any:
    """Return what `fingerprint_of_part` does; for large parts, as the result of a program that is running."""
    word_type = np.dtype(_WORD_TYPES[values.dtype.itemsize])
    words: npt.NDArray[Any] = np.ascontiguousarray(values).reshape(-1).view(word_type)
    starts, shape = [part.start or 0 for part in index], list(shape)
    if values.dtype.itemsize == 8:
        words, starts, shape = words.reshape((*values.shape, 2)), [*starts, 0], [*shape, 2]
    else:
        words = words.reshape(values.shape)
    # Rows are what the part and the array have in one piece: the last dimensions, down to the first that is divided.
    first = max(words.ndim - 1, 0)
    while first > 0 and words.shape[first] == shape[first] and math.prod(words.shape[first - 1 :]) < _MAX_ROW_WORDS:
        first -= 1
    # One dimension at least: NumPy warns of an overflow of scalars, which is meant here.
    places = np.zeros(1, np.uint32)
    for dimension, start in enumerate(starts[: first + 1]):
        length = words.shape[dimension] if dimension < first else 1
        numbers = (np.arange(length, dtype=np.uint64) + np.uint64(start)).astype(np.uint32)
        places = (places[:, None] + numbers * np.uint32(math.prod(shape[dimension + 1 :]) % 2**32)).reshape(-1)
    rows = words.reshape(len(places), math.prod(words.shape[first:]))
    if rows.size > _SMALL_WORDS:
        # Nothing is copied: the program reads the memory of the array. One device compiles for all.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return _in_blocks(rows, places, summand)
    all_places = places[:, None] + np.arange(rows.shape[1], dtype=np.uint32)
    return np.sum(summand(rows.astype(np.uint32), all_places), dtype=np.uint64) % 2**32


@functools.partial(jax.jit, static_argnums=2)
def _in_blocks(rows: Any, places: Any, summand: Summand) -> jax.Array:
    """Return the sum over words by a loop over blocks of `_BLOCK_WORDS`; uint32 [].

    Args:
      rows: Words [N, L].
      places: Place of the first word of each row, uint32 [N].
    """
    number, length = rows.shape

    def total(count: int, block: tuple[int, int], origin: Callable[[Any], tuple[Any, Any]]) -> jax.Array:
        """Return the sum over `count` blocks at their origins."""

        def add(index: Any, sums: jax.Array) -> jax.Array:
            row, column = origin(index)
            words = jax.lax.dynamic_slice(rows, (row, column), block).astype(jnp.uint32)
            first = jax.lax.dynamic_slice(places, (row,), (block[0],)) + jnp.uint32(column)
            return sums + summand(words, first[:, None] + jax.lax.broadcasted_iota(jnp.uint32, block, 1))

        return jnp.sum(jax.lax.fori_loop(0, count, add, jnp.zeros(block, jnp.uint32)), dtype=jnp.uint32)

    if length > _BLOCK_WORDS:
        columns, rest = divmod(length, _BLOCK_WORDS)
        return total(
            number * columns, (1, _BLOCK_WORDS), lambda index: (index // columns, index % columns * _BLOCK_WORDS)
        ) + total(number, (1, rest), lambda index: (index, columns * _BLOCK_WORDS))
    height = _BLOCK_WORDS // length
    blocks, rest = divmod(number, height)
    return total(blocks, (height, length), lambda index: (index * height, 0)) + total(
        1, (rest, length), lambda index: (blocks * height, 0)
    )


def fingerprint(x: jax.Array) -> jax.Array:
    """Return the fingerprint of an array within a program, on the device that runs it; uint32 []."""
    return _of_whole(x, weighted)


def _of_whole(x: jax.Array, summand: Summand) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # 64-bit types become pairs of words, in a further dimension.
    words = jax.lax.bitcast_convert_type(x, _WORD_TYPES[x.dtype.itemsize]).astype(jnp.uint32)
    places = jnp.zeros((), jnp.uint32)
    for dimension in range(words.ndim):
        stride = math.prod(words.shape[dimension + 1 :]) % 2**32
        places += jax.lax.broadcasted_iota(jnp.uint32, words.shape, dimension) * jnp.uint32(stride)
    # Integer sums are exact in any order.
    return jnp.sum(summand(words, places), dtype=jnp.uint32)


_WORD_TYPES = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
"""Type of the words that an element is read as, by its bytes."""
