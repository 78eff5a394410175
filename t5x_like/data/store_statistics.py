"""What is in a store: lengths and repetitions of its documents, and how its tokenizer took them.

Of large splits a part is read, so that time and memory stay bounded; how much it was is told with the numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.data import sentencepiece_model
from t5x_like.data.store import Split, Store
from t5x_like.data.tokenizers import SentencePieceTokenizer, Tokenizer
from t5x_like.data.vocabulary import EOS_ID, NUM_SPECIAL, UNK_ID

Ids = npt.NDArray[Any]

MOST_TOKENS = 2**25
"""Tokens of a split that are read."""
MOST_DOCUMENTS = 2**20
"""Documents of a split that are compared."""
_BLOCK = 2**20
_DECODED = 2**20
QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of D sequences.

    Attributes:
      count, mean: D, and their mean.
      quantiles: At QUANTILES.
      edges_H, counts_H: A histogram: counts_H[i] of them are in [edges_H[i], edges_H[i + 1]).
    """

    count: int
    mean: float
    quantiles: tuple[float, ...]
    edges_H: npt.NDArray[np.float64]
    counts_H: npt.NDArray[np.int64]


def lengths(values_D: npt.NDArray[np.int64], bins: int = 40, *, log: bool = False) -> Lengths:
    """The lengths' summary; `log`: bins of equal ratio, for lengths that differ by orders of magnitude."""
    if not len(values_D):
        return Lengths(0, 0.0, (0.0,) * len(QUANTILES), np.array([0.0, 1.0]), np.zeros(1, np.int64))
    low, high = int(values_D.min()), int(values_D.max()) + 1
    if log:
        edges = np.unique(np.round(np.geomspace(max(low, 1), max(high, 2), bins + 1)))
        edges = np.append(0.0, edges) if low == 0 else edges
    else:
        width = max(-(-(high - low) // bins), 1)
        edges = np.arange(low, high + width, width, dtype=np.float64)
    counts, _ = np.histogram(values_D, edges)
    quantiles = tuple(np.quantile(values_D, QUANTILES).tolist())
    return Lengths(len(values_D), float(values_D.mean()), quantiles, edges, counts.astype(np.int64))


def document_lengths(split: Split, parts: int) -> dict[str, npt.NDArray[np.int64]]:
    """Tokens of each document, without EOS; of pairs, of "inputs" and "targets"."""
    bounds = split.offsets.astype(np.int64)
    sizes = bounds[1:] - bounds[:-1]
    if parts == 2:
        return {"inputs": sizes[0::2], "targets": sizes[1::2]}
    return {"documents": sizes - 1}


@dataclasses.dataclass(frozen=True)
class Repeats:
    """Documents that are token for token equal to an earlier one.

    Attributes:
      checked: Documents that were read.
      repeated: Of these, those that had been there before.
      most: Copies of the most frequent one.
    """

    checked: int
    repeated: int
    most: int

    @property
    def share(self) -> float:
        return self.repeated / self.checked if self.checked else 0.0


def repeated_documents(split: Split, parts: int, most_tokens: int = MOST_TOKENS) -> Repeats:
    """Equal documents among the first ones that have `most_tokens` tokens together; at least the first is read."""
    bounds = split.offsets[::parts].astype(np.int64)
    checked = max(int(np.searchsorted(bounds, most_tokens, side="right")) - 1, 1)
    checked = min(checked, len(bounds) - 1, MOST_DOCUMENTS)
    digests = []
    for tokens, inner in _documents(split, bounds[: checked + 1]):
        digests += [
            hashlib.blake2b(tokens[a:b].tobytes(), digest_size=8).digest()
            for a, b in zip(inner[:-1].tolist(), inner[1:].tolist(), strict=True)
        ]
    if parts == 2:  # the cut within a pair is a part of it
        cuts = np.diff(split.offsets.astype(np.int64))[0 : 2 * checked : 2].tolist()
        digests = [digest + cut.to_bytes(8, "little") for digest, cut in zip(digests, cuts, strict=True)]
    if not digests:
        return Repeats(0, 0, 0)
    _, counts = np.unique(np.array(digests), return_counts=True)
    return Repeats(checked, checked - len(counts), int(counts.max()))


def _documents(split: Split, bounds: npt.NDArray[np.int64]) -> Iterator[tuple[Ids, npt.NDArray[np.int64]]]:
    """(tokens, bounds within them) of whole documents, about a block at a time."""
    first = 0
    while first < len(bounds) - 1:
        last = max(int(np.searchsorted(bounds, bounds[first] + _BLOCK)), first + 1)
        last = min(last, len(bounds) - 1)
        yield split.tokens(int(bounds[first]), int(bounds[last])), bounds[first : last + 1] - bounds[first]
        first = last


@dataclasses.dataclass(frozen=True)
class TokenUse:
    """How a tokenizer took a text.

    Attributes:
      tokens: Tokens that were counted.
      unknown: Of these, unknown ones.
      byte_fallback: Of these, single bytes of text that no piece covers; None for a vocabulary of bytes.
      unused: Pieces of text that did not occur, of `pieces` that there are.
      frequent: (piece, occurrences), the most frequent first.
      words: Words, by white space, of the text that was decoded, and the tokens that it was.
    """

    tokens: int
    unknown: int
    byte_fallback: int | None
    unused: int
    pieces: int
    frequent: tuple[tuple[str, int], ...]
    words: tuple[int, int]

    @property
    def tokens_per_word(self) -> float:
        return self.words[1] / self.words[0] if self.words[0] else float("nan")


def token_use(store: Store, split_name: str, most_tokens: int = MOST_TOKENS, most_frequent: int = 40) -> TokenUse:
    """Counts the tokens of a split; of a large one, those of blocks that are spread evenly over it."""
    split, tokenizer = store.split(split_name), store.tokenizer
    base = store.vocabulary.base_size
    counts = np.zeros(store.vocabulary.vocab_size, np.int64)
    words = decoded = text_tokens = 0
    for tokens in _blocks(split, most_tokens):
        counts += np.bincount(tokens, minlength=len(counts))
        if decoded < _DECODED:
            text = tokens[: _DECODED - decoded]
            # EOS, which stands for no text, ends a word.
            for part in np.split(text, np.flatnonzero(text == EOS_ID)):
                words += len(tokenizer.to_bytes(part.tolist()).decode("utf-8", errors="replace").split())
            decoded += len(text)
            text_tokens += int((text != EOS_ID).sum())
    ends = int(counts[EOS_ID])
    order = np.argsort(-counts[:base], kind="stable")
    frequent = [
        (tokenizer.to_bytes([token]).decode("utf-8", errors="replace"), int(counts[token]))
        for token in order.tolist()
        if token != EOS_ID and counts[token]
    ]
    fallback = fallback_ids(tokenizer)
    return TokenUse(
        tokens=int(counts.sum()) - ends,
        unknown=int(counts[UNK_ID]),
        byte_fallback=None if fallback is None else int(counts[fallback].sum()),
        unused=int((counts[NUM_SPECIAL:base] == 0).sum()),
        pieces=base - NUM_SPECIAL,
        frequent=tuple(frequent[:most_frequent]),
        words=(words, text_tokens),
    )


def fallback_ids(tokenizer: Tokenizer) -> npt.NDArray[np.int64] | None:
    """Ids of single bytes in a vocabulary of pieces; None where every id is one."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return None
    kept = [piece for piece in sentencepiece_model.pieces(tokenizer.model) if piece.holds_text]
    return NUM_SPECIAL + np.flatnonzero([piece.is_byte for piece in kept])


def _blocks(split: Split, most_tokens: int) -> Iterator[Ids]:
    total = split.num_tokens
    count = -(-min(total, most_tokens) // _BLOCK)
    size = -(-min(total, most_tokens) // max(count, 1))
    for index in range(count):
        start = index * total // count
        yield split.tokens(start, min(start + size, total))
