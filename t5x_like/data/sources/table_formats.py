"""Formats of tables: Parquet, Arrow and ArrayRecord, as rows with their locations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from t5x_like.data.sources.document import ReadStats
from t5x_like.data.sources.file_access import SourceFile, open_binary
from t5x_like.data.sources.row_fields import FieldReader, InvalidText, Row, missing_field
from t5x_like.data.sources.text_formats import parse_json
from t5x_like.data.sources.work_units import group_by_size, split_range
from t5x_like.errors import DataError

_BATCH_ROWS = 1024
Range = tuple[int, int, int]
"""Start, end and approximate size in bytes of a part of a file that can be read independently."""


def parquet_ranges(file: SourceFile, max_bytes: int, fields: Sequence[FieldReader]) -> Iterator[Range]:
    """Yield ranges of row groups."""
    with _open_parquet(file.name, fields) as table:
        sizes = [table.metadata.row_group(index).total_byte_size for index in range(table.metadata.num_row_groups)]
    for indices, num_bytes in group_by_size(enumerate(sizes), max_bytes):
        yield indices[0], indices[-1] + 1, num_bytes


def _open_parquet(name: str, fields: Sequence[FieldReader]) -> Any:
    """Open a Parquet file and check that it has the configured columns."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(open_binary(name) if "://" in name else name)
        names = table.schema_arrow.names
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{name}: not a Parquet file ({error}), expected one") from None
    _columns(name, names, fields)
    return table


def _columns(name: str, names: Sequence[str], fields: Sequence[FieldReader]) -> list[str]:
    """Return the columns that hold the fields.

    Raises:
      DataError: the table lacks a column, or has two of this name.
    """
    columns: dict[str, None] = {}
    for reader in fields:
        for path in reader.paths:
            column = path if path in names else path.partition(".")[0]
            if column not in names and reader.is_optional:
                continue
            if column not in names:
                raise missing_field(name, names, path, reader.option)
            if list(names).count(column) > 1:
                raise DataError(f"{name}: found {list(names).count(column)} columns {column!r}, expected one")
            columns[column] = None
    return list(columns)


def read_parquet(
    name: str, start: int, end: int, stats: ReadStats, fields: Sequence[FieldReader] = ()
) -> Iterator[Row]:
    """Yield the rows of the row groups [start, end)."""
    import pyarrow

    with _open_parquet(name, fields) as table:
        columns = _columns(name, table.schema_arrow.names, fields)
        row = sum(table.metadata.row_group(group).num_rows for group in range(start))
        try:
            for group in range(start, end):
                for batch in table.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=columns):
                    yield from _rows(batch, name, row)
                    row += batch.num_rows
                stats.position += table.metadata.row_group(group).total_byte_size
        except (pyarrow.ArrowException, ValueError) as error:
            raise DataError(f"{name}: unreadable after row {row} ({error}), expected a complete Parquet file") from None


def _rows(batch: Any, name: str, first: int) -> Iterator[Row]:
    """Yield the rows of an Arrow record batch whose first row has the index `first`."""
    try:
        values: list[Any] = batch.to_pylist()
    except UnicodeDecodeError:
        values = [_row_value(batch.slice(index, 1)) for index in range(batch.num_rows)]
    for number, value in enumerate(values, start=first + 1):
        yield Row(value, functools.partial(_row_location, name, number))


def _row_value(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return InvalidText(str(error))


def _row_location(name: str, number: int) -> str:
    return f"{name}, row {number}"


def read_arrow(name: str, start: int, end: int, stats: ReadStats, fields: Sequence[FieldReader] = ()) -> Iterator[Row]:
    """Yield the rows of an Arrow file, of the stream format as `datasets` writes it, or of the file format."""
    import pyarrow
    import pyarrow.ipc

    row = 0
    with open_binary(name) as stored:
        try:
            if is_file_format := stored.read(6) == b"ARROW1":
                reader = pyarrow.ipc.open_file(stored)
            else:
                stored.seek(0)
                reader = pyarrow.ipc.open_stream(stored)
            columns = _columns(name, reader.schema.names, fields)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file_format else reader
            for batch in batches:
                selected = batch.select(columns)
                _require_valid(selected)
                for first in range(0, batch.num_rows, _BATCH_ROWS):
                    yield from _rows(selected.slice(first, _BATCH_ROWS), name, row + first)
                row += batch.num_rows
                stats.position += batch.nbytes
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
            raise DataError(f"{name}: unreadable after row {row} ({error}), expected a complete Arrow file") from None


def _require_valid(batch: Any) -> None:
    """Check the offsets in a batch of an Arrow file: pyarrow reads outside its memory by those of a damaged one.

    Invalid UTF-8 is left to `_rows`, except in nested columns.
    """
    import pyarrow

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if column.type.num_fields or "UTF8" not in str(error):
                raise


def array_record_ranges(file: SourceFile, max_bytes: int, fields: Sequence[FieldReader]) -> Iterator[Range]:
    """Yield ranges of records."""
    count = _open_array_record(file.name).num_records()
    bytes_per_record = max(file.size // max(count, 1), 1)
    for start, stop in split_range(count, max(max_bytes // bytes_per_record, 1)):
        yield start, stop, (stop - start) * bytes_per_record


def _open_array_record(name: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    if "://" in name:
        raise DataError(f"{name}: found a URL, expected a local path: ArrayRecord files are read from disks only")
    reader = ArrayRecordReader(name)
    if not reader.ok() or not reader.num_records():
        raise DataError(f"{name}: found no records, expected a complete ArrayRecord file")
    return reader


def read_array_record(
    name: str, start: int, end: int, stats: ReadStats, fields: Sequence[FieldReader] = ()
) -> Iterator[Row]:
    """Yield the records [start, end), each of which is a JSON object or a tf.train.Example."""
    reader = _open_array_record(name)
    try:
        for first in range(start, end, _BATCH_ROWS):
            records = reader.read(first, min(first + _BATCH_ROWS, end))
            for number, record in enumerate(records, start=first + 1):
                where = functools.partial(_row_location, name, number)
                yield Row(_record_fields(record, where), where)
                stats.position += len(record)
    except (RuntimeError, IndexError, ValueError) as error:
        raise DataError(f"{name}: unreadable ({error}), expected a complete ArrayRecord file") from None


def _record_fields(record: bytes, where: Callable[[], str]) -> dict[str, Any] | DataError:
    value = parse_json(record) if record.startswith(b"{") else None
    if isinstance(value, dict):
        return value
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    try:
        features = tf.train.Example.FromString(record).features.feature
    except DecodeError:
        return DataError(f"{where()}: found {record[:40]!r}, expected a JSON object or a tf.train.Example")
    lists = {
        name: list(getattr(feature, feature.WhichOneof("kind") or "bytes_list").value)
        for name, feature in features.items()
    }
    return {name: values[0] if len(values) == 1 else values or None for name, values in lists.items()}
