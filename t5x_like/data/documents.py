"""Documents on their way from a source: what a pass over them meets, and which of them are held out."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy.typing as npt

_HELD_CHARACTERS = 2**28
"""Text that is held in memory at most while the first documents are counted."""


class Document(NamedTuple):
    """A text; or a pair of texts, the inputs and targets of a supervised example; or either as ids already."""

    text: str
    """Of pairs, the targets."""
    split: str | None = None
    """"train" or "validation" where the source says so; None leaves it to `divide`."""
    inputs: str | None = None
    """Of pairs."""
    tokens: tuple[npt.NDArray[Any], ...] = ()
    """Where the source brings ids: those of the text, or of the inputs and of the targets; without EOS. The text may
    then be empty."""
    hash: int | None = None
    """Of the content, once it is known."""

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,) if self.inputs is None else (self.inputs, self.text)

    @property
    def has_text(self) -> bool:
        return bool(self.text) or not self.tokens

    @property
    def is_blank(self) -> bool:
        """No text, or a pair that lacks one of its sides."""
        if self.tokens:
            return any(not len(ids) for ids in self.tokens)
        return any(not text or text.isspace() for text in self.texts)

    @property
    def content(self) -> bytes:
        """What tells the document from others: its text, or else its ids."""
        if not self.has_text:
            return b"\0\0".join(ids.astype("<u4").tobytes() for ids in self.tokens)
        return self.text.encode() if self.inputs is None else f"{self.inputs}\0{self.text}".encode()

    @property
    def size(self) -> int:
        """Characters or ids."""
        return sum(map(len, self.tokens or self.texts))


@dataclasses.dataclass
class Reading:
    """What a pass over a source has met so far.

    Attributes:
      left_out: Documents that are not used, by reason.
      position: How much of it has been read, in the measure of the units' sizes.
    """

    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    position: int = 0


@dataclasses.dataclass(frozen=True)
class Division:
    """Which documents are held out, of those to which the source gives no split.

    Attributes:
      mode: "none" are held out, or those with a "hash" below `bound`, or the "tails" of all: their last `fraction`.
    """

    mode: Literal["none", "hash", "tails"]
    bound: int = 0
    fraction: float = 0.0

    def parts(self, document: Document) -> Iterator[Document]:
        """The document with its split, or its two parts."""
        if document.split is not None:
            yield document
        elif self.mode == "none":
            yield document._replace(split="train")
        elif self.mode == "hash":
            number = content_hash(document)
            yield document._replace(split="validation" if number < self.bound else "train", hash=number)
        else:
            yield from _cut_tail(document, self.fraction)


def plan_division(documents: Iterable[Document], validation_fraction: float) -> Division:
    """The division of a corpus, by its first documents; see `divide`. Reads no more than it must."""
    return _plan(documents, validation_fraction)[0]


def divide(documents: Iterable[Document], validation_fraction: float) -> Iterator[Document]:
    """Gives each document without a split its own, so that about `validation_fraction` of them are held out.

    A hash of the text decides, so that a document stays where it is when others come and go, and its copies stay
    together. Where the hash would be a gamble (fewer than ten expected in validation), exactly the share of documents
    with the lowest hashes is held out; where the share is less than one document, or the first documents are too long
    to be held in memory until they have been counted, the last lines of each are.
    """
    documents = iter(documents)
    division, head = _plan(documents, validation_fraction)
    for document in itertools.chain(head, documents):
        yield from division.parts(document)


def _plan(documents: Iterable[Document], fraction: float) -> tuple[Division, list[Document]]:
    """The division, and the documents that were read to find it."""
    if fraction <= 0:
        return Division("none"), []
    few = int(10 / fraction)
    head = list(_first(documents, few, _HELD_CHARACTERS))
    if len(head) == few:
        return Division("hash", bound=int(fraction * 2**64)), head
    hashes = sorted(content_hash(document) for document in head if document.split is None)
    held_out = min(round(fraction * len(hashes)), len(hashes) - 1)
    huge = sum(document.size for document in head) >= _HELD_CHARACTERS
    if hashes and (huge or held_out < 1):
        return Division("tails", fraction=fraction), head
    return Division("hash", bound=hashes[held_out] if hashes else 0), head


def _first(documents: Iterable[Document], count: int, characters: int) -> Iterator[Document]:
    """The first documents: `count` of them, or as many as have `characters` in all."""
    for document in itertools.islice(documents, count):
        yield document
        characters -= document.size
        if characters <= 0:
            return


def content_hash(document: Document) -> int:
    """64 bits of the document's content."""
    if document.hash is not None:
        return document.hash
    return int.from_bytes(hashlib.blake2b(document.content, digest_size=8).digest(), "big")


def _cut_tail(document: Document, fraction: float) -> Iterator[Document]:
    """The document without its last part, and that part: cut at the end of a line, or else at a space. Pairs are not
    cut: the two sides belong together."""
    if document.inputs is not None or len(document.tokens) > 1:
        yield document._replace(split="train")
        return
    if document.tokens:
        (ids,) = document.tokens
        cut = min(max(int(len(ids) * (1 - fraction)), 1), len(ids))
        for part_ids, split in ((ids[:cut], "train"), (ids[cut:], "validation")):
            if len(part_ids):
                yield Document("", split, tokens=(part_ids,))
        return
    text = document.text
    near = min(max(int(len(text) * (1 - fraction)), 1), len(text) - 1) if len(text) > 1 else 0
    cut = max(text.rfind("\n", 0, near) + 1, 0) or text.rfind(" ", 0, near) + 1
    for part, split in ((text[:cut], "train"), (text[cut:], "validation")):
        if part.strip():
            yield Document(part, split if cut else "train")
