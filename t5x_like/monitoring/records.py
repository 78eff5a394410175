"""Lines of JSON that survive a kill and continue after a restore: metrics.jsonl and evaluations.jsonl.

A value that JSON cannot hold is written as the string "NaN", "Infinity" or "-Infinity" (the convention of protobuf's
JSON mapping), so that any JSON reader can read the file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LOG = logging.getLogger(__name__)


class RecordFile:
    """Append-only lines of JSON, each with its "step", steps ascending.

    Opening it continues the run from `restored_step`: later records, which the run is about to write again, go, and so
    does what a kill left of a half-written line. A run that was killed and resumed thereby ends with the records of a
    run that was never disturbed.
    """

    def __init__(self, path: Path, *, restored_step: int | None):
        """Opens `path` for appending.

        Args:
          path: The file; made, with its folder, where it is not there.
          restored_step: Step of the restored checkpoint: records up to it stay. None for a run that starts from
            nothing: no record stays.

        Raises:
          OSError: the file cannot be written.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.last_step: int | None = None
        if path.exists():
            self._cut(-math.inf if restored_step is None else restored_step)
        self._file = path.open("ab")

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line and hands it to the operating system, so that it outlives this process.

        A record of a step that is already there, or was passed, takes the place of all records from that step on.

        Raises:
          OSError: the line could not be written, for example because the disk is full.
        """
        step = int(record["step"])
        if self.last_step is not None and step <= self.last_step:
            self._cut(step - 1)
        self._file.write(dumps(record).encode() + b"\n")
        self._file.flush()
        self.last_step = step

    def close(self) -> None:
        # Every record was handed over when it came; what a full disk refused then is refused again here.
        with contextlib.suppress(OSError):
            self._file.close()

    def _cut(self, last_step: float) -> None:
        """Keeps the records up to `last_step`."""
        data = self.path.read_bytes()
        end, self.last_step = 0, None
        for line in data.splitlines(keepends=True):
            record = _record(line)
            if record is None:
                # A torn last line is what a kill leaves; anything else deserves a word.
                if end + len(line) < len(data):
                    _LOG.warning("%s: no record at byte %d; dropped from there on", self.path, end)
                break
            if record["step"] > last_step:
                break
            end += len(line)
            self.last_step = record["step"]
        with self.path.open("r+b") as file:
            file.truncate(end)
            if end and data[end - 1 : end] != b"\n":  # whole but for its line feed
                file.seek(end)
                file.write(b"\n")


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None where it is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a file, and how many of its lines are none (a run may be writing it right now).

    Raises:
      OSError: the file cannot be read.
    """
    records = []
    unreadable = 0
    for line in path.read_bytes().splitlines():
        record = _record(line)
        if record is None:
            unreadable += 1
        else:
            records.append({name: _number(value) for name, value in record.items()})
    return records, unreadable


def _number(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def dumps(value: Any) -> str:
    """JSON in one line, of NumPy scalars and of values that are not finite too."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
