"""The user's own text: .txt, .jsonl, .jsonl.gz and .parquet."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path

from t5x_like.config.corpora import CorpusConfig
from t5x_like.config.errors import DataError
from t5x_like.data.documents import Reading


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
            _reader(path)
            if not path.is_file():
                kind = "a link to nothing" if path.is_symlink() else "no regular file"
                raise DataError(f"{path}: found {kind}, expected a file of text")
            found[path] = None
    return list(found)


def read(config: CorpusConfig, reading: Reading) -> Iterator[str]:
    """The texts of all documents.

    Raises:
      DataError: with the file, and the line or row where there is one.
    """
    paths = matching(config.files)
    reading.parts = len(paths)
    for number, path in enumerate(paths):
        reading.part, reading.inside = number, 0.0
        try:
            yield from _reader(path)(path, config, reading)
        except OSError as error:
            if isinstance(error, gzip.BadGzipFile):
                raise DataError(f"{path}: found no gzip data ({error}), expected a whole .gz file") from None
            raise DataError(f"{path}: unreadable ({error.strerror or error}), expected a text file") from None


def _reader(path: Path) -> Callable[[Path, CorpusConfig, Reading], Iterator[str]]:
    for suffix, reader in _READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise DataError(f"{path}: found an unknown kind of file, expected one of {', '.join(_READERS)}")


def _invalid(where: str, config: CorpusConfig, reading: Reading, detail: str) -> None:
    """Counts a document that is no UTF-8, or stops there."""
    if config.invalid_utf8 == "refuse":
        raise DataError(
            f"{where}: found invalid UTF-8 ({detail}), expected UTF-8 text; convert the file, or leave such documents "
            "out with --data.corpus.invalid-utf8 skip"
        )
    reading.left_out["invalid UTF-8"] += 1


def _read_txt(path: Path, config: CorpusConfig, reading: Reading) -> Iterator[str]:
    data = path.read_bytes()
    try:
        yield data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        _invalid(f"{path}:{line}", config, reading, str(error))


def _read_jsonl(path: Path, config: CorpusConfig, reading: Reading) -> Iterator[str]:
    with open(path, "rb") as file:
        yield from _json_lines(file, file, path, config, reading)


def _read_jsonl_gz(path: Path, config: CorpusConfig, reading: Reading) -> Iterator[str]:
    with open(path, "rb") as file, gzip.GzipFile(fileobj=file) as lines:
        try:
            yield from _json_lines(lines, file, path, config, reading)
        except (EOFError, zlib.error) as error:
            raise DataError(f"{path}: found a truncated or damaged gzip file ({error}), expected a whole one") from None


def _json_lines(
    lines: Iterable[bytes], file: BufferedReader, path: Path, config: CorpusConfig, reading: Reading
) -> Iterator[str]:
    """`file` is where the lines come from, packed or not: its position says how far the reading is."""
    field = config.text_field
    size = max(path.stat().st_size, 1)
    for number, line in enumerate(lines, start=1):
        if number % 256 == 0:
            reading.inside = min(file.tell() / size, 1.0)
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            _invalid(where, config, reading, str(error))
            continue
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: found no JSON ({error}), expected one object per line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: found a JSON {type(row).__name__}, expected an object with the field {field!r}")
        if field not in row:
            names = ", ".join(map(repr, row)) or "none"
            raise DataError(
                f"{where}: found the fields {names}, expected {field!r}; name it by --data.corpus.text-field"
            )
        text = row[field]
        if not isinstance(text, str):
            raise DataError(f"{where}: found {field!r} of type {type(text).__name__}, expected a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell
            _invalid(where, config, reading, str(error))
            continue
        yield text


def _read_parquet(path: Path, config: CorpusConfig, reading: Reading) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    field = config.text_field
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: found no Parquet file ({error}), expected one") from None
    with table:
        names = table.schema_arrow.names
        if field not in names:
            columns = ", ".join(map(repr, names)) or "none"
            raise DataError(
                f"{path}: found the columns {columns}, expected {field!r}; name it by --data.corpus.text-field"
            )
        if names.count(field) > 1:
            raise DataError(f"{path}: found {names.count(field)} columns {field!r}, expected one")
        kind = table.schema_arrow.field(field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{path}: found the column {field!r} of type {kind}, expected strings")
        row = 0
        try:
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    try:
                        yield value.as_py() or ""
                    except UnicodeDecodeError as error:
                        _invalid(f"{path}, row {row}", config, reading, str(error))
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: unreadable after row {row} ({error}), expected a whole Parquet file") from None


_READERS: dict[str, Callable[[Path, CorpusConfig, Reading], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".parquet": _read_parquet,
}
