"""The user's own text: .txt, .jsonl, .jsonl.gz and .parquet."""

from __future__ import annotations

import functools
import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import pydantic_core

from t5x_like.config.corpora import CorpusConfig
from t5x_like.config.errors import DataError
from t5x_like.data import units as units_
from t5x_like.data.documents import Document, Reading
from t5x_like.data.targets import require_target
from t5x_like.data.units import Piece, Unit

_WHOLE = -1
"""In place of the end of a piece: the file is read whole."""
_BLOCK = 2**20


def matching(patterns: tuple[str, ...]) -> list[Path]:
    """The files that the paths and globs name, each once, in the order of the patterns and by name within one.

    Raises:
      DataError: a pattern matches nothing, or something that is no file of a known kind.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        literal = Path(pattern).expanduser()
        # A name may hold what would be a glob: `[draft].txt`.
        names = [str(literal)] if literal.exists() else sorted(glob.glob(str(literal), recursive=True))
        if not names:
            raise DataError(
                f"data.corpus.files: found no file that matches {pattern!r} (seen from {Path.cwd()}), expected one"
            )
        for path in map(Path, names):
            if path.is_dir():
                raise DataError(f"{path}: found a folder, expected files; name them by a glob, as in '{path}/*.jsonl'")
            _suffix(path)
            if not path.is_file():
                kind = "a link to nothing" if path.is_symlink() else "no regular file"
                raise DataError(f"{path}: found {kind}, expected a file of text")
            found[path] = None
    return list(found)


def units(config: CorpusConfig) -> list[Unit]:
    """The files as units of work: small ones together; of large .jsonl, ranges of bytes; of .parquet, of row groups.

    Raises:
      DataError: a file is missing, unreadable or of another form than its name says.
    """
    paths = matching(config.files)
    pieces: list[tuple[Piece, int]] = []
    path = paths[0]
    try:
        total = sum(path.stat().st_size for path in paths)
        for path in paths:
            pieces += _pieces(path, units_.unit_bytes(total), config)
    except OSError as error:
        raise _unreadable(path, error) from None
    return units_.of_pieces("files", pieces, total)


def _pieces(path: Path, largest: int, config: CorpusConfig) -> Iterator[tuple[Piece, int]]:
    """((path, start, end), size) of the parts of a file that can be read by themselves."""
    suffix, size = _suffix(path), path.stat().st_size
    if suffix == ".jsonl":
        for start, end in units_.ranges(size, largest):
            yield (str(path), start, end), end - start
    elif suffix == ".parquet":
        with _parquet(path, config) as table:
            groups = [table.metadata.row_group(index).total_byte_size for index in range(table.metadata.num_row_groups)]
        for together, bytes_ in units_.grouped(enumerate(groups), largest):
            yield (str(path), together[0], together[-1] + 1), bytes_
    else:
        yield (str(path), 0, _WHOLE), size


def read(unit: Unit, config: CorpusConfig, reading: Reading) -> Iterator[Document]:
    """The documents of a unit; `reading.position` is in bytes of its pieces.

    Raises:
      DataError: with the file, and the line or row where there is one.
    """
    for name, start, end in unit.pieces:
        path = Path(str(name))
        reader = _READERS[_suffix(path)]
        try:
            yield from reader(path, int(start), int(end), config, reading)
        except OSError as error:
            raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    if isinstance(error, gzip.BadGzipFile):
        return DataError(f"{path}: found no gzip data ({error}), expected a whole .gz file")
    return DataError(f"{path}: unreadable ({error.strerror or error}), expected a text file")


def _suffix(path: Path) -> str:
    for suffix in _READERS:
        if path.name.endswith(suffix):
            return suffix
    raise DataError(f"{path}: found an unknown kind of file, expected one of {', '.join(_READERS)}")


def _invalid(where: Callable[[], str], config: CorpusConfig, reading: Reading, detail: str) -> None:
    """Counts a document that is no UTF-8, or stops there."""
    if config.invalid_utf8 == "refuse":
        raise DataError(
            f"{where()}: found invalid UTF-8 ({detail}), expected UTF-8 text; convert the file, or leave such "
            "documents out with --data.corpus.invalid-utf8 skip"
        )
    reading.left_out["invalid UTF-8"] += 1


def _read_txt(path: Path, start: int, end: int, config: CorpusConfig, reading: Reading) -> Iterator[Document]:
    data = path.read_bytes()
    reading.position += len(data)
    try:
        yield Document(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        _invalid(lambda: f"{path}:{line}", config, reading, str(error))


def _read_jsonl(path: Path, start: int, end: int, config: CorpusConfig, reading: Reading) -> Iterator[Document]:
    with open(path, "rb") as file:
        _skip_line_before(file, start)
        position, first = reading.position, file.tell()
        for number, line in enumerate(_lines_until(file, end), start=1):
            if number % 256 == 0:
                reading.position = position + file.tell() - start
            mark = number == 1 and first == 0
            yield from _json_document(line, functools.partial(_line, path, first, number), mark, config, reading)
        reading.position = position + end - start


def _line(path: Path, first: int, number: int) -> str:
    """The place of a line, counted from the one that begins at byte `first`."""
    return f"{path}:{_count_lines(path, first) + number}"


def _skip_line_before(file: BufferedReader, start: int) -> None:
    """To the first line that begins at `start` or later. What it skips is not held, however long it is."""
    if start:
        file.seek(start - 1)
        while block := file.readline(_BLOCK):
            if block.endswith(b"\n"):
                return


def _lines_until(file: BufferedReader, end: int) -> Iterator[bytes]:
    """The lines that begin before `end`."""
    position = file.tell()
    while position < end and (line := file.readline()):
        position += len(line)
        yield line


def _count_lines(path: Path, end: int) -> int:
    with open(path, "rb") as file:
        count = 0
        while end > 0 and (block := file.read(min(end, _BLOCK))):
            count += block.count(b"\n")
            end -= len(block)
    return count


def _read_jsonl_gz(path: Path, start: int, end: int, config: CorpusConfig, reading: Reading) -> Iterator[Document]:
    position = reading.position
    with open(path, "rb") as file, gzip.GzipFile(fileobj=file) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if number % 256 == 0:
                    reading.position = position + file.tell()
                where = functools.partial(_line, path, 0, number)
                yield from _json_document(line, where, number == 1, config, reading)
        except (EOFError, zlib.error) as error:
            raise DataError(f"{path}: found a truncated or damaged gzip file ({error}), expected a whole one") from None
        reading.position = position + file.tell()


def _json_document(
    line: bytes, where: Callable[[], str], may_have_mark: bool, config: CorpusConfig, reading: Reading
) -> Iterable[Document]:
    """The document of a JSON line: none if it is blank or, where that is counted, no UTF-8."""
    if line.isspace():
        return ()
    try:
        row = _fast_json(line)
        if row is None:
            row = json.loads(line.decode("utf-8-sig" if may_have_mark else "utf-8"))
    except UnicodeDecodeError as error:
        _invalid(where, config, reading, str(error))
        return ()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where()}: found no JSON ({error}), expected one object per line") from None
    if not isinstance(row, dict):
        found = f"a JSON {type(row).__name__}"
        raise DataError(f"{where()}: found {found}, expected an object with the field {config.text_field!r}")
    text = _string(row, config.text_field, "text-field", where, spelled=config.target_kind != "text")
    inputs = None if config.inputs_field is None else _string(row, config.inputs_field, "inputs-field", where)
    try:
        text.encode()
        (inputs or "").encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell
        _invalid(where, config, reading, str(error))
        return ()
    require_target(text, inputs, config, where)
    return (Document(text, inputs=inputs),)


def _fast_json(line: bytes) -> Any:
    """A JSON value by a parser of several times the speed; None if that is not content with it."""
    try:
        return pydantic_core.from_json(line)
    except ValueError:
        return None


def _string(row: dict[str, Any], field: str, option: str, where: Callable[[], str], *, spelled: bool = False) -> str:
    """`spelled`: numbers are taken as JSON spells them."""
    if field not in row:
        names = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{where()}: found the fields {names}, expected {field!r}; name it by --data.corpus.{option}")
    value = row[field]
    if spelled and isinstance(value, int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise DataError(f"{where()}: found {field!r} of type {type(value).__name__}, expected a string")
    return value


def _columns(config: CorpusConfig) -> dict[str, str]:
    """Field -> the option that names it."""
    columns = {config.text_field: "text-field"}
    return columns if config.inputs_field is None else {config.inputs_field: "inputs-field", **columns}


def _parquet(path: Path, config: CorpusConfig) -> Any:
    """The file, open, with the columns that are looked for."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: found no Parquet file ({error}), expected one") from None
    names = table.schema_arrow.names
    for field, option in _columns(config).items():
        if field not in names:
            found = ", ".join(map(repr, names)) or "none"
            raise DataError(f"{path}: found the columns {found}, expected {field!r}; name it by --data.corpus.{option}")
        if names.count(field) > 1:
            raise DataError(f"{path}: found {names.count(field)} columns {field!r}, expected one")
        kind = table.schema_arrow.field(field).type
        is_number = any(is_of(kind) for is_of in (pyarrow.types.is_integer, pyarrow.types.is_floating))
        if is_number and field == config.text_field and config.target_kind != "text":
            continue
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{path}: found the column {field!r} of type {kind}, expected strings")
    return table


