"""Tokenizers: UTF-8 bytes, and SentencePiece models brought along or trained here.

Whatever the order of ids in a model file, ids here are pad 0, eos 1, unk 2, then its pieces in their order: for T5's
file and for ByT5's bytes these are the ids that seqio and the published checkpoints use.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.corpora import TokenizerConfig
from t5x_like.config.errors import ConfigError, DataError, Problem
from t5x_like.config.objectives import MODES, Mode
from t5x_like.data import sentencepiece_model
from t5x_like.data.vocabulary import EOS_ID, NUM_SPECIAL, PAD_ID, UNK_ID, TokenTraits, Vocabulary

Ids = npt.NDArray[np.integer[Any]]

_EXTRA_ID = re.compile(r"▁?<extra_id_(\d{1,6})>")
_UNKNOWN = "⁇".encode()
_STOPS = (".", "!", "?", "。", "！", "？")
_STRETCH = 2**20
_GROUP = 2**23


class Tokenizer(abc.ABC):
    """Text to ids and back. Subclasses say how text is encoded and which bytes each id stands for."""

    def __init__(self, pieces: Sequence[bytes], num_sentinels: int, kind: str, *, strip_first_space: bool = False):
        """`pieces`: the bytes that each id below the sentinels stands for."""
        self._pieces = pieces
        self._strip_first_space = strip_first_space
        self.vocabulary = Vocabulary(base_size=len(pieces), num_sentinels=num_sentinels)
        joined = b"\0".join(str(len(piece)).encode() + b":" + piece for piece in pieces)
        self._piece_bytes = np.array([len(piece) for piece in pieces] + [0], np.int64)
        self.fingerprint = hashlib.sha256(f"{kind} {num_sentinels} ".encode() + joined).hexdigest()[:32]
        """Of the pieces in their order, not of the file, which records how it was trained."""

    pad_id = PAD_ID
    eos_id = EOS_ID
    unk_id = UNK_ID

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
        """Which pieces begin words and end sentences."""
        closed = [piece.decode("utf-8", errors="replace").rstrip("\"'”’»)]") for piece in self._pieces]
        word_starts = np.array([piece[:1].isspace() for piece in self._pieces])
        sentence_ends = np.array([text.endswith(_STOPS) or "\n" in text for text in closed])
        word_starts[EOS_ID] = sentence_ends[EOS_ID] = True
        return TokenTraits(word_starts, sentence_ends)

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[Ids]:
        """Ids of each text, without EOS. Text never becomes a sentinel or a mode token, whatever it spells."""

    def has_pieces_of(self, other: Tokenizer) -> bool:
        """Whether the ids of text, that is all below the sentinels, stand for the same bytes."""
        return list(self._pieces) == list(other._pieces)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_marked(self, text: str) -> list[int]:
        """Like `encode`, but `<extra_id_7>` and `[R]`, `[S]`, `[X]` in the text become their reserved ids.

        Raises:
          DataError: a sentinel beyond those of the vocabulary.
        """
        ids: list[int] = []
        for part in re.split(r"(<extra_id_\d{1,6}>|\[[RSX]\])", text):
            if part.startswith("<extra_id_") and (match := _EXTRA_ID.fullmatch(part)):
                if int(match[1]) >= self.vocabulary.num_sentinels:
                    count = self.vocabulary.num_sentinels
                    raise DataError(f"found {part}, expected a sentinel below {count}: the vocabulary has {count}")
                ids.append(self.sentinel_id(int(match[1])))
            elif len(part) == 3 and part[1] in MODES and part[0] + part[2] == "[]":
                ids.append(self.mode_id(part[1]))
            elif part:
                ids.extend(self.encode(part))
        return ids

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes that the ids stand for: additive over any cut of a token sequence.

        Pad, EOS, sentinels and mode tokens stand for none. A cut inside a character gives a part of its bytes.
        """
        return b"".join(self._pieces[token] for token in ids if token < len(self._pieces))

    def num_bytes(self, ids: Ids) -> int:
        """How many bytes `to_bytes` would return."""
        return int(self._piece_bytes.take(ids, mode="clip").sum())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; sentinels and mode tokens are spelled out, pad and EOS are left out, and bytes that are no
        UTF-8 become U+FFFD."""
        text = bytearray()
        for token in ids:
            name = self.vocabulary.special_name(token)
            if name is None:
                text += self._pieces[token]
            elif token not in (PAD_ID, EOS_ID):
                text += name.encode()
        decoded = text.decode("utf-8", errors="replace")
        return decoded[1:] if self._strip_first_space and decoded.startswith(" ") else decoded


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes; the id of a byte is its value plus 3, as in ByT5 and seqio."""

    def __init__(self, num_sentinels: int):
        pieces = [b"", b"", _UNKNOWN, *(bytes([value]) for value in range(256))]
        super().__init__(pieces, num_sentinels, "bytes")

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[Ids]:
        del num_threads
        return [np.frombuffer(text.encode(), np.uint8) + np.uint16(NUM_SPECIAL) for text in texts]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Its own control pieces other than pad and EOS are left out, its `<extra_id_*>` pieces
    become our sentinels."""

    def __init__(self, model: bytes, num_sentinels: int, source: str):
        import sentencepiece

        entries = sentencepiece_model.pieces(model)
        extra = {entry for entry in entries if _EXTRA_ID.fullmatch(entry.piece)}
        if extra and len(extra) < num_sentinels:
            fix = f"set it to at most {len(extra)} or bring a model with more"
            expected = f"at most the {len(extra)} <extra_id_*> pieces of {source}"
            raise ConfigError([Problem("data.tokenizer.num_sentinels", str(num_sentinels), expected, fix)])
        self.model = model
        if extra:  # without these pieces, text that spells a sentinel is text
            self.model = sentencepiece_model.without(model, lambda entry: bool(_EXTRA_ID.fullmatch(entry.piece)))
            entries = [entry for entry in entries if entry not in extra]
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(self.model)

        text_pieces: list[bytes] = []
        to_ours = np.full(len(entries), UNK_ID, np.int32)
        for index, entry in enumerate(entries):
            if entry.holds_text:
                to_ours[index] = NUM_SPECIAL + len(text_pieces)
                text_pieces.append(entry.bytes())
        same = np.array_equal(to_ours[NUM_SPECIAL:], np.arange(NUM_SPECIAL, len(to_ours)))
        self.ids_are_the_models = same and self._processor.unk_id() == UNK_ID
        """The model numbers its pieces as we do; text never becomes a control piece, so that these do not matter."""
        self._to_ours = to_ours
        probe = self._processor.encode("a", out_type=str)
        super().__init__(
            [b"", b"", b" " + _UNKNOWN + b" ", *text_pieces],
            len(extra) or num_sentinels,
            "sentencepiece",
            strip_first_space="".join(probe).startswith("▁"),
        )

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[Ids]:
        parts = [(index, part) for index, text in enumerate(texts) for part in _stretches(text)]
        ids: list[list[Ids]] = [[] for _ in texts]
        for group in _groups(parts):
            encoded = self._encode_group([part for _, part in group], num_threads)
            for (index, _), part_ids in zip(group, encoded, strict=True):
                ids[index].append(part_ids if self.ids_are_the_models else self._to_ours[part_ids])
        return [parts_ids[0] if len(parts_ids) == 1 else np.concatenate(parts_ids) for parts_ids in ids]

    def _encode_group(self, texts: list[str], num_threads: int) -> list[Ids]:
        if hasattr(self._processor, "EncodeAsNumpy"):  # since 0.2.2, and a fifth faster than by lists
            return self._processor.encode(texts, return_type="numpy", num_threads=num_threads)
        return [np.array(part, np.int32) for part in self._processor.encode(texts, num_threads=num_threads)]


def _groups(parts: Sequence[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Some megabytes at a time: SentencePiece returns lists of Python numbers, which take ten times their text."""
    group: list[tuple[int, str]] = []
    size = 0
    for part in parts:
        group.append(part)
        size += len(part[1])
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _stretches(text: str) -> Iterator[str]:
    """Long texts in parts of about a megabyte, so that their lattice of pieces fits into memory. They are cut after a
    newline, where no piece goes on; if there is none, before a space; if there is none either, anywhere."""
    start = 0
    while len(text) - start > _STRETCH:
        near = start + _STRETCH
        cut = text.rfind("\n", start, near) + 1
        if cut <= start:
            cut = text.rfind(" ", start + 1, near)
        if cut <= start:
            cut = near
        yield text[start:cut]
        start = cut
    yield text[start:]


