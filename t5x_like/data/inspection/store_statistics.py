"""Statistics of a store: lengths and repetitions of its documents, and the use of its vocabulary.

Of large splits only a part is read, so that time and memory are bounded. The results say how much was read.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.data.store.token_store import Split, Store

Ids = npt.NDArray[Any]

MAX_TOKENS = 2**25
"""Maximum tokens of a split that are read."""
MAX_DOCUMENTS = 2**20
"""Maximum documents of a split that are compared."""
_CHUNK_TOKENS = 2**20
_MAX_DECODED_TOKENS = 2**20
QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)


@dataclasses.dataclass(frozen=True)
class LengthSummary:
    """Summary of the lengths of D sequences.

    Attributes:
      count: D.
      mean: Mean length.
      quantiles: Quantiles at QUANTILES.
      edges_H, counts_H: Histogram: counts_H[i] lengths are in [edges_H[i], edges_H[i + 1]).
    """

    count: int
    mean: float
    quantiles: tuple[float, ...]
    edges_H: npt.NDArray[np.float64]
    counts_H: npt.NDArray[np.int64]


def summarize_lengths(values_D: npt.NDArray[np.int64], bins: int = 40, *, log: bool = False) -> LengthSummary:
    """Return a summary of lengths. `log` gives bins of equal ratio, for lengths that differ by orders of magnitude."""
    if not len(values_D):
        return LengthSummary(0, 0.0, (0.0,) * len(QUANTILES), np.array([0.0, 1.0]), np.zeros(1, np.int64))
    low, high = int(values_D.min()), int(values_D.max()) + 1
    if log:
        edges = np.unique(np.round(np.geomspace(max(low, 1), max(high, 2), bins + 1)))
        edges = np.append(0.0, edges) if low == 0 else edges
    else:
        width = max(-(-(high - low) // bins), 1)
        edges = np.arange(low, high + width, width, dtype=np.float64)
    counts, _ = np.histogram(values_D, edges)
    quantiles = tuple(np.quantile(values_D, QUANTILES).tolist())
    return LengthSummary(len(values_D), float(values_D.mean()), quantiles, edges, counts.astype(np.int64))


def document_lengths(
    split: Split, sequences_per_document: int, *, preferences: bool = False
) -> dict[str, npt.NDArray[np.int64]]:
    """Return the tokens of each document without EOS; for pairs, those of each of their parts."""
    bounds = split.offsets.astype(np.int64)
    sizes = bounds[1:] - bounds[:-1]
    if sequences_per_document > 1:
        negatives = [f"negative {number}" for number in range(1, sequences_per_document - 1)]
        names = ("prompts", "chosen", "rejected") if preferences else ("inputs", "targets", *negatives)
        return {name: sizes[index :: len(names)] for index, name in enumerate(names)}
    return {"documents": sizes - 1}


@dataclasses.dataclass(frozen=True)
class RepeatedDocuments:
    """Counts of documents that are equal to an earlier one, token for token.

    Attributes:
      checked: Documents that were read.
      repeated: Documents of these that equal an earlier one.
      most: Copies of the most frequent document.
    """

    checked: int
    repeated: int
    most: int

    @property
    def share(self) -> float:
        return self.repeated / self.checked if self.checked else 0.0


def repeated_documents(split: Split, sequences_per_document: int, max_tokens: int = MAX_TOKENS) -> RepeatedDocuments:
    """Count equal documents among the first ones, up to `max_tokens` tokens in total. At least one document is read."""
    bounds = split.offsets[::sequences_per_document].astype(np.int64)
    checked = max(int(np.searchsorted(bounds, max_tokens, side="right")) - 1, 1)
    checked = min(checked, len(bounds) - 1, MAX_DOCUMENTS)
    digests = []
    for tokens, inner in _documents(split, bounds[: checked + 1]):
        digests += [
            hashlib.blake2b(tokens[a:b].tobytes(), digest_size=8).digest()
            for a, b in zip(inner[:-1].tolist(), inner[1:].tolist(), strict=True)
        ]
    if sequences_per_document > 1:  # The positions of the boundaries within a pair are part of its identity.
        sizes = np.diff(split.offsets.astype(np.int64)).reshape(-1, sequences_per_document)
        cuts = [row.tobytes() for row in sizes[:checked, :-1]]
        digests = [digest + cut for digest, cut in zip(digests, cuts, strict=True)]
    if not digests:
        return RepeatedDocuments(0, 0, 0)
    _, counts = np.unique(np.array(digests), return_counts=True)
    return RepeatedDocuments(checked, checked - len(counts), int(counts.max()))


def _documents(split: Split, bounds: npt.NDArray[np.int64]) -> Iterator[tuple[Ids, npt.NDArray[np.int64]]]:
    """Yield (tokens, bounds within them) of whole documents, about `_CHUNK_TOKENS` tokens at a time."""
    first = 0
    while first < len(bounds) - 1:
        last = max(int(np.searchsorted(bounds, bounds[first] + _CHUNK_TOKENS)), first + 1)
        last = min(last, len(bounds) - 1)
        yield split.tokens(int(bounds[first]), int(bounds[last])), bounds[first : last + 1] - bounds[first]
        first = last


@dataclasses.dataclass(frozen=True)
class TokenUsage:
    """Use of a vocabulary in a text.

    Attributes:
      tokens: Tokens that were counted.
      unknown: Unknown tokens among these.
      byte_fallback: Tokens among these that are single bytes of text that no piece covers; None for a vocabulary of
        bytes.
      unused: Text pieces that did not occur.
      pieces: Text pieces of the vocabulary.
      frequent: (piece, occurrences), the most frequent first.
      words: (words, tokens) of the text that was decoded; words are separated by white space.
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


