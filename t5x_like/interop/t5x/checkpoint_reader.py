"""Arrays of a T5X checkpoint, in each of the formats that T5X has written.

Legacy (T5X's `Checkpointer`, versions 2 and 3): a file `checkpoint`, which is msgpack with Flax's types. It holds the
small arrays, and for the others TensorStore's descriptions of zarr arrays in folders beside it.
Orbax: a folder `state` (or its contents) with an OCDBT database of zarr arrays, or with one folder per array.

Everything in a file is checked before it is used. Of the location that an index gives for an array, only the name of a
folder inside the checkpoint is used. TensorStore reads a missing chunk as zeros; here a missing chunk is an error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import numpy.typing as npt
import tensorstore as ts

from t5x_like.errors import DataError
from t5x_like.storage import locations
from t5x_like.utils.json_reader import parse_json

INDEX = "checkpoint"
MAX_INDEX_BYTES = 2**31
VERSIONS = (2, 3)
"""Version 2 stores bfloat16 as uint16."""
MAX_ELEMENTS = 2**48
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES: dict[str, np.dtype[Any]] = {"bfloat16": _BFLOAT16}
_DTYPES |= {name: np.dtype(name) for name in ("<f2", "<f4", "<f8", "<u2", "<i4", "<u4", "<i8", "|i1", "|u1", "|b1")}
_COMPRESSORS = (None, "gzip", "zlib", "zstd", "blosc", "bz2")
_FROM_INDEX = {name: np.dtype(name) for name in ("float16", "float32", "float64", "uint16", "int32", "uint32", "int64")}
_FROM_INDEX["bfloat16"] = _BFLOAT16
# No cache, and at most four chunks of a large array are read at once.
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_concurrency": {"limit": 4}})


@dataclasses.dataclass(frozen=True)
class Stored:
    """Description of an array. `chunks` is None for an array that is in the index itself."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] | None = None
    separator: str = "."


