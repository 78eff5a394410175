"""Formats of text files: .txt, .jsonl, .json, .csv, .tsv and CoNLL, as rows with their locations."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

import pydantic_core

from t5x_like.data.sources.document import ReadStats
from t5x_like.data.sources.file_access import open_binary, open_decompressed
from t5x_like.data.sources.row_fields import InvalidText, Row
from t5x_like.errors import DataError
from t5x_like.utils import json_reader

WHOLE_FILE = -1
"""End of a range that stands for the end of the file."""
_READ_BYTES = 2**20
_SPACE, _SEPARATOR = re.compile(r"\s*"), re.compile(r"\s*([,\]])\s*")
_ROWS_PER_UPDATE = 256
"""Rows between two updates of `ReadStats.position`."""


def read_txt(name: str, start: int, end: int, stats: ReadStats) -> Iterator[Row]:
    """Yield the whole file as one row."""
    with open_decompressed(name) as (file, position):
        data = file.read()
        stats.position += position()
    try:
        yield Row(data.decode("utf-8-sig"), lambda: name)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield Row(InvalidText(str(error)), lambda: f"{name}:{line}")


def read_jsonl(name: str, start: int, end: int, stats: ReadStats) -> Iterator[Row]:
    """Yield a row per line that begins in bytes [start, end); of a compressed file, per line."""
    with open_decompressed(name) as (file, position):
        _seek_line_start(file, start)
        first_byte = file.tell() if start else 0
        lines = file if end == WHOLE_FILE else _lines_until(file, end)
        for number, line in enumerate(_counted(lines, position, stats, start), start=1):
            if line.isspace():
                continue
            is_file_start = number == 1 and first_byte == 0
            yield _json_row(line, is_file_start, functools.partial(_line_location, name, first_byte, number))
        # The last line may end after the range.
        stats.position += 0 if end == WHOLE_FILE else end - max(position(), start)


def _counted(items: Any, position: Callable[[], int], stats: ReadStats, start: int = 0) -> Iterator[Any]:
    """Yield the items and advance `stats.position` by the bytes of the file that were read since `start`."""
    last = start
    for number, item in enumerate(items):
        yield item
        if number % _ROWS_PER_UPDATE == 0:
            now = position()
            stats.position += now - last
            last = now
    stats.position += position() - last


def _line_location(name: str, first_byte: int, number: int) -> str:
    """Return "name:line" for line `number`, counted from 1 at byte `first_byte` of the file.

    Lines before `first_byte` are counted here, on error only, since a range does not know its first line number.
    """
    return f"{name}:{_count_lines(name, first_byte) + number}"


def _seek_line_start(file: IO[bytes], start: int) -> None:
    """Move to the first line that begins at `start` or later, without holding the skipped line in memory.

    A line that begins before `start` belongs to the previous range.
    """
    if start:
        file.seek(start - 1)
        while block := file.readline(_READ_BYTES):
            if block.endswith(b"\n"):
                return


def _lines_until(file: IO[bytes], end: int) -> Iterator[bytes]:
    """Yield the lines that begin before `end`. The last one may end after it."""
    position = file.tell()
    while position < end and (line := file.readline()):
        position += len(line)
        yield line


def _count_lines(name: str, end: int) -> int:
    with open_binary(name) as file:
        count = 0
        while end > 0 and (block := file.read(min(end, _READ_BYTES))):
            count += block.count(b"\n")
            end -= len(block)
    return count


def _json_row(line: bytes, is_file_start: bool, where: Callable[[], str]) -> Row:
    """Return the row of a JSON line; the first line of a file may begin with a byte order mark."""
    try:
        value = parse_json(line)
        if value is None:
            value = json_reader.parse_json(line.decode("utf-8-sig" if is_file_start else "utf-8"))
    except UnicodeDecodeError as error:
        return Row(InvalidText(str(error)), where)
    except ValueError as error:
        return Row(DataError(f"{where()}: invalid JSON ({error}), expected one object per line"), where)
    return _object_row(value, where)


def _object_row(value: Any, where: Callable[[], str]) -> Row:
    if isinstance(value, dict):
        return Row(value, where)
    return Row(DataError(f"{where()}: found a JSON {type(value).__name__}, expected an object with fields"), where)


def parse_json(line: bytes) -> Any:
    """Return the value of a JSON text by pydantic's parser, several times faster than `json`; None if it rejects it."""
    try:
        return pydantic_core.from_json(line)
    except ValueError:
        return None


