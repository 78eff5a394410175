"""Arrays of a token store: sharded zarr3 arrays of one dimension, written, verified and read through TensorStore."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore

from t5x_like.config.data import DataConfig
from t5x_like.data.store.store_format import array_metadata, check_array
from t5x_like.errors import DataError, UserError
from t5x_like.faults import FaultError, fault_of
from t5x_like.hardware import cpu_allocator
from t5x_like.storage import locations
from t5x_like.storage.locations import Location

SHARD_TOKENS = 2**24
"""Number of elements of a file."""
CHUNK_TOKENS = 2**14
"""Number of elements that are read, and verified, together: one request to an object store, once the index of the file
(16 bytes for each chunk) is in the cache."""
_METADATA = "zarr.json"
_LARGE_BYTES = 2**26
"""Size of a shard after whose write free memory is returned."""


def _spec(path: Location) -> dict[str, Any]:
    # Chunks of zeros are written, and a chunk that is missing is an error: TensorStore would read zeros in its place.
    return {
        "driver": "zarr3",
        "kvstore": locations.kvstore(path),
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def _create(path: Location, dtype: str) -> Any:
    metadata = array_metadata(dtype, 0, shard_tokens=SHARD_TOKENS, chunk_tokens=CHUNK_TOKENS)
    spec = {**_spec(path), "metadata": metadata}
    with _os_errors():
        return locations.wait(path, tensorstore.open(spec, create=True, context=locations.CONTEXT))


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Raise OSError in place of the ValueError by which TensorStore reports every error of the file system."""
    try:
        yield
    except ValueError as error:
        known = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
        number = next((number for number in known if os.strerror(number) in str(error)), errno.EIO)
        raise OSError(number, str(error)) from None


class ArrayWriter:
    """Appends to a one-dimensional array in complete zarr shards, since rewriting a part of a shard is expensive.

    At most one shard is held in memory, in a buffer that is filled again after each write.
    """

    def __init__(self, path: Location, dtype: str):
        self._path = path
        self._array = _create(path, dtype)
        self._dtype = np.dtype(dtype)
        self._shard: npt.NDArray[Any] | None = None
        self._pending_size = 0
        self.size = 0
        self.digest = hashlib.blake2b(digest_size=16)

    def append(self, values: npt.NDArray[Any]) -> None:
        while len(values):
            if self._shard is None:
                # Pages that are never filled take no memory.
                self._shard = np.empty(SHARD_TOKENS, self._dtype)
            taken = values[: SHARD_TOKENS - self._pending_size]
            self._shard[self._pending_size : self._pending_size + len(taken)] = taken
            self._pending_size += len(taken)
            values = values[len(taken) :]
            if self._pending_size == SHARD_TOKENS:
                self._write_pending()

    def _write_pending(self) -> None:
        assert self._shard is not None
        shard = self._shard[: self._pending_size]
        stop = self.size + len(shard)
        with _os_errors():
            # The final length is not known before, so the array grows with each write.
            self._array = locations.wait(self._path, self._array.resize(exclusive_max=[stop]))
            locations.wait(self._path, self._array[self.size : stop].write(shard))
        self.digest.update(shard.data)
        if shard.nbytes >= _LARGE_BYTES:
            # TensorStore copies a shard in its threads, whose arenas would keep more of it with each shard.
            cpu_allocator.return_free_pages()
        self.size, self._pending_size = stop, 0

    def close(self) -> None:
        if self._pending_size:
            self._write_pending()
        self._shard = None

    def record(self) -> ArrayRecord:
        """Return what a reader of the closed array compares with."""
        metadata = locations.read_bytes(self._path / _METADATA) or b""
        return ArrayRecord(self.size, self._dtype.name, _sha256(metadata), self.digest.hexdigest())


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """Record of an array in a store's info.json.

    Attributes:
      size: Number of elements.
      dtype: Their NumPy type.
      metadata: SHA-256 of zarr.json.
      content: blake2b, of 16 bytes, of the elements.
    """

    size: int
    dtype: str
    metadata: str
    content: str

    @property
    def num_bytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """Resources of the reads of an array.

    Attributes:
      request_concurrency: Maximum number of simultaneous requests to an object store.
      cache_bytes: Maximum size of the chunks, and of the indices of files, that are kept in memory.
    """

    request_concurrency: int = 32
    cache_bytes: int = 0

    @staticmethod
    def of(data: DataConfig) -> ReadOptions:
        """Return the resources that a configuration gives to the reads of rows."""
        return ReadOptions(data.store_request_concurrency, data.store_cache_bytes)

    def context(self) -> Any:
        """Return a TensorStore context of its own with these limits."""
        limit = {"limit": self.request_concurrency}
        spec = {
            "cache_pool": {"total_bytes_limit": self.cache_bytes},
            "gcs_request_concurrency": limit,
            "s3_request_concurrency": limit,
        }
        return tensorstore.Context(spec, parent=locations.CONTEXT)


