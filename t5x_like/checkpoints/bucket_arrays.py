"""Arrays of a checkpoint in an object store, written and read by TensorStore as zarr3 chunks with checksums.

Each process writes the shards that it holds, and no chunk contains parts of two shards, so no process reads or waits
for what another one writes. The checksum (crc32c) of a chunk is made by its writer and verified by TensorStore whenever
the chunk is read. The description of the arrays (zarr3's metadata) is part of the commit record, not an object of its
own. Orbax is not used here: it needs a file system with renames and cannot be pointed at another server.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore

from t5x_like.checkpoints.replica_broadcast import (
    first_replica_indices,
    from_first_replica,
    from_parts,
    index_key,
)
from t5x_like.faults import FaultError, fault_of
from t5x_like.storage import locations
from t5x_like.storage.locations import Url

CHUNK_BYTES = 2**26
"""Maximum size of a chunk, which is one object."""
_IN_FLIGHT_BYTES = 2**31
"""Maximum size of the arrays that a process reads or encodes at once."""

Metadata = dict[str, Any]
Index = tuple[slice, ...]
Piece = tuple[str, Index, np.ndarray]
"""Path of an array, and a shard of it with its place."""
Parts = dict[str, dict[Any, np.ndarray]]
"""Parts of arrays by path and by `index_key` of their place."""


def describe(leaves: Mapping[str, Any]) -> dict[str, Metadata]:
    """Return zarr3's metadata of each array by path. It is the same in all processes."""
    return {path: _metadata(leaf) for path, leaf in leaves.items()}


def _metadata(leaf: Any) -> Metadata:
    shard = leaf.sharding.shard_shape(leaf.shape)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(leaf.shape),
        "data_type": str(leaf.dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": _chunk(shard, leaf.dtype.itemsize)}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": False if leaf.dtype == np.bool_ else 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }


def _chunk(shard: tuple[int, ...], itemsize: int) -> list[int]:
    """Return the shape of a chunk: a shard, divided into equal parts until a part has at most `CHUNK_BYTES`."""
    # A dimension of length 0 has chunks of length 1, as zarr3 demands.
    chunk = [max(length, 1) for length in shard]
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        divisors = [(dim, _smallest_divisor(length)) for dim, length in enumerate(chunk) if length > 1]
        dim, divisor = min(divisors, key=lambda pair: (pair[1], pair[0]))
        chunk[dim] //= divisor
    return chunk


def _smallest_divisor(number: int) -> int:
    return next((divisor for divisor in range(2, math.isqrt(number) + 1) if number % divisor == 0), number)


def copy_own_shards(leaves: Mapping[str, Any]) -> list[Piece]:
    """Return copies, on the host, of the shards that this process writes; the arrays may be donated afterwards."""
    # Of the devices that hold the same shard, one is the first.
    shards = [
        (path, shard) for path, leaf in leaves.items() for shard in leaf.addressable_shards if not shard.replica_id
    ]
    for _, shard in shards:
        shard.data.copy_to_host_async()
    # On CPUs a NumPy array may be a view of the memory that is donated.
    return [(path, shard.index, np.array(shard.data)) for path, shard in shards]


def write(url: Url, described: Mapping[str, Metadata], pieces: Iterable[Piece]) -> None:
    """Write shards below `url`, and return when they are stored.

    Raises:
      UserError: the object store reports an error; a `FaultError` is one after which a restart resumes.
    """

    def begin(piece: Piece) -> tuple[int, Callable[[], object]]:
        path, index, data = piece
        array = _open(url, path, described[path])
        future = array[index].write(data, can_reference_source_data_indefinitely=True)
        return data.nbytes, lambda: locations.result(url / path, lambda: future)

    for finish in _windowed(pieces, begin):
        finish()


