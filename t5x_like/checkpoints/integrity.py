"""Checksums of a checkpoint's files: written when the checkpoint is complete, compared before it is read.

The array library restores a flipped bit in silence, so every file of a checkpoint is listed with its SHA-256. The list
has the format of coreutils: `cd <step> && sha256sum --check SHA256SUMS` does what `check` does, without this program.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)")
# Hashing leaves the interpreter's lock, so threads share out the files.
_THREADS = min(8, os.cpu_count() or 1)


def seal(directory: Path) -> None:
    """Writes the checksums of all files below `directory`.

    The list appears at once as a whole, and outlives a power cut.

    Raises:
      OSError: a file cannot be read or the list cannot be written.
    """
    names = _file_names(directory)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda name: _sha256(directory / name), names)
        text = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    unfinished = directory / f"{SUMS}.unfinished"
    with unfinished.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(directory / SUMS)
    sync_directory(directory)


def check(directory: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """What is wrong with a sealed directory, one line per file; nothing when it is as it was sealed.

    Args:
      directory: A directory that `seal` has closed.
      wanted: Which files to look at, by their path relative to `directory`.
    """
    try:
        text = (directory / SUMS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return [f"{SUMS}: missing"]
    except (OSError, UnicodeDecodeError) as error:
        return [f"{SUMS}: not readable ({error})"]
    lines = [_LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    if not text.endswith("\n") or not all(lines):
        return [f"{SUMS}: damaged, it is no list of checksums"]
    listed = {line[2]: line[1] for line in lines if line and wanted(line[2])}
    if not listed:
        return [f"{SUMS}: lists none of the files"]

    def problem(name: str) -> str | None:
        try:
            return None if _sha256(directory / name) == listed[name] else "not the content that was saved"
        except OSError as error:
            return f"not readable ({error})"

    present = set(filter(wanted, _file_names(directory)))
    problems = {name: "missing" for name in listed if name not in present}
    problems |= {name: f"not listed in {SUMS}" for name in present if name not in listed}
    names = [name for name in listed if name in present]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = zip(names, pool.map(problem, names), strict=True)
        problems |= {name: text for name, text in found if text is not None}
    return [f"{name}: {text}" for name, text in sorted(problems.items())]


def sync_directory(directory: Path) -> None:
    """Makes the names in `directory` outlive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_names(directory: Path) -> list[str]:
    files = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())
    return sorted(name for name in files if name not in (SUMS, f"{SUMS}.unfinished"))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
