"""Files of a corpus: local paths and URLs, globs, compression, and folders that `datasets` wrote."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from t5x_like.config.corpus import expected_formats, file_format
from t5x_like.errors import DataError
from t5x_like.utils.json_reader import read_json
from t5x_like.utils.trusted_urls import require_trusted

REMOTE_SCHEMES = ("gs", "s3", "hf", "file", "memory")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 1024
_BUFFER_BYTES = 2**18
"""Bytes of one read of a local file: documents are often longer than Python's buffer of 8 KiB."""
_DATASET_STATE, _DATASET_DICT = "state.json", "dataset_dict.json"


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """File of a corpus.

    Attributes:
      name: Local path or URL.
      size: Bytes.
      version: JSON values that change when the file changes.
    """

    name: str
    size: int
    version: tuple[Any, ...]


def match_files(patterns: Sequence[str], split: str | None = None) -> list[SourceFile]:
    """Return the files that match the paths, globs and URLs, each once, in the order of the patterns, then by name.

    Args:
      patterns: Paths, globs and URLs.
      split: Split of folders that hold several (`datasets.DatasetDict`); folders without it have no files.

    Raises:
      DataError: a pattern matches nothing, or something that is not a file of a supported format.
    """
    files: dict[str, SourceFile] = {}
    for pattern in patterns:
        found = _match_remote(pattern) if "://" in pattern else _match_local(pattern, split)
        for file in found:
            _require_content(file)
            files[file.name] = file
    return list(files.values())


def dataset_splits(patterns: Sequence[str]) -> list[str]:
    """Return the splits of the folders among the patterns that hold several (`datasets.DatasetDict`)."""
    names: list[str] = []
    for pattern in patterns:
        description = Path(pattern).expanduser() / _DATASET_DICT
        if "://" not in pattern and description.is_file():
            names += [str(name) for name in _read_json(description, "splits")]
    return names


def _match_local(pattern: str, split: str | None) -> Iterator[SourceFile]:
    literal = Path(pattern.removeprefix("file://")).expanduser()
    # A file name may contain glob characters, as in `[draft].txt`.
    names = [str(literal)] if literal.exists() else sorted(glob.glob(str(literal), recursive=True))
    if not names:
        raise DataError(
            f"data.corpus.files: found no file that matches {pattern!r} (relative to {Path.cwd()}), expected one"
        )
    for path in map(Path, names):
        if path.is_dir():
            yield from map(_local_file, _dataset_files(path, split))
        else:
            yield _local_file(path)


def _local_file(path: Path) -> SourceFile:
    if file_format(path.name) is None:
        raise DataError(f"{path}: found an unsupported file type, expected one of {expected_formats()}")
    if not path.is_file():
        kind = "a broken symbolic link" if path.is_symlink() else "a special file" if path.exists() else "nothing"
        raise DataError(f"{path}: found {kind}, expected a file")
    status = path.stat()
    return SourceFile(str(path), status.st_size, (str(path.resolve()), status.st_size, status.st_mtime_ns))


def _dataset_files(folder: Path, split: str | None) -> list[Path]:
    """Return the Arrow files of a folder that `save_to_disk` of a Dataset or a DatasetDict wrote."""
    if (folder / _DATASET_DICT).is_file():
        names = _read_json(folder / _DATASET_DICT, "splits")
        return _dataset_files(folder / split, split) if split is not None and split in names else []
    if not (folder / _DATASET_STATE).is_file():
        raise DataError(
            f"{folder}: found a folder, expected files; name them by a glob, as in '{folder}/*.jsonl' (a folder is "
            "read only if `datasets.save_to_disk` wrote it)"
        )
    names = [
        file.get("filename") for file in _read_json(folder / _DATASET_STATE, "_data_files") if isinstance(file, dict)
    ]
    if foreign := [name for name in names if not isinstance(name, str) or Path(name).name != name or name == ".."]:
        raise DataError(f"{folder / _DATASET_STATE}: found the file {foreign[0]!r}, expected plain names in the folder")
    return [folder / name for name in names if isinstance(name, str)]


def _read_json(path: Path, field: str) -> list[Any]:
    try:
        return list(read_json(path)[field])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: found no list {field!r} ({error}), expected what `datasets` writes") from None


def _match_remote(pattern: str) -> Iterator[SourceFile]:
    require_trusted(pattern, REMOTE_SCHEMES, "data.corpus.files")
    system, path = _file_system(pattern)
    try:
        names = sorted(system.glob(path)) if glob.has_magic(path) else [path]
        if not names:
            raise DataError(f"data.corpus.files: found no file that matches {pattern!r}, expected one")
        for name in names:
            if file_format(name) is None:
                raise DataError(
                    f"{pattern}: found {name!r} of an unsupported type, expected one of {expected_formats()}"
                )
            url = system.unstrip_protocol(name)
            yield SourceFile(url, int(system.info(name)["size"]), (url, system.ukey(name)))
    except OSError as error:
        raise unreadable(pattern, error) from None


def _file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it."""
    scheme = url.partition("://")[0]
    try:
        import fsspec.core

        system, path = fsspec.core.url_to_fs(url)
        return system, path
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{url}: {scheme}:// cannot be read ({error}); install the extra for remote files: "
            "pip install 't5x-like[remote]'"
        ) from None


def open_binary(name: str) -> IO[bytes]:
    """Open a file for reading at any position, as its bytes are stored."""
    if "://" not in name:
        return open(name, "rb", buffering=_BUFFER_BYTES)
    system, path = _file_system(name)
    file: IO[bytes] = system.open(path, "rb")
    return file


def _open_zstd(file: IO[bytes]) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(cast(io.RawIOBase, pyarrow.CompressedInputStream(file, "zstd")))


def _open_gzip(file: IO[bytes]) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=file))


_DECOMPRESSORS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    "": lambda file: file,
    ".gz": _open_gzip,
    ".zst": _open_zstd,
}
"""Functions that decompress a file, by the suffix of the compression."""


@contextlib.contextmanager
def open_decompressed(name: str) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """Open a text file, decompressed if its suffix says so, and a function that returns the bytes read of the file.

    Raises:
      DataError: within the context, the compressed data is damaged.
    """
    compression = (file_format(name) or ("", ""))[1]
    with open_binary(name) as stored:
        try:
            yield _DECOMPRESSORS[compression](stored), stored.tell
        except (EOFError, zlib.error, OSError) as error:
            if not compression:
                raise
            kind = {".gz": "gzip", ".zst": "zstd"}[compression]
            raise DataError(
                f"{name}: found a truncated or damaged {kind} file ({error}), expected a complete one"
            ) from None


def unreadable(name: str, error: OSError) -> DataError:
    """Return the error of a file that cannot be read."""
    return DataError(f"{name}: unreadable ({error.strerror or error}), expected a file")


def _require_content(file: SourceFile) -> None:
    """Raise DataError if the file is a Git LFS pointer, which is a text about the file."""
    if not 0 < file.size <= _MAX_POINTER_BYTES:
        return
    try:
        with open_binary(file.name) as stored:
            is_pointer = stored.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError as error:
        raise unreadable(file.name, error) from None
    if is_pointer:
        raise DataError(f"{file.name}: found a Git LFS pointer, expected the file itself; run `git lfs pull`")
