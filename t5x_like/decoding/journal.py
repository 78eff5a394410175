"""An output file that is only ever appended to, and goes on where it was killed.

FILE                 lines, in the order of the input; while several processes write, FILE.part-I-of-N of each
FILE.settings.json   what the lines were made with, written before the first of them: other settings are refused
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from t5x_like.config import RefusedError
from t5x_like.run_directory import write_atomically

Settings = Mapping[str, Any]
_BLOCK = 2**20


def settings_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings that the lines of the output file `path` were made with; None if there are none.

    Raises:
      RefusedError: they cannot be read.
    """
    place = settings_path(path)
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RefusedError(f"{place}: cannot be read ({error}), expected the settings of {path.name}") from None
    if not isinstance(found, dict):
        raise RefusedError(f"{place}: found no JSON object, expected the settings of {path.name}")
    return found


def settings_of_lines(path: Path) -> dict[str, Any]:
    """The settings of an output file that has lines.

    Raises:
      RefusedError: they cannot be read, or there are none: then the file is another's, and must not be touched.
    """
    found = read_settings(path)
    if found is None:
        raise RefusedError(
            f"{path} is there already and was not written by this command, or has lost {settings_path(path).name}; "
            "name another --output"
        )
    return found


def claim(path: Path, settings: Settings, *, begun: bool) -> None:
    """Writes the settings, or checks that those that are there are the same.

    Args:
      begun: There are lines already, which other settings would be mixed with.

    Raises:
      RefusedError: lines of other settings, of which the differences are listed, or of unknown ones.
    """
    if begun and (different := _differences(settings_of_lines(path), json.loads(json.dumps(settings)))):
        lines = "\n".join(f"  {line}" for line in different)
        raise RefusedError(
            f"{path} has lines that were made with other settings:\n{lines}\nName another --output, or take those."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes write the same words at once: each by way of a file of its own.
        own = settings_path(path).with_name(f"{settings_path(path).name}.{os.getpid()}")
        write_atomically(own, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        own.replace(settings_path(path))
    except OSError as error:
        raise RefusedError(f"{path}: cannot be written ({error.strerror or error})") from None


def _differences(kept: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(kept, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*kept, *new})
            for line in _differences(kept.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if kept == new else [f"{name}: {kept!r} there, {new!r} now"]


class Journal:
    """One process's lines. Attributes: `lines`, how many are whole and there."""

    def __init__(self, path: Path):
        """Opens the file, makes it if needed, and cuts off a line that was not finished: of a file that is known to be
        of this command (`settings_of_lines`).

        Raises:
          RefusedError: it cannot be written, or another process writes it.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise RefusedError(f"{path}: cannot be written ({error.strerror or error})") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RefusedError(f"{path}: another process writes it; wait for it or name another --output") from None
        try:
            self.lines, end = _whole_lines(self._file)
            self._file.truncate(end)
        except OSError:
            self._file.close()
            raise RefusedError(f"{path}: found no file that can be cut, expected one; name another --output") from None

    def append(self, lines: Iterable[str]) -> None:
        """Writes lines, which must not hold a newline, and waits until they are on the disk.

        Raises:
          RefusedError: they cannot be written; the same command goes on.
        """
        lines = list(lines)
        try:
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RefusedError(
                f"{self.path}: cannot be written ({error.strerror or error}); make room, and the same command goes on"
            ) from None
        self.lines += len(lines)

    def close(self) -> None:
        self._file.close()


def has_lines(path: Path) -> bool:
    """Whether a file is there that has anything in it."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def count_lines(path: Path) -> int:
    """Whole lines of a file; 0 without one."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return _whole_lines(file)[0]


def part_path(path: Path, index: int, count: int) -> Path:
    """Where process `index` of `count` writes."""
    return path if count == 1 else path.with_name(f"{path.name}.part-{index}-of-{count}")


def done_path(part: Path) -> Path:
    """A file that is there when a part is complete."""
    return part.with_name(f"{part.name}.done")


def join(path: Path, parts: Sequence[Path], chunk_lines: int) -> None:
    """Makes the output file of all parts: chunk k is the next `chunk_lines` lines of part k mod N. It is there as a
    whole or not at all; the parts are removed behind it.

    Raises:
      RefusedError: it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        files = [part.open("rb") for part in parts]
        with unfinished.open("wb") as out:
            for chunk in _in_turn(files, chunk_lines):
                out.writelines(chunk)
            out.flush()
            os.fsync(out.fileno())
        unfinished.replace(path)
        for part, file in zip(parts, files, strict=True):
            file.close()
            part.unlink()
            done_path(part).unlink(missing_ok=True)
    except OSError as error:
        raise RefusedError(f"{path}: cannot be written ({error.strerror or error})") from None


def _in_turn(files: Sequence[BinaryIO], chunk_lines: int) -> Iterator[list[bytes]]:
    while True:
        empty = True
        for file in files:
            chunk = [line for _, line in zip(range(chunk_lines), file, strict=False)]
            empty = empty and not chunk
            yield chunk
        if empty:
            return


def _whole_lines(file: BinaryIO) -> tuple[int, int]:
    """(how many lines end in a newline, where the last of them ends)."""
    file.seek(0)
    count = end = place = 0
    while block := file.read(_BLOCK):
        count += block.count(b"\n")
        last = block.rfind(b"\n")
        if last >= 0:
            end = place + last + 1
        place += len(block)
    return count, end
