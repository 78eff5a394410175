"""Prompts as they come in: a file of any size, or standard input, read line by line. Knows no jax."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from t5x_like.config import DataError

MOST_NEW_TOKENS = 2**30
"""What an int32 holds, with room for the prompt; memory ends long before."""
_HALF = "found half of a surrogate pair, expected text that UTF-8 can hold"
_EXPECTED = 'expected a JSON object with a text "prompt"'


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and the JSON object that it came in.

    Attributes:
      seed, max_new_tokens, choices: Of this prompt alone, if the object has them.
      where: The file and line, for messages.
    """

    prompt: str
    fields: dict[str, Any]
    seed: int | None = None
    max_new_tokens: int | None = None
    choices: tuple[str, ...] | None = None
    where: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Digest:
    """What was read: how many prompts, and the SHA-256 of the bytes."""

    rows: int
    sha256: str


class Requests:
    """The prompts of a source that can be read more than once. Lines without anything are left out.

    Lines of JSON objects with a "prompt" where the name ends in .jsonl or the first line begins with "{"; otherwise
    each line is a prompt.
    """

    def __init__(self, file: BinaryIO, name: str):
        self._file = file
        self._name = name
        self._is_json = name.endswith(".jsonl") or next(self._lines(), (0, ""))[1].lstrip().startswith("{")

    def check(self) -> Digest:
        """Reads everything once.

        Raises:
          DataError: no prompts at all, a line that is no UTF-8 or no request, an "id" that comes twice.
        """
        digest, rows = hashlib.sha256(), 0
        lines_of_ids: dict[bytes, int] = {}
        for number, line in self._lines():
            digest.update(line.encode() + b"\n")
            request = self._request(number, line)
            rows += 1
            if "id" in request.fields:
                key = hashlib.blake2b(json.dumps(request.fields["id"]).encode(), digest_size=12).digest()
                if key in lines_of_ids:
                    raise DataError(
                        f"{request.where}: found the id {request.fields['id']!r} of line {lines_of_ids[key]} again, "
                        "expected each id once"
                    )
                lines_of_ids[key] = number
        if not rows:
            raise DataError(f"{self._name}: found no prompt; give --prompt TEXT, or lines of text or JSON")
        return Digest(rows, digest.hexdigest())

    def __iter__(self) -> Iterator[Request]:
        return (self._request(number, line) for number, line in self._lines())

    def _lines(self) -> Iterator[tuple[int, str]]:
        """(number, text) of the lines that are not blank."""
        self._file.seek(0)
        # By "\n" alone: U+2028 and its like may stand inside a JSON string.
        for number, line in enumerate(self._file, start=1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self._name}, line {number}: found a byte at {error.start} that is no UTF-8, expected UTF-8 text"
                ) from None
            yield number, text.removesuffix("\n").rstrip("\r")

    def _request(self, number: int, line: str) -> Request:
        where = f"{self._name}, line {number}"
        return _parsed(line, where) if self._is_json else Request(line, {}, where=where)


@contextlib.contextmanager
def open_requests(path: Path | None) -> Iterator[Requests]:
    """The prompts of a file, or of standard input for None; what can be read only once is kept in a temporary file.

    Raises:
      DataError: unreadable, or a first line that is no UTF-8.
    """
    if path is None:
        if sys.stdin.isatty():
            print("reading prompts from the terminal, one per line; Ctrl-D ends them", file=sys.stderr)
        source = getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode())
        with _kept(source) as kept:
            yield Requests(kept, "standard input")
        return
    try:
        file = path.open("rb")
        file.peek(1)
    except OSError as error:
        raise DataError(f"{path}: unreadable ({error.strerror}), expected a file of prompts") from None
    # A pipe has a name too: `--input <(command)`.
    with file, file if file.seekable() else _kept(file) as lines:
        yield Requests(lines, str(path))


def _kept(source: BinaryIO) -> BinaryIO:
    kept: Any = tempfile.TemporaryFile()
    shutil.copyfileobj(source, kept, 2**20)
    return cast(BinaryIO, kept)


def _parsed(line: str, where: str) -> Request:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: found no JSON ({error}), {_EXPECTED}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        found = (
            f"fields {', '.join(map(repr, fields)) or 'none'}" if isinstance(fields, dict) else type(fields).__name__
        )
        raise DataError(f"{where}: found {found}, {_EXPECTED}")
    # Of all fields, since they come back in the answer's line.
    if "\\ud" in line.lower() and not is_text(json.dumps(fields, ensure_ascii=False)):
        raise DataError(f"{where}: {_HALF}")
    choices = fields.get("choices")
    if choices is not None and not (
        isinstance(choices, list) and choices and all(isinstance(one, str) and one for one in choices)
    ):
        raise DataError(f"{where}: found choices {choices!r}, expected a list of texts")
    return Request(
        fields["prompt"],
        fields,
        seed=_whole_number(fields, "seed", 0, where),
        max_new_tokens=_whole_number(fields, "max_new_tokens", 1, where, MOST_NEW_TOKENS),
        choices=None if choices is None else tuple(choices),
        where=where,
    )


def _whole_number(fields: dict[str, Any], name: str, least: int, where: str, most: int | None = None) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DataError(f"{where}: found {name} {value!r}, expected a whole number of at least {least}")
    if most is not None and value > most:
        raise DataError(f"{where}: found {name} {value!r}, expected at most {most:,}")
    return value


def of_argument(prompt: str) -> Request:
    """The request of a prompt on the command line.

    Raises:
      DataError: bytes that are no UTF-8.
    """
    if not is_text(prompt):
        raise DataError(f"--prompt: {_HALF}")
    return Request(prompt, {}, where="--prompt")


def is_text(string: str) -> bool:
    """Whether UTF-8 can hold it. Lone surrogates, which it cannot, can be spelled by JSON, and stand for bytes of an
    argument that are no UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in string)