def read(
    url: Url,
    described: Mapping[str, Metadata],
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    *,
    is_broadcast: bool = False,
) -> tuple[Parts, list[str]]:
    """Read what this process's devices need, and verify it.

    Args:
      url: Where the arrays were written.
      described: Metadata of the arrays by path.
      leaves: Shapes, types and shardings of the arrays to read by path.
      is_broadcast: Read only what the first replica of each array needs, for `assemble` to send to the others.

    Returns:
      The intact parts of the arrays by path, and the problems of the damaged ones.

    Raises:
      FaultError: the object store failed.
    """
    problems: list[str] = []
    parts: Parts = {path: {} for path in leaves}

    def begin(wanted: tuple[str, Index]) -> tuple[int, Callable[[], object]]:
        path, index = wanted
        view = _open(url, path, described[path])[index]
        future = view.read()

        def finish() -> None:
            try:
                parts[path][index_key(index)] = np.asarray(locations.wait(url, future))
            except ValueError as error:
                _raise_fault(url, error)
                problems.append(f"{path}: {_reason(error)}")

        return view.size * view.dtype.numpy_dtype.itemsize, finish

    wanted = [
        (path, index)
        for path, leaf in leaves.items()
        for index in (first_replica_indices(_sharding(leaf), leaf.shape) if is_broadcast else _indices(leaf))
    ]
    for finish in _windowed(wanted, begin):
        finish()
    return parts, sorted(problems)


def assemble(
    leaves: Mapping[str, jax.ShapeDtypeStruct], parts: Parts, *, is_broadcast: bool = False
) -> dict[str, jax.Array]:
    """Return the arrays by path that `read` has read in all processes, and release their parts.

    Args:
      is_broadcast: As in `read`: each array is sent from its first replica to the others, by the devices.
    """
    if is_broadcast:
        return {
            path: from_first_replica(_sharding(leaf), leaf.shape, leaf.dtype, parts.pop(path))
            for path, leaf in leaves.items()
        }
    return {path: from_parts(_sharding(leaf), leaf.shape, parts.pop(path)) for path, leaf in leaves.items()}


def find_damage(url: Url, described: Mapping[str, Metadata]) -> list[str]:
    """Read all chunks of all arrays, one by one, and return the problems of the damaged arrays.

    Raises:
      FaultError: the object store failed.
    """
    problems: dict[str, str] = {}

    def begin(part: tuple[str, Index]) -> tuple[int, Callable[[], object]]:
        path, index = part
        view = _open(url, path, described[path])[index]
        future = view.read()

        def finish() -> None:
            try:
                locations.wait(url, future)
            except ValueError as error:
                _raise_fault(url, error)
                problems.setdefault(path, f"{path}: {_reason(error)}")

        return view.size * view.dtype.numpy_dtype.itemsize, finish

    for finish in _windowed(((path, index) for path in described for index in _chunks(described[path])), begin):
        finish()
    return [problems[path] for path in sorted(problems)]


def _chunks(metadata: Metadata) -> Iterable[Index]:
    """Yield the parts of an array that its chunks hold."""
    lengths = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    parts = [
        [slice(start, min(start + length, size)) for start in range(0, size, length)]
        for size, length in zip(metadata["shape"], lengths, strict=True)
    ]
    yield from itertools.product(*parts)


def _open(url: Url, path: str, metadata: Metadata) -> Any:
    """Open an array without a request to the object store."""
    spec = {
        "driver": "zarr3",
        "kvstore": locations.kvstore(url / path),
        "metadata": metadata,
        # A chunk that is missing is an error, so zeros are stored like other values.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
    opening = tensorstore.open(spec, context=locations.CONTEXT, open=True, assume_metadata=True)
    return locations.result(url, lambda: opening)


def _windowed(items: Iterable[Any], begin: Callable[[Any], tuple[int, Callable[[], object]]]) -> Iterable[Any]:
    """Begin each item, and yield the functions that finish them, with `_IN_FLIGHT_BYTES` begun at a time."""
    begun: collections.deque[tuple[int, Callable[[], object]]] = collections.deque()
    size = 0
    for item in items:
        begun.append(begin(item))
        size += begun[-1][0]
        while begun and size > _IN_FLIGHT_BYTES:
            done, finish = begun.popleft()
            size -= done
            yield finish
    for _, finish in begun:
        yield finish


def _sharding(leaf: jax.ShapeDtypeStruct) -> Any:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _indices(leaf: jax.ShapeDtypeStruct) -> list[Index]:
    """Return the distinct parts of an array that this process's devices need."""
    by_device = _sharding(leaf).addressable_devices_indices_map(leaf.shape)
    return list({index_key(index): index for index in by_device.values()}.values())


def _raise_fault(url: Url, error: ValueError) -> None:
    """Raise FaultError if the object store failed or refused, and the data may be intact."""
    fault = fault_of(str(error))
    if fault is not None:
        raise FaultError(f"{url}: {fault.name} ({_reason(error)})", fault) from None


def _reason(error: ValueError) -> str:
    return str(error).partition(" [")[0].splitlines()[0]
