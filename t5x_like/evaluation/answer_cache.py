"""Answer cache: results of a model that survive a kill, as JSON lines with one key each, appended in portions.

The first line records the parameters and settings that the results belong to. Opening the file with another record
starts it anew; with the same record, existing results are read and only missing ones are computed. A line that was cut
off by a kill is removed. Two processes cannot write the same file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_like.errors import SafetyError
from t5x_like.utils.json_reader import parse_json
from t5x_like.utils.jsonl import LineFile, dumps

_BEGINNING = b'{"belongs_to"'
ROWS_PER_WRITE = 64


class AnswerCache:
    """Results by key, in a file or, without a path, in memory only."""

    def __init__(self, path: Path | None, belongs_to: Mapping[str, Any]):
        """Open the file and read its results.

        Args:
          path: File; None: results are kept in memory only.
          belongs_to: JSON object of the parameters and settings that the results depend on.

        Raises:
          SafetyError: another process writes the file, it cannot be written, or it is of another kind.
        """
        self._rows: dict[str, Any] = {}
        self._file: LineFile | None = None
        if path is None:
            return
        header = json.loads(dumps(dict(belongs_to)))
        try:
            file = LineFile(path, exclusive=True)
        except BlockingIOError:
            raise SafetyError(f"{path}: another process writes this file; wait until it has finished") from None
        except OSError as error:
            raise SafetyError(f"{path}: cannot be written ({error.strerror or error})") from None
        data = file.read()
        # The header may be cut off, but a file that begins differently was not written by this class.
        if not data.startswith(_BEGINNING[: len(data)]):
            file.close()
            raise SafetyError(
                f"{path}: found a file of another kind, expected an answer cache or no file; move it away"
            )
        end, self._rows = _read(data, header)
        file.keep(end)
        if not end:
            file.append([dumps({"belongs_to": header})])
        self._file = file

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Any:
        return self._rows[key]

    def add(self, rows: Mapping[str, Any]) -> None:
        """Append rows and sync them to the disk. Existing keys keep their value."""
        new = {key: value for key, value in rows.items() if key not in self._rows}
        if self._file is not None and new:
            try:
                self._file.append((dumps({"key": key, "value": value}) for key, value in new.items()), sync=True)
            except OSError as error:
                raise SafetyError(f"{self._file.path}: cannot be written ({error.strerror or error})") from None
        self._rows |= new

    def complete(
        self,
        keys: Sequence[str],
        answer: Callable[[Sequence[int]], Sequence[Any]],
        *,
        at_once: int = ROWS_PER_WRITE,
        lengths: Sequence[int] | None = None,
    ) -> list[Any]:
        """Return the rows of all keys, in their order, and compute the missing ones.

        Args:
          keys: Keys; equal keys are computed once.
          answer: Computes the rows of the keys at the given positions.
          at_once: Number of rows per call of `answer`, each followed by a write.
          lengths: Lengths of the keys' inputs. The longest are computed first, together with others of similar length.
        """
        missing = {key: position for position, key in reversed(list(enumerate(keys))) if key not in self}
        positions = sorted(missing.values())
        if lengths is not None:
            positions.sort(key=lambda position: -lengths[position])
        for start in range(0, len(positions), at_once):
            portion = positions[start : start + at_once]
            values = answer(portion)
            self.add({keys[position]: value for position, value in zip(portion, values, strict=True)})
        return [self[key] for key in keys]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(data: bytes, header: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return the end of the last complete line and the rows up to there; (0, {}) if the header differs."""
    end, rows = 0, {}
    for number, line in enumerate(data.splitlines(keepends=True)):
        try:
            record = parse_json(line)
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
