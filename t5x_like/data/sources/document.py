"""Document: the record that every source yields, and the statistics of a pass over a source."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from typing import Any, NamedTuple

import numpy.typing as npt


class Document(NamedTuple):
    """A text, the inputs and targets of a supervised example, or a preference pair. It may already be token ids."""

    text: str
    """The text; of a pair, the targets."""
    split: str | None = None
    """"train", "validation" or "test" if the source defines splits. None: `validation_split.assign_splits` decides."""
    inputs: str | None = None
    """Inputs of a pair; None for plain text."""
    tokens: tuple[npt.NDArray[Any], ...] = ()
    """Token ids without EOS if the source supplies them: one array for a text, two (inputs, targets) for a pair. `text`
    may then be empty."""
    hash: int | None = None
    """Cached result of `content_hash`."""
    key: str | None = None
    """Documents with the same key are held out together; None: each document is decided by its content."""
    rejected: str | None = None
    """Rejected answer of a preference pair, whose inputs are the prompt and whose text is the chosen answer."""

    negatives: tuple[str, ...] = ()
    """Hard negatives of a pair of texts that match, completed by empty texts to `CorpusConfig.max_negatives`."""

    @property
    def texts(self) -> tuple[str, ...]:
        return (*self._required_texts, *self.negatives)

    @property
    def _required_texts(self) -> tuple[str, ...]:
        if self.inputs is None and self.rejected is None:  # Most documents; `prepare` asks several times for each.
            return (self.text,)
        return tuple(text for text in (self.inputs, self.text, self.rejected) if text is not None)

    @property
    def has_text(self) -> bool:
        return bool(self.text) or not self.tokens

    @property
    def is_blank(self) -> bool:
        """True if there is no text, or if a pair lacks a part."""
        if self.tokens:
            return any(not len(ids) for ids in self.tokens)
        return any(not text or text.isspace() for text in self._required_texts)

    @property
    def content(self) -> bytes:
        """Bytes that identify the document: its text, or its ids if it has no text."""
        if not self.has_text:
            return b"\0\0".join(ids.astype("<u4").tobytes() for ids in self.tokens)
        return "\0".join(self.texts).encode()

    @property
    def size(self) -> int:
        """Number of ids if the document has ids, otherwise number of characters."""
        return sum(map(len, self.tokens or self.texts))


@dataclasses.dataclass
class ReadStats:
    """Statistics of a pass over a source, updated while it is read.

    Attributes:
      left_out: Number of documents that were not used, by reason.
      position: Amount that has been read so far, in the unit of `WorkUnit.size`.
      quarantine: Messages of the rows that were left out because they are invalid. Each begins with the location.
    """

    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    position: int = 0
    quarantine: list[str] = dataclasses.field(default_factory=list)


def split_hash(document: Document) -> int:
    """Return the 64-bit hash that decides the split: that of the key, or of the content if there is no key."""
    if document.key is None:
        return content_hash(document)
    return int.from_bytes(hashlib.blake2b(document.key.encode(), digest_size=8).digest(), "big")


def content_hash(document: Document) -> int:
    """Return a 64-bit hash of the document's content."""
    if document.hash is not None:
        return document.hash
    return int.from_bytes(hashlib.blake2b(document.content, digest_size=8).digest(), "big")
