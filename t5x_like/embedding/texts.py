"""Texts that are to be embedded: read with their lines, and turned into ids as the model knows them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from t5x_like.config import DataConfig, DataError, RefusedError, TokenizerConfig
from t5x_like.data import tokenizers
from t5x_like.data.store import Store
from t5x_like.data.vocabulary import EOS_ID, PAD_ID

Encode = Callable[[Sequence[str], int], list[list[int]]]
"""(texts, tokens at most) -> ids, with the tokens that the model wants around a text; what is too long is cut."""


def read_texts(path: Path, field: str) -> list[str]:
    """The texts of a file of JSON lines, in order. Lines without anything are left out.

    Raises:
      DataError: unreadable, no texts, or a line that is no object with a text in `field`; the line is named.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: unreadable ({error.strerror}), expected a file of JSON lines") from None
    texts = [_text(line, field, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not texts:
        raise DataError(f'{path}: found no text, expected JSON lines like {{"{field}": "..."}}')
    return texts


def _text(line: bytes, field: str, where: str) -> str:
    expected = f"expected a JSON object with a text in {field!r}"
    try:
        fields: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: found invalid UTF-8 ({error}), expected UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: found no JSON ({error}), {expected}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where}: found a JSON {type(fields).__name__}, {expected}")
    text = fields.get(field)
    if not isinstance(text, str):
        names = ", ".join(map(repr, fields)) or "none"
        found = f"{field!r} of type {type(text).__name__}" if field in fields else f"the fields {names}"
        raise DataError(f"{where}: found {found}, {expected}; name it by --field")
    if not text.strip():
        raise DataError(f"{where}: found a blank text in {field!r}, expected one to embed")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: found half of a surrogate pair, expected text that UTF-8 can hold")
    return text


def of_store(store: Store, data: DataConfig, *, is_decoder: bool) -> Encode:
    """As a run's rows: id 0 in front for a decoder, the mode token of the labelled examples, EOS behind."""
    front = [PAD_ID] if is_decoder else []
    if data.labelled is not None and data.labelled.mode is not None:
        front.append(store.vocabulary.mode_id(data.labelled.mode))
    return _around(store.tokenizer, front)


def _around(tokenizer: tokenizers.Tokenizer, front: list[int]) -> Encode:
    def encode(texts: Sequence[str], length: int) -> list[list[int]]:
        room = max(length - len(front) - 1, 0)
        return [[*front, *ids[:room].tolist(), EOS_ID][:length] for ids in tokenizer.encode_batch(texts)]

    return encode


def of_directory(folder: Path, length: int) -> Encode:
    """Of the tokenizer files that came with an imported model: tokenizer.json, or a SentencePiece model of T5's.

    Raises:
      RefusedError: tokenizer.json, and the package that reads it is not installed.
      DataError: there is neither, or it is damaged.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        with contextlib.suppress(ImportError):
            import tokenizers as library

            return _of_library(library, path, length)
    pieces = folder / "spiece.model"
    if pieces.is_file():
        return _around(tokenizers.load(TokenizerConfig(num_sentinels=0), pieces), [])
    if path.is_file():
        raise RefusedError(f"{path}: needs the package tokenizers; install it: `pip install t5x-like[hf]`")
    raise DataError(f"{folder}: found neither tokenizer.json nor spiece.model, expected the model's tokenizer")


def _of_library(library: Any, path: Path, length: int) -> Encode:
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)
    except Exception as error:  # The package raises nothing more special.
        raise DataError(f"{path}: found no tokenizer ({error}), expected one of Hugging Face's") from None

    def encode(texts: Sequence[str], length: int) -> list[list[int]]:
        return [encoding.ids[:length] for encoding in tokenizer.encode_batch(list(texts))]

    return encode