def is_json_array(name: str) -> bool:
    """Return whether a .json file is one array, and not lines."""
    with open_decompressed(name) as (file, _):
        return file.read(_READ_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def read_json(name: str, start: int, end: int, stats: ReadStats) -> Iterator[Row]:
    """Yield a row per element of an array, or per line."""
    if not is_json_array(name):
        yield from read_jsonl(name, start, end, stats)
        return
    with open_decompressed(name) as (file, position):
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape")
        for number, value in enumerate(_counted(_array_elements(text, name), position, stats), start=1):
            yield _object_row(value, functools.partial(_item_location, name, "element", number))


def _item_location(name: str, noun: str, number: int) -> str:
    return f"{name}, {noun} {number}"


def _array_elements(file: IO[str], name: str) -> Iterator[Any]:
    """Yield the elements of a JSON array, with a few elements in memory."""
    decoder = json.JSONDecoder()
    text, count = file.read(_READ_BYTES), 0
    position = text.index("[") + 1
    while True:
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        end, problem = None, "the array does not end"
        if text.startswith("]", position):
            end = _SEPARATOR.match(text, position)
        elif position < len(text):
            try:
                value, stop = decoder.raw_decode(text, position)
                end = _SEPARATOR.match(text, stop)
                problem = "no comma after the element" if stop < len(text) else problem
            except (ValueError, RecursionError) as error:
                problem = str(error)
            if end is not None:
                yield value
                count += 1
        if end is None:
            # The element, or the number at its end, may continue in the next block.
            block = file.read(max(_READ_BYTES, len(text) - position))
            if not block:
                raise DataError(f"{name}, element {count + 1}: invalid JSON ({problem}), expected an array of objects")
            text, position = text[position:] + block, 0
            continue
        position = end.end()
        if end[1] == "]":
            if text[position:] or file.read(_READ_BYTES).strip():
                raise DataError(f"{name}: found text after the array, expected one JSON array")
            return


def read_csv(name: str, start: int, end: int, stats: ReadStats, *, delimiter: str, quoted: bool) -> Iterator[Row]:
    """Yield a row per line after the header line. An empty cell is an empty text.

    Args:
      delimiter: Separator of the cells.
      quoted: Cells may be in double quotes, which may hold delimiters and line ends (RFC 4180).
    """
    csv.field_size_limit(sys.maxsize)
    with open_decompressed(name) as (file, position):
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(
            text, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=quoted
        )
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                twice = next(cell for cell in header if header.count(cell) > 1)
                raise DataError(f"{name}:1: found the field {twice!r} twice, expected different names")
            for cells in _counted(reader, position, stats):
                where = functools.partial(_numbered, name, reader.line_num)
                if not cells:
                    continue
                if len(cells) == len(header):
                    yield Row(dict(zip(header, cells, strict=True)), where)
                    continue
                found = f"{where()}: found {len(cells)} cells, expected {len(header)} as in the first line"
                yield Row(DataError(found), where)
        except csv.Error as error:
            where_found = _numbered(name, reader.line_num)
            raise DataError(f"{where_found}: invalid CSV ({error}), expected quotes as in RFC 4180") from None


def _numbered(name: str, line: int) -> str:
    return f"{name}:{line}"


_CONLLU_FIELDS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")


def read_conll(name: str, start: int, end: int, stats: ReadStats, *, universal: bool) -> Iterator[Row]:
    """Yield a row per sentence: a block of lines, each with the columns of one word.

    A field is the words of a column, joined by spaces; a space within a word is replaced by U+00A0. The fields are
    named by the number of the column, from 0, or from the end with -1.

    Args:
      universal: CoNLL-U: fields have its names (form, upos, ...), and comments, ranges of words and empty words are
        left out.
    """
    with open_decompressed(name) as (file, position):
        lines = enumerate(io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape"), start=1)
        for is_blank, block in itertools.groupby(_counted(lines, position, stats), lambda item: item[1].isspace()):
            words: list[list[str]] = []
            first = 0
            problem: DataError | None = None
            for number, line in () if is_blank else block:
                first = first or number
                cells = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
                if cells[0] == "-DOCSTART-" or (universal and (line[0] == "#" or not cells[0].isdecimal())):
                    continue
                if words and len(cells) != len(words[0]):
                    found = f"{name}:{number}: found {len(cells)} columns, expected {len(words[0])} as above"
                    problem = DataError(found)
                    break
                words.append(["\u00a0".join(cell.split()) for cell in cells])
            if problem is not None:
                yield Row(problem, functools.partial(_numbered, name, first))
            elif words:
                columns = [" ".join(column) for column in zip(*words, strict=True)]
                fields = {str(index): column for index, column in enumerate(columns)}
                fields |= {str(index - len(columns)): column for index, column in enumerate(columns)}
                named = dict(zip(_CONLLU_FIELDS, columns, strict=False)) if universal else fields
                yield Row(named, functools.partial(_numbered, name, first))
