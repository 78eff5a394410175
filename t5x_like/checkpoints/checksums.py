"""Checksums of a checkpoint's files: written when the checkpoint is complete, verified before it is read.

The array library restores a flipped bit without an error, so every file of a checkpoint is listed with its SHA-256. The
list has the format of coreutils: `cd <step> && sha256sum --check SHA256SUMS` does the same as `verify_checksums`,
without this program.

Large files of array data are the exception, of which only the sizes are listed, in a file of their own: one process
that reads what all others have written takes about as long as they took to write it. The values in them are compared
with fingerprints that the devices compute (`fingerprints`), when they are restored.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from t5x_like.utils.atomic_write import sync_directory, write_atomically
from t5x_like.utils.stall_limit import progress

SUMS = "SHA256SUMS"
SIZES = "SIZES"
_TEMPORARY = "unfinished"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)")
_SIZE_LINE = re.compile(r"([0-9]{1,18})  ([^\n]+)")
_ARRAY_DATA = re.compile(r"(params|training)/(ocdbt\.process_[^/]+/)?d/[^/]+")
LARGE_BYTES = 2**20
"""Size above which a file of array data is not hashed."""
# Hashing releases the interpreter's lock, so threads run in parallel.
_THREADS = min(8, os.cpu_count() or 1)


def write_checksums(directory: Path) -> None:
    """Write the checksums of all files below `directory`, and the sizes of large files of array data.

    The list is written atomically and survives a power failure.

    Raises:
      OSError: a file cannot be read or the list cannot be written.
    """
    names, sizes = [], {}
    for name in _file_names(directory):
        size = (directory / name).stat().st_size
        if size > LARGE_BYTES and _ARRAY_DATA.fullmatch(name):
            sizes[name] = size
        else:
            names.append(name)
    if sizes:
        text = "".join(f"{size}  {name}\n" for name, size in sizes.items())
        write_atomically(directory / SIZES, text, suffix=_TEMPORARY)
        names = sorted([*names, SIZES])
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda name: _sha256(directory / name), names)
        text = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    # The list appears as a whole or not at all: a checkpoint without it was never finished.
    write_atomically(directory / SUMS, text, suffix=_TEMPORARY)
    sync_directory(directory)


def verify_checksums(directory: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Return the problems of a directory with checksums, one line per file; empty if all files are unchanged.

    Args:
      directory: A directory for which `write_checksums` was called.
      wanted: Predicate that selects the files to verify, by their path relative to `directory`.
    """
    try:
        text = (directory / SUMS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return [f"{SUMS}: missing"]
    except (OSError, UnicodeDecodeError) as error:
        return [f"{SUMS}: not readable ({error})"]
    lines = [_LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    # A list that was cut at the end of a line would otherwise pass as a list of fewer files.
    if not text.endswith("\n") or not all(lines):
        return [f"{SUMS}: damaged, it is not a list of checksums"]
    listed = {line[2]: line[1] for line in lines if line and wanted(line[2])}
    if not listed:
        return [f"{SUMS}: lists none of the files"]
    sizes: dict[str, int] = {}
    if SIZES in listed:
        found = _sizes(directory)
        if found is None:
            return [f"{SIZES}: missing or damaged, it is not a list of sizes"]
        sizes = {name: size for name, size in found.items() if wanted(name)}

    def problem(name: str) -> str | None:
        try:
            return None if _sha256(directory / name) == listed[name] else "not the content that was saved"
        except OSError as error:
            return f"not readable ({error})"

    present = set(filter(wanted, _file_names(directory)))
    problems = {name: "missing" for name in (*listed, *sizes) if name not in present}
    # A file that was added is an error like one that was changed: a reader may take it for a part of the checkpoint.
    problems |= {name: f"not listed in {SUMS}" for name in present if name not in listed and name not in sizes}
    for name, size in sizes.items():
        if name in present and (found_size := (directory / name).stat().st_size) != size:
            problems[name] = f"found {found_size:,} bytes, expected {size:,}"
    names = [name for name in listed if name in present]
    with ThreadPoolExecutor(_THREADS) as pool:
        results = zip(names, pool.map(problem, names), strict=True)
        problems |= {name: text for name, text in results if text is not None}
    return [f"{name}: {text}" for name, text in sorted(problems.items())]


def has_unhashed_files(directory: Path) -> bool:
    """Return whether `write_checksums` has listed only the sizes of some files."""
    return (directory / SIZES).exists()


def _sizes(directory: Path) -> dict[str, int] | None:
    """Return the sizes by name; None if the list is damaged."""
    try:
        text = (directory / SIZES).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    lines = [_SIZE_LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    return {line[2]: int(line[1]) for line in lines if line} if all(lines) else None


def _file_names(directory: Path) -> list[str]:
    files = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())
    return sorted(name for name in files if name not in (SUMS, f"{SUMS}.{_TEMPORARY}"))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    progress()
    return digest
