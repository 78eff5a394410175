"""Rows of the files that are predicted or scored: a text, what belongs to it, and the row's other fields."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from t5x_like.data.sources.row_fields import FieldReader, InvalidText
from t5x_like.data.sources.text_files import rows_of_files
from t5x_like.errors import DataError


@dataclasses.dataclass(frozen=True)
class InputRow:
    """A row of the input.

    Attributes:
      text: Text that the model reads.
      target: The true answer as text; None if no field was named.
      fields: The fields of the row.
      where: File and line, for messages.
    """

    text: str
    target: str | None
    fields: Mapping[str, Any]
    where: str


@dataclasses.dataclass(frozen=True)
class InputRows:
    """Rows of files, which can be iterated repeatedly.

    Attributes:
      patterns: Paths, globs and URLs of any format that has fields.
      text_field: Field or template of the text.
      target_field: Field or template of the target; None: the rows have no targets.
      text_option, target_option: Options that name the fields, for messages.
    """

    patterns: Sequence[str]
    text_field: str
    target_field: str | None = None
    text_option: str = "field"
    target_option: str = "target-field"

    def __iter__(self) -> Iterator[InputRow]:
        """Yield the rows.

        Raises:
          DataError: a file cannot be read, or a row lacks a field or has a blank text.
        """
        text_of = FieldReader(self.text_field, self.text_option, accepts_lists=True)
        target_of = None
        if self.target_field is not None:
            target_of = FieldReader(self.target_field, self.target_option, accepts_numbers=True, accepts_lists=True)
        for row in rows_of_files(self.patterns, [text_of] if target_of is None else [text_of, target_of]):
            if isinstance(row.value, DataError):
                raise row.value
            if isinstance(row.value, InvalidText):
                raise DataError(f"{row.where()}: found invalid UTF-8 ({row.value.reason}), expected UTF-8 text")
            assert not isinstance(row.value, str), "files without fields are refused"
            try:
                text = text_of.text(row.value, row.where)
                target = None if target_of is None else target_of.text(row.value, row.where)
            except UnicodeError as error:
                raise DataError(f"{row.where()}: found invalid UTF-8 ({error}), expected UTF-8 text") from None
            if not text.strip():
                raise DataError(f"{row.where()}: found a blank text in {self.text_field!r}, expected one to read")
            yield InputRow(text, target, row.value, row.where())

    def check(self) -> tuple[int, str]:
        """Read all rows, and return their number and the SHA-256 of their fields.

        Raises:
          DataError: there are no rows, or one cannot be read.
        """
        digest, count = hashlib.sha256(), 0
        for row in self:
            digest.update(dumps(row.fields).encode() + b"\n")
            count += 1
        if not count:
            raise DataError(f"{', '.join(self.patterns)}: found no rows, expected at least one")
        return count, digest.hexdigest()


def dumps(fields: Mapping[str, Any]) -> str:
    """Return a JSON line. Values that JSON does not have are written as their text."""
    return json.dumps(fields, ensure_ascii=False, default=str)
