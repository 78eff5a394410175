"""Files of the user as a source of documents: the table of formats, work units, and their rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from t5x_like.config.corpus import CorpusConfig, file_format
from t5x_like.data.sources import table_formats, text_formats
from t5x_like.data.sources.document import Document, ReadStats
from t5x_like.data.sources.file_access import SourceFile, dataset_splits, match_files, unreadable
from t5x_like.data.sources.row_fields import FieldReader, Row, RowReader
from t5x_like.data.sources.source_splits import source_splits
from t5x_like.data.sources.table_formats import Range
from t5x_like.data.sources.text_formats import WHOLE_FILE
from t5x_like.data.sources.work_units import FileRange, WorkUnit, split_range, unit_bytes, units_of_ranges
from t5x_like.errors import DataError

_UNLIMITED = 2**62
"""Bytes of a range that is the whole file."""


class _ReadTable(Protocol):
    def __call__(
        self, name: str, start: int, end: int, stats: ReadStats, *, fields: Sequence[FieldReader]
    ) -> Iterable[Row]: ...


class Format(NamedTuple):
    """Format of a file.

    Attributes:
      read: Yields the rows of a range of a file, and advances `ReadStats.position`.
      ranges: Returns the ranges of a file that can be read independently, of at most a number of bytes.
    """

    read: _ReadTable
    ranges: Callable[[SourceFile, int, Sequence[FieldReader]], Iterable[Range]]


def _whole(file: SourceFile, max_bytes: int, fields: Sequence[FieldReader]) -> Iterator[Range]:
    yield 0, WHOLE_FILE, file.size


def _line_ranges(file: SourceFile, max_bytes: int, fields: Sequence[FieldReader]) -> Iterator[Range]:
    suffix, compression = file_format(file.name) or ("", "")
    if compression or (suffix == ".json" and text_formats.is_json_array(file.name)):
        yield from _whole(file, max_bytes, fields)
        return
    for start, end in split_range(file.size, max_bytes):
        yield start, end, end - start


def _text(read: Callable[..., Iterator[Row]]) -> _ReadTable:
    """Return the reader of a text format, which cannot leave out fields."""

    def read_all(name: str, start: int, end: int, stats: ReadStats, *, fields: Sequence[FieldReader]) -> Iterator[Row]:
        return read(name, start, end, stats)

    return read_all


_csv = functools.partial(text_formats.read_csv, delimiter=",", quoted=True)
_tsv = functools.partial(text_formats.read_csv, delimiter="\t", quoted=False)
_conll = functools.partial(text_formats.read_conll, universal=False)
_conllu = functools.partial(text_formats.read_conll, universal=True)
_array_record = Format(table_formats.read_array_record, table_formats.array_record_ranges)
FORMATS: dict[str, Format] = {
    ".txt": Format(_text(text_formats.read_txt), _whole),
    ".jsonl": Format(_text(text_formats.read_jsonl), _line_ranges),
    ".json": Format(_text(text_formats.read_json), _line_ranges),
    ".csv": Format(_text(_csv), _whole),
    ".tsv": Format(_text(_tsv), _whole),
    ".conll": Format(_text(_conll), _whole),
    ".conllu": Format(_text(_conllu), _whole),
    ".parquet": Format(table_formats.read_parquet, table_formats.parquet_ranges),
    ".arrow": Format(table_formats.read_arrow, _whole),
    ".array_record": _array_record,
    ".arrayrecord": _array_record,
}
"""Formats by suffix."""


def files_of_splits(config: CorpusConfig) -> dict[str | None, list[SourceFile]]:
    """Return the files of each split; None for files that a fraction is held out of.

    Raises:
      DataError: a pattern matches nothing or a file of another format, or a named split does not exist.
    """
    available = dataset_splits(config.files)
    # Without a `datasets` folder of several splits, only the patterns name splits.
    splits = source_splits(available, config) if available or config.validation_split or config.test_split else {}
    found: dict[str | None, list[SourceFile]] = {"train": match_files(config.files, config.train_split)}
    for split, patterns in (("validation", config.validation_files), ("test", config.test_files)):
        if patterns:
            found[split] = match_files(patterns, split)
        elif source := splits.get(split):
            found[split] = match_files([pattern for pattern in config.files if dataset_splits([pattern])], source)
    if "validation" not in found:
        found[None] = found.pop("train")
    # The training files come first.
    return {split: found[split] for split in ("train", None, "validation", "test") if split in found}


def list_work_units(config: CorpusConfig) -> list[WorkUnit]:
    """Return the files as work units, each of one split.

    Small files are grouped. Large files are divided into ranges, if their format allows it.

    Raises:
      DataError: a file is missing, unreadable, or not in the format of its suffix.
    """
    units = []
    fields = RowReader(config).fields
    for split, files in files_of_splits(config).items():
        total = sum(file.size for file in files)
        ranges: list[tuple[FileRange, int]] = []
        for file in files:
            suffix, _ = file_format(file.name) or ("", "")
            try:
                for start, end, size in FORMATS[suffix].ranges(file, unit_bytes(total), fields):
                    ranges.append(((file.name, start, end), size))
            except OSError as error:
                raise unreadable(file.name, error) from None
        units += units_of_ranges("files", ranges, total, split)
    return units


def read_unit(unit: WorkUnit, config: CorpusConfig, stats: ReadStats) -> Iterator[Document]:
    """Yield the documents of a unit; `stats.position` counts bytes of its ranges.

    Raises:
      DataError: a document cannot be read. The message names the file, and the line or row if there is one.
    """
    reader = RowReader(config)
    for name, start, end in unit.pieces:
        suffix, _ = file_format(str(name)) or ("", "")
        try:
            for row in FORMATS[suffix].read(str(name), int(start), int(end), stats, fields=reader.fields):
                if (document := reader.document(row, stats)) is not None:
                    yield document
        except OSError as error:
            raise unreadable(str(name), error) from None


def rows_of_files(patterns: Sequence[str], fields: Sequence[FieldReader]) -> Iterator[Row]:
    """Yield the rows of files of any format that has fields, in order.

    Args:
      patterns: Paths, globs and URLs.
      fields: Fields that are needed: a table is read in these columns only.

    Raises:
      DataError: a pattern matches nothing, or a file cannot be read or has no fields.
    """
    stats = ReadStats()
    for file in match_files(patterns):
        suffix, _ = file_format(file.name) or ("", "")
        if suffix == ".txt":
            raise DataError(f"{file.name}: found a file of text without fields, expected .jsonl, .csv, .tsv or a table")
        try:
            for start, end, _ in FORMATS[suffix].ranges(file, _UNLIMITED, fields):
                yield from FORMATS[suffix].read(file.name, start, end, stats, fields=fields)
        except OSError as error:
            raise unreadable(file.name, error) from None
