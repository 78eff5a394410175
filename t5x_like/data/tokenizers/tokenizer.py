"""Tokenizer interface and its base class: text to token ids and back.

Every `Tokenizer` of this package numbers its ids alike, whatever the order of ids in a model file: pad 0, eos 1, unk 2,
then the text pieces in their order, then sentinels and mode tokens. For T5's SentencePiece file and for ByT5's bytes
these are the ids that seqio and the published checkpoints use. An imported model may bring a tokenizer with other ids
(`huggingface.HuggingFaceTokenizer`); `TokenizerProtocol` is what both have in common.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import MODES, Mode
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary
from t5x_like.errors import DataError

Ids = npt.NDArray[np.integer[Any]]

EXTRA_ID = re.compile(r"▁?<extra_id_(\d{1,6})>")
"""Name of a sentinel in text and in SentencePiece models."""
UNKNOWN = "⁇".encode()
"""Text of the unknown token, as SentencePiece decodes it."""
_STOPS = (".", "!", "?", "。", "！", "？")


class TokenizerProtocol(Protocol):
    """Interface that a model needs from a tokenizer; `Tokenizer` adds what preparing data needs."""

    @property
    def ends_in_eos(self) -> bool | None:
        """True or false if the tokenizer itself decides whether EOS is put at the end of a text; otherwise None."""
        ...

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def fingerprint(self) -> str:
        """Digest of the vocabulary."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text alone, without EOS or other special tokens."""
        ...

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of a text in which the names of sentinels and mode tokens stand for their ids."""
        ...

    def encode_with_special_tokens(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Return the ids of each text as the inputs of an encoder: with the special tokens around it (EOS at the end,
        or the tokenizer's own), truncated to `max_length` tokens with them."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def to_bytes(self, ids: Iterable[int]) -> bytes: ...


def pieces(tokenizer: TokenizerProtocol, ids: Iterable[int]) -> list[bytes]:
    """Return the bytes that each id adds to decoded text, or the name of a sentinel or mode token."""

    def piece(token: int) -> bytes:
        name = tokenizer.vocabulary.special_name(token)
        if name is None:
            return tokenizer.to_bytes([token])
        vocabulary = tokenizer.vocabulary
        return b"" if token in (vocabulary.pad_id, vocabulary.eos_id) else name.encode()

    return [piece(token) for token in ids]


def have_same_pieces(first: TokenizerProtocol, second: TokenizerProtocol) -> bool:
    """Return whether the same ids stand for the same text in both: all ids below the sentinels but pad, EOS and unk,
    and whether documents end in the same id."""
    one, two = first.vocabulary, second.vocabulary
    if (one.base_size, one.eos_id) != (two.base_size, two.eos_id):
        return False
    ids = [token for token in range(one.base_size) if token not in (one.pad_id, one.eos_id, one.unk_id, two.unk_id)]
    return all(first.to_bytes([token]) == second.to_bytes([token]) for token in ids)


def text_of(ids: Sequence[int], stop: bytes | None, tokenizer: TokenizerProtocol) -> str:
    """Return decoded text, cut at a stop string.

    Args:
      stop: Bytes of the pieces before the stop string; None if the text has none.
    """
    if stop is None:
        return tokenizer.decode(ids)
    text = stop.decode("utf-8", errors="replace")
    whole = b"".join(pieces(tokenizer, ids)).decode("utf-8", errors="replace")
    # A space that the tokenizer puts before the first word is not part of the text.
    return text[1:] if text.startswith(" ") and whole[1:] == tokenizer.decode(ids) else text


def is_lossless(tokenizer: TokenizerProtocol) -> bool:
    """Return whether a space at the beginning of a text survives encoding and decoding."""
    return tokenizer.decode(tokenizer.encode(" a")) == " a"


class Tokenizer(abc.ABC):
    """Tokenizer with the ids of this package. Subclasses define how text is encoded and the bytes of each id."""

    ends_in_eos: bool | None = None
    model: bytes | None = None
    """Contents of the file that the tokenizer is loaded from; None if it needs none."""
    byte_ids: Ids | None = None
    """Ids of single bytes, for text that no other piece covers; None if there are none or no others."""

    def __init__(
        self,
        pieces: Sequence[bytes],
        num_sentinels: int,
        kind: str,
        *,
        vocabulary: Vocabulary | None = None,
        strip_first_space: bool = False,
    ):
        """Initialize the vocabulary.

        Args:
          pieces: Bytes that each id below the sentinels stands for.
          vocabulary: Layout of the ids; None: pad 0, EOS 1, unk 2, then pieces of text.
          strip_first_space: Encoding puts a space before a text, which decoding removes again.
        """
        self._pieces = pieces
        self._strip_first_space = strip_first_space
        own_layout = Vocabulary(base_size=len(pieces), num_sentinels=num_sentinels)
        self.vocabulary = own_layout if vocabulary is None else vocabulary
        layout = f"{kind} {num_sentinels} " if self.vocabulary == own_layout else f"{kind} {self.vocabulary} "
        joined = b"\0".join(str(len(piece)).encode() + b":" + piece for piece in pieces)
        self._piece_bytes = np.array([len(piece) for piece in pieces] + [0], np.int64)
        self.fingerprint = hashlib.sha256(layout.encode() + joined).hexdigest()[:32]
        """Digest of the pieces in their order. The model file itself also records how it was trained."""

    @property
    def pad_id(self) -> int:
        return self.vocabulary.pad_id

    @property
    def eos_id(self) -> int:
        return self.vocabulary.eos_id

    @property
    def unk_id(self) -> int | None:
        return self.vocabulary.unk_id

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.vocab_size

    @property
    def mask_id(self) -> int:
        return self.vocabulary.mask_id

    def sentinel_id(self, index: int) -> int:
        return self.vocabulary.sentinel_id(index)

    def mode_id(self, mode: Mode) -> int:
        return self.vocabulary.mode_id(mode)

    @functools.cached_property
    def traits(self) -> TokenTraits:
        """Pieces that begin words and pieces that end sentences."""
        closed = [piece.decode("utf-8", errors="replace").rstrip("\"'”’»)]") for piece in self._pieces]
        word_starts = np.array([piece[:1].isspace() for piece in self._pieces])
        sentence_ends = np.array([text.endswith(_STOPS) or "\n" in text for text in closed])
        word_starts[self.eos_id] = sentence_ends[self.eos_id] = True
        return TokenTraits(word_starts, sentence_ends, self.eos_id)

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[Ids]:
        """Return the ids of each text, without EOS. Text never becomes a sentinel or a mode token, even if it spells
        the name of one."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_marked(self, text: str) -> list[int]:
        """Return ids like `encode`, but `<extra_id_7>` and `[R]`, `[S]`, `[X]` in the text become their reserved ids.

        Raises:
          DataError: the text names a sentinel beyond those of the vocabulary.
        """
        if not self.vocabulary.has_modes:
            return self.encode(text)
        ids: list[int] = []
        for part in re.split(r"(<extra_id_\d{1,6}>|\[[RSX]\])", text):
            if part.startswith("<extra_id_") and (match := EXTRA_ID.fullmatch(part)):
                if int(match[1]) >= self.vocabulary.num_sentinels:
                    count = self.vocabulary.num_sentinels
                    raise DataError(f"found {part}, expected a sentinel below {count}: the vocabulary has {count}")
                ids.append(self.sentinel_id(int(match[1])))
            elif len(part) == 3 and part[1] in MODES and part[0] + part[2] == "[]":
                ids.append(self.mode_id(part[1]))
            elif part:
                ids.extend(self.encode(part))
        return ids

    def encode_with_special_tokens(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Return the ids of each text with EOS, at most `max_length` of them with it."""
        longest = max(max_length - 1, 0)
        return [[*ids[:longest].tolist(), self.eos_id][:max_length] for ids in self.encode_batch(texts)]

    def word_starts(self, text: str) -> list[int]:
        """Return the index in `encode(text)` of the first token of each whitespace-separated word."""
        return self.word_starts_of(self.encode(text))

    def word_starts_of(self, ids: Sequence[int]) -> list[int]:
        """Return the indices of the tokens with the first byte of a word after white space, as far as ids show it."""
        starts, inside = [], False
        for position, token in enumerate(ids):
            piece = self.to_bytes([token])
            # A piece could end one word and begin another only if it contained a space, which vocabularies avoid.
            words = piece.split()
            if words and (not inside or piece[:1].isspace()):
                starts.append(position)
            if piece:
                inside = bool(words) and not piece[-1:].isspace()
        return starts

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes that the ids stand for: additive over any cut of a token sequence.

        Pad, EOS, sentinels and mode tokens stand for no bytes. A cut inside a character gives a part of its bytes.
        """
        return b"".join(self._pieces[token] for token in ids if token < len(self._pieces))

    def num_bytes(self, ids: Ids) -> int:
        """Return the number of bytes that `to_bytes` would return."""
        return int(self._piece_bytes.take(ids, mode="clip").sum())

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids. Sentinels and mode tokens appear by name, pad and EOS are left out, and bytes
        that are not UTF-8 become U+FFFD."""
        text, left_out = bytearray(), (self.pad_id, self.eos_id)
        for token in ids:
            if token in left_out:
                continue
            if token < len(self._pieces):
                text += self._pieces[token]
            else:
                text += str(self.vocabulary.special_name(token)).encode()
        decoded = text.decode("utf-8", errors="replace")
        return decoded[1:] if self._strip_first_space and decoded.startswith(" ") else decoded