def load(config: TokenizerConfig, path: Path | None) -> Tokenizer:
    """The tokenizer of `config`; `path` is its SentencePiece model, None for bytes.

    Raises:
      DataError: the file is missing or is no SentencePiece model.
      ConfigError: more sentinels are asked for than the file brings.
    """
    try:
        return from_model(config, path.read_bytes() if path else None, str(path))
    except OSError as error:
        raise DataError(f"{path}: unreadable ({error.strerror}), expected a SentencePiece model") from None


def from_model(config: TokenizerConfig, model: bytes | None, source: str) -> Tokenizer:
    """The tokenizer of `config` with the contents of its model file, None for bytes; `source` names it in errors."""
    if config.kind == "bytes":
        return ByteTokenizer(config.num_sentinels)
    if model is None:
        raise DataError(
            "data.tokenizer.path: found none, expected a SentencePiece model; `t5x-like prepare` trains one"
        )
    try:
        return SentencePieceTokenizer(model, config.num_sentinels, source)
    except (ValueError, RuntimeError, OSError, IndexError) as error:
        raise DataError(f"{source}: found no SentencePiece model ({error}), expected one") from None


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """A unigram model of `vocab_size` pieces (pad, eos and unk included) that loses nothing: no normalisation, a piece
    for the newline and for runs of spaces, and a byte for what has no piece.

    Args:
      texts: Documents to learn from. Their order matters, the number of processors does not.
      vocab_size: Number of pieces; at least 3 specials, 256 bytes, the newline and the characters of the text.

    Raises:
      DataError: the texts are too few or too uniform for that many pieces, or have more characters than that.
    """
    import sentencepiece

    lines = (line for text in texts for line in text.split("\n") if line.strip())
    chunks = (line[start : start + 1000] for line in lines for start in range(0, len(line), 1000))
    first = next(iter(chunks), None)
    if first is None:
        raise DataError("found no text to train a tokenizer on, expected at least one document that is not blank")
    sentencepiece.set_random_generator_seed(0)
    output = sentencepiece_model.Output()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_prepend(first, chunks),
            model_writer=output,
            model_type="unigram",
            vocab_size=vocab_size,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from None
    return output.getvalue()


def _prepend(first: str, rest: Iterable[str]) -> Iterable[str]:
    yield first
    yield from rest


def _training_error(message: str, vocab_size: int) -> DataError:
    where = "data.tokenizer.vocab_size"
    if too_high := re.search(r"value <= (\d+)", message):
        return DataError(
            f"{where}: found {vocab_size}, expected at most {too_high[1]}, which is what the corpus has pieces for; "
            "lower it, bring more text or use the byte vocabulary (--data.tokenizer.kind bytes)"
        )
    if too_low := re.search(r"required_chars\D+(\d+) vs (\d+)|(\d+) vs (\d+)", message):
        needed = max(int(number) for number in too_low.groups() if number)
        return DataError(f"{where}: found {vocab_size}, expected more than {needed}: specials, bytes and characters")
    return DataError(f"{where}: no tokenizer of {vocab_size} pieces could be trained on the corpus ({message})")
