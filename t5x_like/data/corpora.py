"""Sources of documents behind one interface, and their division into training and validation."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from t5x_like.config.data import CorpusConfig
from t5x_like.config.errors import DataError


class Document(NamedTuple):
    text: str
    split: str | None = None
    """"train" or "validation" where the source says so; None leaves it to `divide`."""


@dataclasses.dataclass
class Reading:
    """What a pass over a corpus has met so far.

    Attributes:
      left_out: Documents that are not used, by reason.
      parts: Files (or other units of about one size) that there are; 0 if unknown.
      part: The one that is being read.
      inside: The share of it that has been read.
    """

    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    parts: int = 0
    part: int = 0
    inside: float = 0.0

    @property
    def progress(self) -> float | None:
        """Share of the corpus that has been read; None if unknown."""
        return (self.part + self.inside) / self.parts if self.parts else None


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


def divide(documents: Iterable[Document], validation_fraction: float) -> Iterator[Document]:
    """Gives each document without a split its own, so that about `validation_fraction` of them are held out.

    A hash of the text decides, so that a document stays where it is when others come and go, and its copies stay
    together. Where the hash would be a gamble (fewer than ten expected in validation), exactly the share of documents
    with the lowest hashes is held out; where the share is less than one document, the last lines of each are.
    """
    documents = iter(documents)
    if validation_fraction <= 0:
        yield from (document._replace(split=document.split or "train") for document in documents)
        return
    few = int(10 / validation_fraction)
    head = list(itertools.islice(documents, few))
    bound = int(validation_fraction * 2**64)
    if len(head) < few:
        undecided = [document for document in head if document.split is None]
        held_out = round(validation_fraction * len(undecided))
        if undecided and not held_out:
            yield from (part for document in head for part in _cut_tail(document, validation_fraction))
            return
        hashes = sorted(_hash(document.text) for document in undecided)
        bound = hashes[held_out] if undecided else 0
    for document in itertools.chain(head, documents):
        split = document.split or ("validation" if _hash(document.text) < bound else "train")
        yield document._replace(split=split)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _cut_tail(document: Document, fraction: float) -> Iterator[Document]:
    """The document without its last part, and that part: cut at the end of a line, or else at a space."""
    if document.split is not None:
        yield document
        return
    text = document.text
    near = min(max(int(len(text) * (1 - fraction)), 1), len(text) - 1) if len(text) > 1 else 0
    cut = max(text.rfind("\n", 0, near) + 1, 0) or text.rfind(" ", 0, near) + 1
    for part, split in ((text[:cut], "train"), (text[cut:], "validation")):
        if part.strip():
            yield Document(part, split if cut else "train")