def token_usage(store: Store, split_name: str, max_tokens: int = MAX_TOKENS, max_frequent: int = 40) -> TokenUsage:
    """Count the tokens of a split; of a large one, those of chunks that are spread evenly over it."""
    split, tokenizer = store.split(split_name), store.tokenizer
    vocabulary = store.vocabulary
    base, eos_id = vocabulary.base_size, vocabulary.eos_id
    counts = np.zeros(store.vocabulary.vocab_size, np.int64)
    words = decoded = text_tokens = 0
    for tokens in _chunks(split, max_tokens):
        counts += np.bincount(tokens, minlength=len(counts))
        if decoded < _MAX_DECODED_TOKENS:
            text = tokens[: _MAX_DECODED_TOKENS - decoded]
            # EOS has no text and ends a word.
            for part in np.split(text, np.flatnonzero(text == eos_id)):
                words += len(tokenizer.to_bytes(part.tolist()).decode("utf-8", errors="replace").split())
            decoded += len(text)
            text_tokens += int((text != eos_id).sum())
    num_eos = int(counts[eos_id])  # EOS tokens are not text.
    order = np.argsort(-counts[:base], kind="stable")
    frequent = [
        (tokenizer.to_bytes([token]).decode("utf-8", errors="replace"), int(counts[token]))
        for token in order.tolist()
        if token != eos_id and counts[token]
    ]
    return TokenUsage(
        tokens=int(counts.sum()) - num_eos,
        unknown=0 if vocabulary.unk_id is None else int(counts[vocabulary.unk_id]),
        byte_fallback=None if tokenizer.byte_ids is None else int(counts[tokenizer.byte_ids].sum()),
        unused=int((counts[vocabulary.first_text_id : base] == 0).sum()),
        pieces=base - vocabulary.first_text_id,
        frequent=tuple(frequent[:max_frequent]),
        words=(words, text_tokens),
    )


def _chunks(split: Split, max_tokens: int) -> Iterator[Ids]:
    total = split.num_tokens
    count = -(-min(total, max_tokens) // _CHUNK_TOKENS)
    size = -(-min(total, max_tokens) // max(count, 1))
    for index in range(count):
        start = index * total // count
        # `count` chunks of `size` tokens, whose starts divide the split evenly.
        yield split.tokens(start, min(start + size, total))
