"""Text to ids and back, for models that were trained here and for imported ones with the tokenizer they came with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from t5x_like.config import DataError, ModelConfig, RefusedError, TokenizerConfig
from t5x_like.data import tokenizers
from t5x_like.data.vocabulary import EOS_ID, PAD_ID, Vocabulary

_EXTRA_IDS = 100
"""Sentinels of T5's tables, which its SentencePiece model does not list."""


class Speller(Protocol):
    """What generation needs of a tokenizer; `Tokenizer` is one."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_marked(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def to_bytes(self, ids: Iterable[int]) -> bytes: ...


def pieces(speller: Speller, ids: Iterable[int]) -> list[bytes]:
    """What each id stands for in decoded text: its bytes, or the name of a sentinel or mode token."""

    def piece(token: int) -> bytes:
        name = speller.vocabulary.special_name(token)
        if name is None:
            return speller.to_bytes([token])
        return b"" if token in (PAD_ID, EOS_ID) else name.encode()

    return [piece(token) for token in ids]


def text_of(ids: Sequence[int], stop: bytes | None, speller: Speller) -> str:
    """Decoded text; with a stop string's place, up to there: `stop` is what is left of the pieces' bytes."""
    if stop is None:
        return speller.decode(ids)
    text = stop.decode("utf-8", errors="replace")
    whole = b"".join(pieces(speller, ids)).decode("utf-8", errors="replace")
    # The space that a tokenizer puts before the first word is no part of the text.
    return text[1:] if text.startswith(" ") and whole[1:] == speller.decode(ids) else text


def of_directory(folder: Path, model: ModelConfig) -> Speller:
    """The tokenizer beside an imported model: a SentencePiece model of T5's kind, or tokenizer.json.

    Raises:
      RefusedError: tokenizer.json, and the package that reads it is not installed.
      DataError: there is neither, or it is damaged or has more ids than the model.
    """
    sentencepiece, library = folder / "spiece.model", folder / "tokenizer.json"
    if sentencepiece.is_file() and (model.pad_id, model.eos_ids) == (PAD_ID, (EOS_ID,)):
        speller: Speller = tokenizers.load(TokenizerConfig(num_sentinels=0), sentencepiece)
        base = speller.vocabulary.base_size
        if model.vocab_size >= base + _EXTRA_IDS:
            speller = tokenizers.load(TokenizerConfig(num_sentinels=_EXTRA_IDS), sentencepiece)
        # Another order of ids in the file is another table of the model's: ours renumbers it.
        if isinstance(speller, tokenizers.SentencePieceTokenizer) and speller.ids_are_the_models:
            return _fitting(speller, folder, model)
    if library.is_file():
        return _fitting(LibraryTokenizer(library, model), folder, model)
    raise DataError(f"{folder}: found neither tokenizer.json nor T5's spiece.model, expected the model's tokenizer")


def _fitting(speller: Speller, folder: Path, model: ModelConfig) -> Speller:
    if speller.vocabulary.base_size > model.vocab_size:
        found = f"a tokenizer of {speller.vocabulary.base_size:,} ids"
        raise DataError(
            f"{folder}: found {found}, expected at most {model.vocab_size:,}, the rows of the model's table"
        )
    return speller


class LibraryTokenizer:
    """A tokenizer.json of Hugging Face's, read by the package tokenizers (the `hf` extra).

    Its ids are the model's; `<extra_id_N>` are sentinels where they are a run of ids that counts down, as in T5.
    """

    def __init__(self, path: Path, model: ModelConfig):
        try:
            import tokenizers as library
        except ImportError:
            raise RefusedError(
                f"{path}: needs the package tokenizers; install it: `pip install t5x-like[hf]`"
            ) from None
        try:
            self._tokenizer: Any = library.Tokenizer.from_file(str(path))
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            kind = json.loads(path.read_text(encoding="utf-8"))
        except Exception as error:  # The package raises nothing more special.
            raise DataError(f"{path}: found no tokenizer ({error}), expected one of Hugging Face's") from None
        self._byte_level = _byte_level_table() if "ByteLevel" in json.dumps(kind.get("decoder")) else None
        self._special = {entry["id"] for entry in kind.get("added_tokens", []) if entry.get("special")}
        first, count = self._tokenizer.token_to_id("<extra_id_0>"), 0
        while first is not None and self._tokenizer.token_to_id(f"<extra_id_{count}>") == first - count:
            count += 1
        size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.vocabulary = Vocabulary(first - count + 1, count) if count else Vocabulary(size, 0)
        whole = self._tokenizer.encode("a").ids
        self.ends_in_eos = bool(whole) and whole[-1] in model.eos_ids

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    encode_marked = encode

    def decode(self, ids: Iterable[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        vocabulary = self.vocabulary
        for token in [*ids, None]:
            if token is None or vocabulary.base_size <= token <= vocabulary.first_sentinel_id:
                parts.append(str(self._tokenizer.decode(run, skip_special_tokens=True)))
                run = []
                if token is not None:
                    parts.append(f"<extra_id_{vocabulary.first_sentinel_id - token}>")
            else:
                run.append(token)
        return "".join(parts)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self._piece, ids))

    def _piece(self, token: int) -> bytes:
        name = self._tokenizer.id_to_token(token)
        if name is None or token in self._special:
            return b""
        if self._byte_level is not None:
            return bytes(self._byte_level[character] for character in name if character in self._byte_level)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return str(name).replace("▁", " ").encode()


def _byte_level_table() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as they are, the others as characters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def is_lossless(speller: Speller) -> bool:
    """Whether a space at the beginning of a text comes back."""
    return speller.decode(speller.encode(" a")) == " a"
