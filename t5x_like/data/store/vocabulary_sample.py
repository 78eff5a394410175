"""Sample of a corpus on which a vocabulary is trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from t5x_like.config.corpus import CorpusConfig
from t5x_like.data.sources import corpus_reader
from t5x_like.data.sources.document import Document, ReadStats
from t5x_like.data.sources.validation_split import assign_splits

_CHUNK_CHARACTERS = 2000
_MAX_UNITS = 64
"""Parts of the corpus that are read at the same time."""


def sample_texts(corpus: CorpusConfig, limit: int) -> list[str]:
    """Return about `limit` characters of the training split, inputs and targets alike, in chunks of at most 2,000.

    A large corpus is read at up to 64 places that are spread over it, 16 times as much as is used.

    Raises:
      DataError: the corpus cannot be read or contains no text.
    """
    stats = ReadStats()
    documents = assign_splits(_interleaved(corpus, stats), corpus.validation_fraction)
    first = next(documents, None)
    if first is None:
        raise corpus_reader.no_text_error(corpus, stats)
    documents = itertools.chain([first], documents)
    return sample_chunks((text for doc in documents if doc.split == "train" for text in doc.texts), limit)


def _interleaved(corpus: CorpusConfig, stats: ReadStats) -> Iterator[Document]:
    """Yield documents from work units in turn, so that no file or language at the end of the corpus is left out."""
    units = corpus_reader.list_work_units(corpus)
    # A fixed seed: the vocabulary is a function of the corpus, and two machines train the same one.
    chosen = [units[index] for index in sorted(np.random.default_rng(0).permutation(len(units))[:_MAX_UNITS])]
    readers = [corpus_reader.read_unit(unit, corpus, stats) for unit in chosen]
    for round_of_documents in itertools.zip_longest(*readers):
        yield from (document for document in round_of_documents if document is not None)


def sample_chunks(texts: Iterable[str], limit: int) -> list[str]:
    """Return about `limit` characters: chunks of at most 2,000, in their order, each drawn independently and with equal
    probability from the first 16 * `limit` characters.

    A stride over the chunks would prefer one side of data with a period, such as pairs or alternating languages.
    """
    chunks = [
        text[start : start + _CHUNK_CHARACTERS]
        for text in _truncate(texts, 16 * limit)
        for start in range(0, len(text), _CHUNK_CHARACTERS)
    ]
    total = sum(map(len, chunks))
    if total <= limit:
        return chunks
    drawn = np.random.default_rng(0).random(len(chunks)) < limit / total
    return list(itertools.compress(chunks, drawn))


def _truncate(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)
