"""JSON lines that survive a kill: append-only files of lines, and the records of metrics.jsonl and evaluations.jsonl.

A record ends in two fields that the writer adds and readers verify and remove: `previous_step`, the step of the record
before it (null for the first one), and `crc32`, of the bytes of the line before this field. So a damaged line is not
read as other numbers, and lines that are missing in the middle are noticed.

A value that JSON cannot represent is written as the string "NaN", "Infinity" or "-Infinity" (the convention of
protobuf's JSON mapping), so that any JSON reader can read the file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from t5x_like.utils.file_lock import lock
from t5x_like.utils.json_reader import parse_json

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_BLOCK = 2**20
_PREVIOUS = "previous_step"
_CRC = re.compile(rb', "crc32": "([0-9a-f]{8})"}')
_LOG = logging.getLogger(__name__)


class LineFile:
    """Append-only file of lines. A last line that a kill has cut off is removed by `keep`, before lines are appended.

    Every method raises OSError if the file cannot be read or written.
    """

    def __init__(self, path: Path, *, exclusive: bool = False):
        """Open the file; create it, and its folder, if necessary.

        Args:
          path: The file.
          exclusive: Lock the file for this process.

        Raises:
          BlockingIOError: another process has locked the file.
          SafetyError: the file system cannot lock files.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("a+b")
        if exclusive and not lock(self._file):
            self._file.close()
            raise BlockingIOError(f"{path} is locked")

    def read(self) -> bytes:
        """Return the whole content."""
        self._file.seek(0)
        return self._file.read()

    def count_lines(self) -> tuple[int, int]:
        """Return the number of complete lines and the offset of their end; see `count_lines`."""
        return _complete_lines(self._file)

    def keep(self, end: int) -> None:
        """Remove everything after the first `end` bytes, and add the line feed if only that is missing."""
        self._file.truncate(end)
        if end:
            self._file.seek(end - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")
                self._file.flush()

    def append(self, lines: Iterable[str], *, sync: bool = False) -> None:
        """Append lines, which must not contain a line feed, and hand them to the operating system.

        Args:
          lines: The lines, which then survive a kill of this process.
          sync: Wait until the lines are on the disk, so that they also survive a power failure.
        """
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        # All lines were flushed when they were appended; an error of a full disk would only be raised again here.
        with contextlib.suppress(OSError):
            self._file.close()


class RecordFile:
    """Append-only file of JSON records, each with its "step", in ascending order.

    Opening it continues the run from `restored_step`: later records, which the run will write again, are removed, and
    so is a line that a kill has cut off. A run that was killed and resumed therefore ends with the same records as a
    run that was not interrupted.
    """

    def __init__(self, path: Path, *, restored_step: int | None):
        """Open `path` for appending.

        Args:
          path: The file; it and its folder are created if necessary.
          restored_step: Step of the restored checkpoint; records up to it are kept. None: the run starts from the
            beginning, and no record is kept.

        Raises:
          OSError: the file cannot be written.
        """
        self.path = path
        self.last_step: int | None = None
        self._lines = LineFile(path)
        for problem in self._cut(-math.inf if restored_step is None else restored_step).problems():
            _LOG.warning("%s: %s", path, problem)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and hand it to the operating system, so that it survives a kill of this process.

        A record of an existing or earlier step replaces all records from that step on.

        Raises:
          OSError: the line cannot be written, because the disk is full for example.
        """
        step = int(record["step"])
        if self.last_step is not None and step <= self.last_step:
            self._cut(step - 1)
        self._lines.append([_encode(record, self.last_step)])
        self.last_step = step

    def close(self) -> None:
        self._lines.close()

    def _cut(self, last_step: float) -> Records:
        """Keep the lines up to the last record of at most `last_step`, damaged ones among them, and return them."""
        end, data = 0, self._lines.read()
        for start, line in _lines(data):
            record = _decode(line)
            if record is not None and record["step"] > last_step:
                break
            if record is not None:
                end = start + len(line)
        records = decode_records(data[:end])
        self.last_step = records.records[-1]["step"] if records.records else None
        self._lines.keep(end)
        return records


class Records(NamedTuple):
    """Content of a file of records.

    Attributes:
      records: The intact records.
      unreadable: Number of lines that are damaged.
      gaps: (step before, step after) of each place where records are missing; None: the beginning of the file.
    """

    records: list[dict[str, Any]]
    unreadable: int
    gaps: list[tuple[int | None, int]]

    def problems(self) -> Iterator[str]:
        """Yield one sentence for each kind of damage."""
        if self.unreadable:
            yield f"{self.unreadable} damaged lines are skipped"
        for before, after in self.gaps:
            between = f"between the steps {before} and {after}" if before is not None else f"before step {after}"
            yield f"records {between} are missing"


def encode_records(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a whole file of records, without line feeds."""
    previous = None
    for record in records:
        yield _encode(record, previous)
        previous = int(record["step"])


def _encode(record: Mapping[str, Any], previous_step: int | None) -> str:
    text = dumps({**record, _PREVIOUS: previous_step}).removesuffix("}")
    return f'{text}, "crc32": "{zlib.crc32(text.encode()):08x}"}}'


def _decode(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line, with `previous_step`; None if the line is damaged."""
    line = line.removesuffix(b"\n")
    text, crc = line[:-22], _CRC.fullmatch(line[-22:])
    if crc is None or zlib.crc32(text) != int(crc[1], 16):
        return None
    try:
        record = parse_json(text + b"}")
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) and _PREVIOUS in record else None


def decode_records(data: bytes) -> Records:
    """Return the records in the content of a file."""
    result = Records([], 0, [])
    previous = None
    unreadable = 0
    for _, line in _lines(data):
        record = _decode(line)
        if record is None:
            unreadable += 1
            continue
        if record.pop(_PREVIOUS) != previous:
            result.gaps.append((previous, record["step"]))
        previous = record["step"]
        result.records.append({name: _number(value) for name, value in record.items()})
    return result._replace(unreadable=unreadable)


def read_records(path: Path) -> Records:
    """Return the records of a file (a run may be writing it right now).

    Raises:
      OSError: the file cannot be read.
    """
    return decode_records(path.read_bytes())


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of `data`, with their line feeds, and where each begins."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        yield start, data[start:end]
        start = end


def count_lines(path: Path) -> int:
    """Return the number of complete lines of a file; 0 if it does not exist."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return _complete_lines(file)[0]


def _complete_lines(file: BinaryIO) -> tuple[int, int]:
    """Return the number of lines that end in a line feed, and the offset of the last one's end."""
    file.seek(0)
    count = end = offset = 0
    while block := file.read(_BLOCK):
        count += block.count(b"\n")
        last = block.rfind(b"\n")
        if last >= 0:
            end = offset + last + 1
        offset += len(block)
    return count, end


def _number(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def dumps(value: Any) -> str:
    """Return JSON in one line; NumPy scalars and values that are not finite are converted."""
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