class Arrays(Mapping[str, Stored]):
    """Arrays of a checkpoint by path, such as `target/encoder/layers_0/mlp/wo/kernel`."""

    def __init__(self, directory: Path):
        """Read the index and the descriptions.

        Raises:
          DataError: the directory is not a T5X checkpoint, or is malformed; the message names the problem.
        """
        self.directory = directory
        self.version = VERSIONS[-1]
        self._inline: dict[str, npt.NDArray[Any]] = {}
        root = directory / "state" if (directory / "state").is_dir() else directory
        if (root / "manifest.ocdbt").is_file():
            self._kvstore: dict[str, Any] = {"driver": "ocdbt", "base": _files(root), "path": ""}
            self._list_files()
            self._names = self._array_folders()
        elif (root / INDEX).is_file() and (index := _read_index(root / INDEX)) is not None:
            self._kvstore = _files(root)
            self.version = index["version"]
            self._inline, self._names = _entries(root, index["optimizer"])
            self._list_files()
        elif any(root.glob("*/.zarray")):
            self._kvstore = _files(root)
            self._list_files()
            self._names = self._array_folders()
        else:
            raise DataError(_not_a_checkpoint(directory))
        self._stored = {path: Stored(array.shape, array.dtype) for path, array in self._inline.items()}
        for path, name in self._names.items():
            self._stored[path] = self._read_description(path, name)

    def __getitem__(self, path: str) -> Stored:
        return self._stored[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def missing_chunks(self, path: str) -> list[str]:
        """Return the files of the array that are missing.

        Call it only for arrays of an expected shape: an implausible shape can have an enormous number of files.
        """
        stored = self._stored[path]
        if stored.chunks is None:
            return []
        grid = [-(-size // chunk) for size, chunk in zip(stored.shape, stored.chunks, strict=True)]
        found = self._chunks.get(self._names[path], set())
        if math.prod(grid) > 1 + len(found):
            return [f"{self._names[path]}: {math.prod(grid)} parts expected, {len(found)} found"]
        names = (stored.separator.join(map(str, index)) or "0" for index in np.ndindex(*grid))
        return [f"{self._names[path]}/{name}" for name in names if name not in found]

    def read(self, path: str, slices: tuple[slice, ...] = ()) -> npt.NDArray[Any]:
        """Return an array, or a slice of it.

        Raises:
          DataError: the array is damaged.
        """
        if path in self._inline:
            array = self._inline[path][slices]
        else:
            store = {**self._kvstore, "path": f"{self._kvstore['path']}{self._names[path]}/"}
            try:
                opening = ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True, context=_CONTEXT)
                opened = locations.wait(self.directory, opening)
                array = locations.wait(self.directory, (opened[slices] if slices else opened).read())
            except (ValueError, OSError) as error:
                reason = str(error).splitlines()[0][:300]
                raise DataError(f"{self.directory}: {path} is damaged or truncated: {reason}") from None
        return array.view(_BFLOAT16) if self.version == 2 and array.dtype == np.uint16 else array

    def _list_files(self) -> None:
        """List all files by their folder."""
        self._chunks: dict[str, set[str]] = {}
        try:
            self._store = locations.wait(self.directory, ts.KvStore.open(self._kvstore, context=_CONTEXT))
            keys = locations.wait(self.directory, self._store.list())
        except (ValueError, OSError) as error:
            raise DataError(f"{self.directory}: cannot be read: {str(error).splitlines()[0][:300]}") from None
        for key in keys:
            folder, _, name = key.decode("utf-8", "replace").partition("/")
            if name:
                self._chunks.setdefault(folder, set()).add(name)

    def _array_folders(self) -> dict[str, str]:
        """Return the folder of each array by the array's path."""
        return {name.replace(".", "/"): name for name, files in sorted(self._chunks.items()) if ".zarray" in files}

    def _read_description(self, path: str, name: str) -> Stored:
        """Return the array's own description after checking it, because TensorStore relies on it."""
        if ".zarray" not in self._chunks.get(name, ()):
            raise DataError(f"{self.directory}: {path}: the array's folder {name!r} is missing or not a zarr array")
        text = locations.wait(self.directory, self._store.read(f"{name}/.zarray".encode())).value
        try:
            document = parse_json(text[: 2**16])
            shape, chunks = tuple(document["shape"]), tuple(document["chunks"])
            dtype, compressor = _DTYPES[document["dtype"]], document["compressor"]
            valid_shape = all(type(n) is int and 0 <= n < 2**40 for n in shape) and math.prod(shape) <= MAX_ELEMENTS
            valid_chunks = all(type(n) is int and n >= 1 for n in chunks) and len(chunks) == len(shape)
            valid_format = document["zarr_format"] == 2 and document.get("filters") is None
            valid_compressor = (None if compressor is None else compressor["id"]) in _COMPRESSORS
            separator = document.get("dimension_separator", ".")
            is_valid = valid_shape and valid_chunks and valid_format and valid_compressor and separator in (".", "/")
        except (ValueError, KeyError, TypeError):
            is_valid = False
        if not is_valid:
            shown = text[:200].decode("utf-8", "replace")
            raise DataError(f"{self.directory}: {path}: {name}/.zarray does not describe an array: {shown}")
        if any(chunk > max(size, 1) for chunk, size in zip(chunks, shape, strict=True)):
            raise DataError(f"{self.directory}: {path}: parts of shape {chunks} for an array of shape {shape}")
        return Stored(shape, dtype, chunks, separator)


def _files(root: Path) -> dict[str, Any]:
    return {"driver": "file", "path": f"{root.resolve()}/"}


def _not_a_checkpoint(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory}: {'not a directory' if directory.exists() else 'not found'}, expected a T5X checkpoint"
    inner = sorted(path.name for path in directory.glob("checkpoint_*") if path.is_dir())
    also = f"; name one of its checkpoints: {', '.join(inner[:5])}" if inner else ""
    return (
        f"{directory}: not a T5X checkpoint: neither a file {INDEX} (legacy) nor Orbax's state/manifest.ocdbt "
        f"or folders of arrays{also}"
    )


def _read_index(path: Path) -> dict[str, Any] | None:
    """Return the index, or None if it is the one that Orbax writes beside arrays in folders."""
    try:
        size = path.stat().st_size
        if size > MAX_INDEX_BYTES:
            raise DataError(f"{path}: an index of {size} bytes, expected {MAX_INDEX_BYTES} at most")
        index = msgpack.unpackb(path.read_bytes(), ext_hook=_extension, raw=False)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise DataError(
            f"{path}: not msgpack as Flax writes it, or truncated ({str(error)[:200] or type(error).__name__})"
        ) from None
    if isinstance(index, dict) and "optimizer" not in index and "target" in index:
        return None
    if not isinstance(index, dict) or not isinstance(index.get("optimizer"), dict):
        raise DataError(f"{path}: expected a map with version and optimizer, as T5X's Checkpointer writes")
    if index.get("version") not in VERSIONS or isinstance(index["version"], bool):
        raise DataError(f"{path}: version {str(index.get('version'))[:50]}, expected {' or '.join(map(str, VERSIONS))}")
    return index


def _extension(code: int, data: bytes) -> Any:
    """Decode Flax's extensions of msgpack: 1 is an array, 3 a typed number; 2, complex numbers, is not supported."""
    if code not in (1, 3):
        raise ValueError(f"the unknown msgpack type {code}")
    shape, name, buffer = msgpack.unpackb(data, raw=True)
    dtype = _FROM_INDEX.get(name.decode() if isinstance(name, bytes) else name)
    if dtype is None:
        raise ValueError(f"an array of the unknown type {str(name)[:50]}")
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(buffer):
        raise ValueError(f"an array of {len(buffer)} bytes with the shape {tuple(shape)}")
    return np.frombuffer(buffer, dtype).reshape(shape)


def _entries(root: Path, optimizer: Mapping[str, Any]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Return the arrays in the index and the folders of the others, by path."""
    inline: dict[str, npt.NDArray[Any]] = {}
    folders: dict[str, str] = {}
    todo: list[tuple[tuple[str, ...], Any]] = [((), optimizer)]
    while todo:
        keys, node = todo.pop()
        path = "/".join(keys)
        if isinstance(node, dict) and "driver" in node and "kvstore" in node:
            folders[path] = _folder(root, path, node)
        elif isinstance(node, dict):
            todo += [((*keys, str(key)), child) for key, child in node.items()]
        elif isinstance(node, np.ndarray):
            inline[path] = node
        elif isinstance(node, int | float):
            inline[path] = np.asarray(node)
        elif node is not None:
            raise DataError(f"{root / INDEX}: {path} is a {type(node).__name__}, expected an array or its location")
    return inline, folders


def _folder(root: Path, path: str, spec: Mapping[str, Any]) -> str:
    """Return the folder of an array from TensorStore's description, whose other fields are not used."""
    store = spec["kvstore"]
    drivers = (spec["driver"], store.get("driver") if isinstance(store, dict) else store)
    if drivers[0] != "zarr" or drivers[1] not in ("file", "gfile", "gcs"):
        found = f"driver {str(drivers[0])[:50]!r} in {str(drivers[1])[:50]!r}"
        raise DataError(f"{root / INDEX}: {path} has {found}, expected 'zarr' in 'file', 'gfile' or 'gcs'")
    location = store.get("path") or spec.get("path")
    name = location.removesuffix("/") if isinstance(location, str) else ""
    if not _is_plain(name) or (root / name).resolve().parent != root.resolve():
        raise DataError(
            f"{root / INDEX}: {path} has the location {str(location)[:200]!r}, expected a folder's name "
            "in the checkpoint"
        )
    return name


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\\0|:?#")
