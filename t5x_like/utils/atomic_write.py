"""Atomic writes: a reader sees the old content of a file or directory, or the new one, never a part of it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def replaced_file(path: Path, *, suffix: str = "partial", sync: bool = True) -> Iterator[Path]:
    """Yield the path of a temporary file beside `path`, which becomes `path` at the end of the block.

    If the block raises, the temporary file is removed and `path` stays as it was.

    Args:
      path: The file to create or replace.
      suffix: Suffix of the temporary file. Processes that write the same path at the same time need different ones.
      sync: Flush the content to the disk before the file is renamed, so that it survives a power failure.

    Raises:
      OSError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{suffix}")
    try:
        yield temporary
        if sync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(path: Path, text: str, *, suffix: str = "partial") -> None:
    """Write `text` as UTF-8 to a temporary file and rename it to `path`; see `replaced_file`.

    Raises:
      OSError: the file cannot be written.
    """
    with replaced_file(path, suffix=suffix) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory beside `path`, which becomes `path` at the end of the block.

    An earlier temporary directory is removed first. If the block raises, the temporary directory is removed.

    Args:
      path: The directory to create; it must not exist, or be empty.

    Raises:
      OSError: the directory cannot be written.
    """
    temporary = path.with_name(f"{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """Flush all files below `directory` and the names of all its directories to the disk.

    A rename of `directory` that survives a power failure then leads to the complete tree.
    """
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(Path(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """Flush the names in `directory` to the disk, so that created and renamed files survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by name to a folder, and wait until they are on the disk; without files, create no folder."""
    if files:
        folder.mkdir(exist_ok=True)
    for name, content in files.items():
        with (folder / name).open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
