"""Output file of JSON lines that a killed command continues.

FILE                 lines, in the order of the input; while several processes write, FILE.part-I-of-N of each
FILE.settings.json   settings that the lines depend on, written before the first line: other settings are refused
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from t5x_like.errors import SafetyError
from t5x_like.utils.atomic_write import replaced_file, write_atomically
from t5x_like.utils.json_reader import read_json
from t5x_like.utils.jsonl import LineFile

Settings = Mapping[str, Any]


def settings_path(path: Path) -> Path:
    """Return the path of the settings of the output file `path`."""
    return path.with_name(f"{path.name}.settings.json")


def read_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings of the lines in the output file `path`, or None if there are none.

    Raises:
      SafetyError: they cannot be read.
    """
    file = settings_path(path)
    try:
        settings = read_json(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SafetyError(f"{file}: cannot be read ({error}), expected the settings of {path.name}") from None
    if not isinstance(settings, dict):
        raise SafetyError(f"{file}: found JSON that is not an object, expected the settings of {path.name}")
    return settings


def settings_of_lines(path: Path) -> dict[str, Any]:
    """Return the settings of an output file that has lines.

    Raises:
      SafetyError: they cannot be read, or do not exist: then another program wrote the file, which must not change.
    """
    settings = read_settings(path)
    if settings is None:
        raise SafetyError(
            f"{path} exists and was not written by this command, or {settings_path(path).name} is missing; "
            "name another --output"
        )
    return settings


def claim(path: Path, settings: Settings, *, begun: bool) -> None:
    """Write the settings, or check that existing lines have the same settings.

    Args:
      path: The output file.
      settings: JSON values that the lines depend on.
      begun: The file has lines already.

    Raises:
      SafetyError: the existing lines have other settings, of which the differences are listed, or unknown settings.
    """
    if begun and (different := _differences(settings_of_lines(path), json.loads(json.dumps(settings)))):
        lines = "\n".join(f"  {line}" for line in different)
        raise SafetyError(
            f"{path} has lines of other settings:\n{lines}\nName another --output, or use the same settings."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes write the same content at the same time, each by its own temporary file.
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        write_atomically(settings_path(path), text, suffix=f"{os.getpid()}.partial")
    except OSError as error:
        raise SafetyError(f"{path}: cannot be written ({error.strerror or error})") from None


def _differences(saved: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*saved, *new})
            for line in _differences(saved.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if saved == new else [f"{name}: {saved!r} in the file, {new!r} now"]


class ResumableLines:
    """Lines of one process in its output file.

    Attributes:
      path: The file.
      lines: Number of complete lines in the file.
    """

    def __init__(self, path: Path):
        """Open the file and remove an incomplete last line.

        The caller must know that this command wrote the file (`settings_of_lines`).

        Raises:
          SafetyError: the file cannot be written, or another process writes it.
        """
        self.path = path
        try:
            self._file = LineFile(path, exclusive=True)
        except BlockingIOError:
            raise SafetyError(
                f"{path}: another process writes this file; wait for it, or name another --output"
            ) from None
        except OSError as error:
            raise SafetyError(f"{path}: cannot be written ({error.strerror or error})") from None
        try:
            self.lines, end = self._file.count_lines()
            self._file.keep(end)
        except OSError:
            self._file.close()
            raise SafetyError(f"{path}: found something that is not a regular file; name another --output") from None

    def append(self, lines: Iterable[str]) -> None:
        """Append lines, which must not contain a line feed, and wait until they are on the disk.

        Raises:
          SafetyError: they cannot be written; the same command resumes.
        """
        lines = list(lines)
        try:
            self._file.append(lines, sync=True)
        except OSError as error:
            reason = error.strerror or error
            raise SafetyError(
                f"{self.path}: cannot be written ({reason}); free space and run the command again"
            ) from None
        self.lines += len(lines)

    def close(self) -> None:
        self._file.close()


def has_lines(path: Path) -> bool:
    """Return True if the file exists and is not empty."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def part_path(path: Path, index: int, count: int) -> Path:
    """Return the path that process `index` of `count` writes."""
    return path if count == 1 else path.with_name(f"{path.name}.part-{index}-of-{count}")


def done_path(part: Path) -> Path:
    """Return the path of a file that exists when a part is complete."""
    return part.with_name(f"{part.name}.done")


def join(path: Path, parts: Sequence[Path], chunk_lines: int) -> None:
    """Write the output file from all parts, atomically, and remove the parts.

    Args:
      path: The output file.
      parts: Files of the N processes: chunk k of the output is the next chunk of part k mod N.
      chunk_lines: Number of lines of a chunk.

    Raises:
      SafetyError: the file cannot be written.
    """
    try:
        files = [part.open("rb") for part in parts]
        with replaced_file(path, suffix="unfinished") as temporary, temporary.open("wb") as out:
            for chunk in _round_robin(files, chunk_lines):
                out.writelines(chunk)
        for part, file in zip(parts, files, strict=True):
            file.close()
            part.unlink()
            done_path(part).unlink(missing_ok=True)
    except OSError as error:
        raise SafetyError(f"{path}: cannot be written ({error.strerror or error})") from None


def _round_robin(files: Sequence[BinaryIO], chunk_lines: int) -> Iterator[list[bytes]]:
    """Yield chunks of lines of the files in turn, until all files are at their end."""
    while True:
        empty = True
        for file in files:
            chunk = [line for _, line in zip(range(chunk_lines), file, strict=False)]
            empty = empty and not chunk
            yield chunk
        if empty:
            return
