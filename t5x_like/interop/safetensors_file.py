"""The safetensors format: eight bytes with the header's length, a JSON header, and the tensors in order.

It is implemented here and not imported, because it is a hundred lines and because everything in a file is checked
before it is used: a header may be very long, its offsets may lie outside the file, a download may be incomplete.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from t5x_like.errors import DataError
from t5x_like.utils.json_reader import parse_json

MAX_HEADER_BYTES = 100_000_000
"""Largest header, as in the format's own library."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Type, shape and location of a tensor; `begin` is the offset from the start of the file in bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """Open file. Tensors are mapped into memory and not read, so that unused ones cost nothing."""

    def __init__(self, path: Path):
        """Open a file.

        Raises:
          DataError: the file is missing, truncated or malformed; the message names it.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self.tensors = _read_header(path, file, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor, read-only."""
        stored = self.tensors[name]
        if not stored.size:
            return np.zeros(stored.shape, stored.dtype)
        return np.memmap(self.path, stored.dtype, mode="r", offset=stored.begin, shape=stored.shape or (1,)).reshape(
            stored.shape
        )


def refuse_lfs_pointer(path: Path) -> None:
    """Raise DataError if the file is a Git LFS pointer to the real one."""
    if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: found a Git LFS pointer instead of the file: fetch it with `git lfs pull`")


def _read_header(path: Path, file: Any, size: int) -> dict[str, Stored]:
    refuse_lfs_pointer(path)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise DataError(f"{path}: not a safetensors file, or truncated: {size} bytes with a header of {length} bytes")
    if length > MAX_HEADER_BYTES:
        raise DataError(f"{path}: a header of {length} bytes, expected {MAX_HEADER_BYTES} at most")
    try:
        header = parse_json(file.read(length), object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise DataError(f"{path}: the header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise DataError(f"{path}: the header is a JSON {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    found = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: (item[1].begin, item[1].size)):
        # The format allows neither gaps nor overlaps. A file with either could hide data or let two tensors share
        # bytes.
        if stored.begin != end:
            raise DataError(
                f"{path}: tensor {name!r} begins at byte {stored.begin}, expected {end}, without gap or overlap"
            )
        end = stored.begin + stored.size
        if end > size:
            raise DataError(f"{path}: truncated: tensor {name!r} ends at byte {end}, the file has {size}")
    if end != size:
        raise DataError(f"{path}: {size} bytes, expected {end}, where the last tensor ends")
    return found


def _stored(path: Path, name: str, entry: Any, start: int) -> Stored:
    if isinstance(entry, dict) and isinstance(entry.get("dtype"), str) and entry["dtype"] not in _DTYPES:
        types = ", ".join(_DTYPES)
        raise DataError(f"{path}: tensor {name!r} has the type {entry['dtype']!r}, which is not supported: {types} are")
    try:
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        natural = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        natural = False
    if not natural:
        raise DataError(
            f"{path}: tensor {name!r} is described as {str(entry)[:200]}, expected dtype, shape and offsets"
        )
    stored = Stored(dtype, shape, start + begin)
    if end - begin != stored.size:
        raise DataError(f"{path}: tensor {name!r} has {end - begin} bytes, its shape {shape} needs {stored.size}")
    return stored


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


@dataclasses.dataclass(frozen=True)
class Pending:
    """Tensor to be written; `make` is called when it is written, so that one tensor at a time is in memory."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], npt.NDArray[Any]]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, tensors: Iterable[Pending], metadata: Mapping[str, str]) -> None:
    """Write a file, tensor by tensor, and flush it to disk."""
    # Wide types first: every tensor is then aligned to its own element size.
    tensors = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for tensor in tensors:
        offsets = [begin, begin + tensor.size]
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        begin = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data begins at a multiple of 8 bytes, so that mapped tensors are aligned.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = np.asarray(tensor.make(), dtype=tensor.dtype, order="C")
            assert array.shape == tensor.shape, (tensor.name, array.shape, tensor.shape)
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def write_sharded(directory: Path, tensors: Iterable[Pending], *, max_bytes: int) -> None:
    """Write model.safetensors, or several files of at most `max_bytes` each and their index.

    A tensor that is larger than `max_bytes` has a file of its own.
    """
    shards: list[list[Pending]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(pending.size for pending in shards[-1]) + tensor.size > max_bytes:
            shards.append([])
        shards[-1].append(tensor)
    metadata = {"format": "pt"}
    if len(shards) == 1:
        write(directory / SINGLE, shards[0], metadata)
        return
    mapping: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write(directory / name, shard, metadata)
        mapping |= {tensor.name: name for tensor in shard}
    total = sum(tensor.size for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": mapping}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
