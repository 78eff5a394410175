"""Prompt reader: prompts of a file of any size or of standard input, read line by line. Does not import jax."""

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

from t5x_like.errors import DataError
from t5x_like.utils.json_reader import parse_json
from t5x_like.utils.sanitize import say

MAX_NEW_TOKENS = 2**30
"""Bound with which the sum with the prompt length still fits an int32. Memory is exhausted long before."""
_LONE_SURROGATE = "found half of a surrogate pair, expected valid UTF-8 text"
_EXPECTED = 'expected a JSON object with a text "prompt"'


@dataclasses.dataclass(frozen=True)
class PromptRequest:
    """Prompt with its own settings.

    Attributes:
      prompt: Text.
      fields: JSON object that contained the prompt.
      seed, max_new_tokens, choices: Settings of this prompt, if the object has them.
      where: File and line, for messages.
    """

    prompt: str
    fields: dict[str, Any]
    seed: int | None = None
    max_new_tokens: int | None = None
    choices: tuple[str, ...] | None = None
    where: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class InputDigest:
    """Identity of an input: the number of prompts and the SHA-256 of the lines."""

    rows: int
    sha256: str


class PromptReader:
    """Prompts of a seekable source, which can be iterated repeatedly. Blank lines are skipped.

    If the name ends in .jsonl or the first line begins with "{", each line is a JSON object with a "prompt"; otherwise
    each line is a prompt.
    """

    def __init__(self, file: BinaryIO, name: str):
        self._file = file
        self._name = name
        self._is_json = name.endswith(".jsonl") or next(self._lines(), (0, ""))[1].lstrip().startswith("{")

    def check(self) -> InputDigest:
        """Read and check all lines.

        Raises:
          DataError: there are no prompts, a line is not valid UTF-8 or not a valid request, or an "id" occurs twice.
        """
        digest, rows = hashlib.sha256(), 0
        lines_of_ids: dict[bytes, int] = {}
        for number, line in self._lines():
            digest.update(line.encode() + b"\n")
            request = self._request(number, line)
            rows += 1
            if "id" in request.fields:
                # Digests of 12 bytes: a file may have millions of long ids.
                key = hashlib.blake2b(json.dumps(request.fields["id"]).encode(), digest_size=12).digest()
                if key in lines_of_ids:
                    raise DataError(
                        f"{request.where}: found the id {request.fields['id']!r} of line {lines_of_ids[key]} again, "
                        "expected each id once"
                    )
                lines_of_ids[key] = number
        if not rows:
            raise DataError(f"{self._name}: found no prompt; give --prompt TEXT, or lines of text or JSON")
        return InputDigest(rows, digest.hexdigest())

    def __iter__(self) -> Iterator[PromptRequest]:
        return (self._request(number, line) for number, line in self._lines())

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Yield (number, text) of the lines that are not blank."""
        self._file.seek(0)
        # Lines end in "\n" only: other line separators, such as U+2028, may occur inside a JSON string.
        for number, line in enumerate(self._file, start=1):
            if not line.strip():
                continue
            try:
                # A byte-order mark can be at the beginning of a file only; elsewhere it is text.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self._name}, line {number}: found an invalid byte at {error.start}, expected UTF-8 text"
                ) from None
            yield number, text.removesuffix("\n").rstrip("\r")

    def _request(self, number: int, line: str) -> PromptRequest:
        where = f"{self._name}, line {number}"
        return _parse_line(line, where) if self._is_json else PromptRequest(line, {}, where=where)


@contextlib.contextmanager
def open_prompts(path: Path | None) -> Iterator[PromptReader]:
    """Open the prompts of a file, or of standard input for None. Unseekable input is copied to a temporary file.

    Raises:
      DataError: the file cannot be read, or its first line is not valid UTF-8.
    """
    if path is None:
        if sys.stdin.isatty():
            say("reading prompts from the terminal, one per line; Ctrl-D ends them", file=sys.stderr)
        source = getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode())
        with _spool(source) as file_copy:
            yield PromptReader(file_copy, "standard input")
        return
    try:
        file = path.open("rb")
        file.peek(1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}), expected a file of prompts") from None
    # The path may be a pipe, as in `--input <(command)`.
    with file, file if file.seekable() else _spool(file) as lines:
        yield PromptReader(lines, str(path))


def _spool(source: BinaryIO) -> BinaryIO:
    """Return a temporary file with the rest of the source."""
    spool: Any = tempfile.TemporaryFile()
    shutil.copyfileobj(source, spool, 2**20)
    return cast(BinaryIO, spool)


def _parse_line(line: str, where: str) -> PromptRequest:
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: found invalid JSON ({error}), {_EXPECTED}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        found = (
            f"fields {', '.join(map(repr, fields)) or 'none'}" if isinstance(fields, dict) else type(fields).__name__
        )
        raise DataError(f"{where}: found {found}, {_EXPECTED}")
    # All fields are checked, since they are written to the output line.
    if "\\ud" in line.lower() and not is_text(json.dumps(fields, ensure_ascii=False)):
        raise DataError(f"{where}: {_LONE_SURROGATE}")
    choices = fields.get("choices")
    if choices is not None and not (
        isinstance(choices, list) and choices and all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise DataError(f"{where}: found choices {choices!r}, expected a list of texts")
    return PromptRequest(
        fields["prompt"],
        fields,
        seed=_whole_number(fields, "seed", 0, where),
        max_new_tokens=_whole_number(fields, "max_new_tokens", 1, where, MAX_NEW_TOKENS),
        choices=None if choices is None else tuple(choices),
        where=where,
    )


def _whole_number(
    fields: dict[str, Any], name: str, minimum: int, where: str, maximum: int | None = None
) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise DataError(f"{where}: found {name} {value!r}, expected a whole number of at least {minimum}")
    if maximum is not None and value > maximum:
        raise DataError(f"{where}: found {name} {value!r}, expected at most {maximum:,}")
    return value


def request_from_argument(prompt: str) -> PromptRequest:
    """Return the request for a prompt on the command line.

    Raises:
      DataError: the prompt is not valid UTF-8.
    """
    if not is_text(prompt):
        raise DataError(f"--prompt: {_LONE_SURROGATE}")
    return PromptRequest(prompt, {}, where="--prompt")


def is_text(string: str) -> bool:
    """Return True if the string can be encoded in UTF-8.

    Lone surrogates cannot. They come from escapes in JSON, and from bytes of a command-line argument that are not
    UTF-8.
    """
    return not any("\ud800" <= character <= "\udfff" for character in string)
