"""Answers of a model that outlive a kill: lines of JSON, one per key, appended in portions.

The first line says what the answers belong to (which parameters, which settings). Whoever opens the file with another
account begins anew; with the same one, what is there is read and only the rest is asked for. A line that a kill has
torn is cut off. Two processes cannot write the same file.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_like.config.errors import RefusedError
from t5x_like.monitoring.records import dumps

_BEGINNING = b'{"belongs_to"'
AT_ONCE = 64
"""Rows between two writes."""


class Answers:
    """Rows by key, on the disk or, without a path, in memory only."""

    def __init__(self, path: Path | None, belongs_to: Mapping[str, Any]):
        """
        Raises:
          RefusedError: another process writes the file, it cannot be written, or is something else.
        """
        self._rows: dict[str, Any] = {}
        self._file = None
        if path is None:
            return
        header = json.loads(dumps(dict(belongs_to)))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        except OSError as error:
            raise RefusedError(f"{path}: cannot be written ({error.strerror or error})") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RefusedError(f"{path}: another process writes it, expected one at a time; wait for it") from None
        file.seek(0)
        data = file.read()
        # A header can be torn, but what begins otherwise is another's file.
        if not data.startswith(_BEGINNING[: len(data)]):
            file.close()
            raise RefusedError(f"{path}: found a file that is not of this command, expected its answers or no file")
        end, self._rows = _read(data, header)
        file.truncate(end)
        if not end:
            file.write(dumps({"belongs_to": header}).encode() + b"\n")
            file.flush()
        self._file = file

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Any:
        return self._rows[key]

    def add(self, rows: Mapping[str, Any]) -> None:
        """Writes rows and hands them to the operating system; keys that are there already stay as they are."""
        new = {key: value for key, value in rows.items() if key not in self._rows}
        if self._file is not None and new:
            lines = b"".join(dumps({"key": key, "value": value}).encode() + b"\n" for key, value in new.items())
            try:
                self._file.write(lines)
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise RefusedError(f"{self._file.name}: cannot be written ({error.strerror or error})") from None
        self._rows |= new

    def complete(
        self,
        keys: Sequence[str],
        answer: Callable[[Sequence[int]], Sequence[Any]],
        *,
        at_once: int = AT_ONCE,
        lengths: Sequence[int] | None = None,
    ) -> list[Any]:
        """The rows of all keys, in their order; `answer` is given the places of those that are missing, by portions.

        Equal keys are asked for once. With `lengths` of the keys, the longest come first, beside others like them.
        """
        missing = {key: place for place, key in reversed(list(enumerate(keys))) if key not in self}
        places = sorted(missing.values())
        if lengths is not None:
            places.sort(key=lambda place: -lengths[place])
        for start in range(0, len(places), at_once):
            some = places[start : start + at_once]
            found = answer(some)
            self.add({keys[place]: value for place, value in zip(some, found, strict=True)})
        return [self[key] for key in keys]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(data: bytes, header: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Where the last whole line ends, and the rows up to there; (0, {}) for the answers to something else."""
    end, rows = 0, {}
    for number, line in enumerate(data.splitlines(keepends=True)):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict):
            break
        if number == 0:
            if record.get("belongs_to") != header:
                return 0, {}
        elif "key" in record:
            rows[str(record["key"])] = record.get("value")
        end += len(line)
    return end, rows