DEFAULT_READS = ReadOptions()


def open_array(path: Location, record: ArrayRecord, options: ReadOptions = DEFAULT_READS) -> Any:
    """Open an array for reading, after a comparison with its record that allocates nothing of the array's size.

    Raises:
      DataError: zarr.json is not the one that was written, or files of the array are missing or too short.
    """
    try:
        metadata = locations.read_bytes(path / _METADATA)
    except OSError as error:
        raise damaged(path / _METADATA, f"unreadable ({error.strerror})") from None
    if metadata is None or _sha256(metadata) != record.metadata:
        found = "no" if metadata is None else "another"
        raise damaged(path, f"found {found} {_METADATA}, expected the one that `prepare` wrote")
    check_array(metadata, record.dtype, record.size, str(path / _METADATA))
    # A missing file would otherwise be noticed only when a row of it is read, hours into a run.
    missing, num_bytes = [], 0
    names = {name: path / "c" / name for name in map(str, range(-(-record.size // SHARD_TOKENS)))}
    present = set(locations.children(path / "c"))
    for name, file in names.items():
        if name not in present:
            missing.append(name)
        elif isinstance(file, Path):
            num_bytes += file.stat().st_size
    if missing:
        raise damaged(path / "c", f"{len(missing)} of {len(names)} files are missing: {', '.join(missing[:5])}")
    if isinstance(path, Path) and num_bytes < record.num_bytes:
        raise damaged(path / "c", f"found {num_bytes:,} bytes, expected {record.num_bytes:,} or more")
    try:
        # A committed array does not change. By default each use of a cached index is a request whether it is current.
        spec = {"recheck_cached_data": False, **_spec(path)}
        return locations.wait(path, tensorstore.open(spec, context=options.context(), read=True))
    except ValueError as error:
        raise _unreadable(path, error) from None


def read(array: Any, path: Location) -> npt.NDArray[Any]:
    return result_of(array.read(), path)


def result_of(read: Any, path: Location) -> npt.NDArray[Any]:
    """Return the elements of a read that was begun.

    Raises:
      FaultError: the storage failed or refuses access.
      DataError: the array is damaged.
    """
    try:
        return locations.wait(path, read)
    except (ValueError, concurrent.futures.CancelledError) as error:
        raise _unreadable(path, error) from None


def damaged(path: Location, problem: str) -> DataError:
    """Return the error for a damaged part of a store."""
    return DataError(
        f"{path}: {problem}; restore the store from a copy, or delete it and run `t5x-like prepare RECIPE`"
    )


def _unreadable(path: Location, error: BaseException) -> UserError:
    """Return the error for a failed read: a fault of the storage, or else a damaged store."""
    fault = fault_of(str(error))
    if fault is None:
        return damaged(path, f"unreadable ({error})")
    advice = "a restart resumes" if fault.restart else "check the permissions and the machine"
    return FaultError(f"{path}: {fault.name} ({error}); {advice}", fault)


def find_damage(path: Location, record: ArrayRecord) -> list[str]:
    """Read a whole array, one file at a time, and return its problems; none if its content is what was written."""
    try:
        array = open_array(path, record)
    except DataError as error:
        return [str(error)]
    problems = []
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, record.size, SHARD_TOKENS):
        try:
            digest.update(np.ascontiguousarray(read(array[start : min(start + SHARD_TOKENS, record.size)], path)).data)
        except DataError as error:
            problems.append(str(error))
    if not problems and digest.hexdigest() != record.content:
        problems.append(str(damaged(path, "the elements are not those that were written")))
    return problems


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
