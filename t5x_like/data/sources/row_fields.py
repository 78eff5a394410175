"""Fields of rows: one rule for nested fields, templates, nulls and types, whatever the format of the source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from t5x_like.config.corpus import CorpusConfig, parse_field
from t5x_like.data.chat.messages import TOOLS_FIELD, dialogue_text, preference_text
from t5x_like.data.sources.document import Document, ReadStats
from t5x_like.data.sources.label_validation import validate_negatives, validate_preference, validate_target
from t5x_like.errors import DataError

Where = Callable[[], str]
"""Returns the location of a row, for messages."""


class InvalidText(NamedTuple):
    """A row that is not valid UTF-8, with the reason."""

    reason: str


class Row(NamedTuple):
    """A row of a source.

    Attributes:
      value: The fields by name, the text of a source without fields, or the reason why there is none: an error, whose
        message begins with the location, or that the row is not valid UTF-8.
      where: Returns the location of the row.
    """

    value: Mapping[str, Any] | str | InvalidText | DataError
    where: Where


class FieldReader:
    """Reader of one configured field or template.

    A null is an empty text. A template is empty if all of its fields are.

    Args:
      expression: Name of a field, or a template; see `parse_field`.
      option: Option of the command line that sets it, for messages.
      accepts_numbers: Accept numbers and booleans, whose text is JSON's. Fields of a template always may be numbers.
      accepts_lists: Accept a list of texts or numbers, which are joined by spaces.
      is_optional: A table need not have the column.

    Attributes:
      paths: Paths of the fields that are read.
    """

    def __init__(
        self,
        expression: str,
        option: str,
        *,
        accepts_numbers: bool = False,
        accepts_lists: bool = False,
        is_optional: bool = False,
    ):
        self._parts = parse_field(expression)
        self.option, self.is_optional = option, is_optional
        self._is_template = "{" in expression
        self._accepts_numbers = accepts_numbers or self._is_template
        self._accepts_lists = accepts_lists
        self.paths = tuple(path for _, path in self._parts if path is not None)

    def text(self, row: Mapping[str, Any], where: Where) -> str:
        """Return the text of the field or template.

        Raises:
          DataError: the field is missing or of another type.
          UnicodeError: it is not valid Unicode.
        """
        if not self._is_template:
            return self._field(row, self.paths[0], where)
        texts = ["" if path is None else self._field(row, path, where) for _, path in self._parts]
        if not "".join(texts).strip():
            return ""
        return "".join(literal + text for (literal, _), text in zip(self._parts, texts, strict=True))

    def texts(self, row: Mapping[str, Any], where: Where) -> list[str]:
        """Return the texts of a field that holds one or a list of them, without empty ones; of a template, its text.

        Raises:
          DataError, UnicodeError: see `text`.
        """
        value = None if self._is_template else self._value(row, self.paths[0], where)
        if isinstance(value, list):
            texts = [self._scalar(item, self.paths[0], where) for item in value]
        else:
            texts = [self.text(row, where)]
        return [text for text in texts if text.strip()]

    def _value(self, row: Mapping[str, Any], path: str, where: Where) -> Any:
        value = row[path] if path in row else self._nested(row, path, where)
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else value

    def _field(self, row: Mapping[str, Any], path: str, where: Where) -> str:
        value = self._value(row, path, where)
        if self._accepts_lists and isinstance(value, list):
            return " ".join(self._scalar(item, path, where) for item in value)
        return self._scalar(value, path, where)

    def _scalar(self, value: Any, path: str, where: Where) -> str:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            value.encode()  # A lone surrogate, which JSON can express as an escape, raises UnicodeEncodeError.
            return value
        if value is None:
            return ""
        if isinstance(value, int | float) and (self._accepts_numbers or self._accepts_lists):
            return json.dumps(value)
        raise DataError(f"{where()}: found {path!r} of type {_type_name(value)}, expected a string")

    def _nested(self, row: Mapping[str, Any], path: str, where: Where) -> Any:
        """Return field `b` of the object in field `a` for the path `a.b`; a number is an index into a list."""
        value: Any = row
        for name in path.split("."):
            if value is None:
                return None
            if isinstance(value, list | np.ndarray) and name.isdecimal():
                value = value[int(name)] if int(name) < len(value) else None
            elif isinstance(value, Mapping) and name in value:
                value = value[name]
            else:
                raise missing_field(where(), value if isinstance(value, Mapping) else (), path, self.option)
        return value


def missing_field(where: str, available: Iterable[str], path: str, option: str) -> DataError:
    """Return the error of a row or table without a configured field."""
    names = ", ".join(map(repr, available)) or "none"
    return DataError(f"{where}: found the fields {names}, expected {path!r}; set --{option}")


class RowReader:
    """Conversion of the rows of a corpus to documents.

    Attributes:
      fields: Readers of the text, and of the inputs, the rejected answer, the hard negatives and the key if they are
        configured.
    """

    def __init__(self, config: CorpusConfig):
        self._config = config
        is_words = config.target_kind == "token_labels"
        self._text = FieldReader(
            config.text_field,
            "data.corpus.text-field",
            accepts_numbers=config.target_kind != "text",
            accepts_lists=is_words,
        )
        self._inputs = None
        if config.inputs_field is not None:
            self._inputs = FieldReader(config.inputs_field, "data.corpus.inputs-field", accepts_lists=is_words)
        self._rejected = None
        if config.rejected_field is not None:
            self._rejected = FieldReader(config.rejected_field, "data.corpus.rejected-field")
        self._negatives = [FieldReader(field, "data.corpus.negative-fields") for field in config.negative_fields]
        self._key = None
        if config.key_field is not None:
            self._key = FieldReader(config.key_field, "data.corpus.key-field", accepts_numbers=True)
        if config.messages_field is not None:
            self._text = FieldReader(config.messages_field, "data.corpus.messages-field")
        readers = (self._inputs, self._text, self._rejected, *self._negatives, self._key)
        self.fields = [reader for reader in readers if reader is not None]
        if config.messages_field is not None:
            self.fields.append(FieldReader(TOOLS_FIELD, "data.corpus.messages-field", is_optional=True))
            if config.rejected_field is not None:
                self.fields.append(FieldReader(config.text_field, "data.corpus.text-field"))

    def document(self, row: Row, stats: ReadStats) -> Document | None:
        """Return the document of a row; None if the row is invalid and is left out, which `stats` counts.

        Raises:
          DataError: the row cannot be parsed, a field is missing or of another type, a label is not listed, or the row
            is not valid UTF-8 and the configuration refuses such rows; and more rows of this unit are invalid than the
            configuration allows.
        """
        try:
            return self._document(row, stats)
        except DataError as error:
            allowed = self._config.max_bad_records
            if not allowed:
                raise
            stats.left_out[QUARANTINED] += 1
            stats.quarantine.append(str(error))
            require_few(len(stats.quarantine), allowed, str(error))
            return None

    def _document(self, row: Row, stats: ReadStats) -> Document | None:
        value = row.value
        if isinstance(value, DataError):
            raise value
        if isinstance(value, InvalidText):
            self._skip(row, value.reason, stats)
            return None
        if isinstance(value, str):
            return Document(value)
        try:
            key = None if self._key is None else self._key.text(value, row.where)
            if self._config.messages_field is not None and self._config.rejected_field is not None:
                text, prompt = preference_text(value, self._config, row.where)
                return Document(text, key=prompt if key is None else key)
            if self._config.messages_field is not None:
                return Document(dialogue_text(value, self._config.messages_field, row.where), key=key)
            text = self._text.text(value, row.where)
            inputs = None if self._inputs is None else self._inputs.text(value, row.where)
            rejected = None if self._rejected is None else self._rejected.text(value, row.where)
            negatives = [text for reader in self._negatives for text in reader.texts(value, row.where)]
        except UnicodeError as error:
            self._skip(row, str(error), stats)
            return None
        if rejected is not None:
            validate_preference(inputs or "", text, rejected, self._config, row.where)
            # Answers to one prompt must not be in two splits.
            return Document(text, inputs=inputs, key=inputs if key is None else key, rejected=rejected)
        document = Document(text, inputs=inputs, key=key)
        if self._negatives:
            validate_negatives(inputs or "", text, negatives, self._config, row.where)
            # Pairs that differ in their negatives only must not be in two splits.
            missing = ("",) * (self._config.max_negatives - len(negatives))
            key = f"{inputs}\0{text}" if key is None else key
            document = document._replace(key=key, negatives=(*negatives, *missing))
        if not document.is_blank:
            validate_target(text, inputs, self._config, row.where)
        return document

    def _skip(self, row: Row, reason: str, stats: ReadStats) -> None:
        """Count a row that is not valid UTF-8, or raise DataError if the configuration refuses it."""
        if self._config.invalid_utf8 == "refuse":
            raise DataError(
                f"{row.where()}: found invalid UTF-8 ({reason}), expected UTF-8 text; convert the file, or skip such "
                "documents with --data.corpus.invalid-utf8 skip"
            )
        stats.left_out["invalid UTF-8"] += 1


QUARANTINED = "quarantined"
"""Reason, in `ReadStats.left_out`, of rows that are invalid."""


def require_few(found: int, allowed: int, newest: str) -> None:
    """Raise DataError if more rows are invalid than `CorpusConfig.max_bad_records`; `newest` describes the last one."""
    if found > allowed:
        raise DataError(
            f"{newest}\nFound {found:,} invalid rows so far, expected at most {allowed:,} (data.corpus.max_bad_records)"
        )


def _type_name(value: Any) -> str:
    """Return JSON's name of a value's type."""
    names = {bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return names.get(type(value), type(value).__name__)
