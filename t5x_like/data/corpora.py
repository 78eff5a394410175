"""Sources of documents behind one interface."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from t5x_like.config.corpora import CorpusConfig
from t5x_like.config.errors import DataError
from t5x_like.data.documents import Document, Reading, divide


def read(config: CorpusConfig, reading: Reading) -> Iterator[Document]:
    """The corpus's documents in the source's order, empty ones left out, each with its split.

    Raises:
      DataError: the source is missing, unreadable, not of the stated form, or has no text at all.
    """
    empty = True
    for document in divide(_with_text(_source(config, reading), reading), config.validation_fraction):
        empty = False
        yield document
    if empty:
        raise DataError(f"corpus {config.name}: found no document with text ({_told(reading)}), expected at least one")


def _told(reading: Reading) -> str:
    counts = ", ".join(f"{count} left out: {reason}" for reason, count in sorted(reading.left_out.items()))
    return counts or "no documents at all"


def _source(config: CorpusConfig, reading: Reading) -> Iterator[Document]:
    if config.files:
        from t5x_like.data import text_files

        return itertools.islice(map(Document, text_files.read(config, reading)), config.max_documents)
    if config.tfds or config.task:
        from t5x_like.data import seqio_source

        return (Document(text, split) for text, split in seqio_source.read(config))
    from t5x_like.data import python_docs

    documents = python_docs.read(config.packages)[: config.max_documents]
    return (Document(text) for text in _counted(documents, reading))


def _counted(documents: list[str], reading: Reading) -> Iterator[str]:
    reading.parts = len(documents)
    for number, text in enumerate(documents):
        reading.part = number
        yield text


def _with_text(documents: Iterable[Document], reading: Reading) -> Iterator[Document]:
    for document in documents:
        if document.text.strip():
            yield document
        else:
            reading.left_out["empty"] += 1
