"""Documents on their way from a source: what a pass over them meets, and which of them are held out."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_HELD_CHARACTERS = 2**28
"""Text that is held in memory at most while the first documents are counted."""


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


def divide(documents: Iterable[Document], validation_fraction: float) -> Iterator[Document]:
    """Gives each document without a split its own, so that about `validation_fraction` of them are held out.

    A hash of the text decides, so that a document stays where it is when others come and go, and its copies stay
    together. Where the hash would be a gamble (fewer than ten expected in validation), exactly the share of documents
    with the lowest hashes is held out; where the share is less than one document, or the first documents are too long
    to be held in memory until they have been counted, the last lines of each are.
    """
    documents = iter(documents)
    if validation_fraction <= 0:
        yield from (document._replace(split=document.split or "train") for document in documents)
        return
    few = int(10 / validation_fraction)
    head = list(_first(documents, few, _HELD_CHARACTERS))
    if len(head) == few:
        bound = int(validation_fraction * 2**64)
    else:
        hashes = sorted(_hash(document.text) for document in head if document.split is None)
        held_out = min(round(validation_fraction * len(hashes)), len(hashes) - 1)
        huge = sum(len(document.text) for document in head) >= _HELD_CHARACTERS
        if hashes and (huge or held_out < 1):
            everything = itertools.chain(head, documents)
            yield from (part for document in everything for part in _cut_tail(document, validation_fraction))
            return
        bound = hashes[held_out] if hashes else 0
    for document in itertools.chain(head, documents):
        split = document.split or ("validation" if _hash(document.text) < bound else "train")
        yield document._replace(split=split)


def _first(documents: Iterator[Document], count: int, characters: int) -> Iterator[Document]:
    """The first documents: `count` of them, or as many as have `characters` in all."""
    for document in itertools.islice(documents, count):
        yield document
        characters -= len(document.text)
        if characters <= 0:
            return


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