def _read_parquet(path: Path, start: int, end: int, config: CorpusConfig, reading: Reading) -> Iterator[Document]:
    import pyarrow

    with _parquet(path, config) as table:
        row = sum(table.metadata.row_group(group).num_rows for group in range(start))
        try:
            for group in range(start, end):
                for batch in table.iter_batches(batch_size=1024, row_groups=[group], columns=list(_columns(config))):
                    for document in _rows(batch, path, row, config, reading):
                        row += 1
                        if document is not None:
                            yield document
                reading.position += table.metadata.row_group(group).total_byte_size
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: unreadable after row {row} ({error}), expected a whole Parquet file") from None


def _rows(batch: Any, path: Path, row: int, config: CorpusConfig, reading: Reading) -> Iterator[Document | None]:
    """A document per row; None for one that is no UTF-8."""
    texts = batch.column(config.text_field)
    inputs = None if config.inputs_field is None else batch.column(config.inputs_field)
    for index in range(batch.num_rows):
        try:
            value = texts[index].as_py()
            text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
            given = None if inputs is None else inputs[index].as_py() or ""
            require_target(text, given, config, functools.partial(_row, path, row + index + 1))
            yield Document(text, inputs=given)
        except UnicodeDecodeError as error:
            _invalid(functools.partial(_row, path, row + index + 1), config, reading, str(error))
            yield None


def _row(path: Path, number: int) -> str:
    return f"{path}, row {number}"


_READERS: dict[str, Callable[[Path, int, int, CorpusConfig, Reading], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".parquet": _read_parquet,
}
