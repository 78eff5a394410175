"""Hold-out rule: the assignment of documents to the training and validation splits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Literal, assert_never

from t5x_like.data.sources.document import Document, content_hash, split_hash

_MAX_BUFFERED_CHARACTERS = 2**28
"""Limit of the text that is held in memory while the first documents are counted."""
_MIN_EXPECTED_DOCUMENTS = 10
"""A hash threshold is used only if at least this many validation documents are expected."""


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """Rule that assigns a split to each document for which the source gives none.

    Attributes:
      mode: "none" holds out nothing. "hash" holds out documents whose content hash is below `bound`. "tails" holds out
        the last `fraction` of each document.
      bound: Threshold of "hash".
      fraction: Held-out share of "tails".
    """

    mode: Literal["none", "hash", "tails"]
    bound: int = 0
    fraction: float = 0.0

    def apply(self, document: Document) -> Iterator[Document]:
        """Yield the document with its split, or under "tails" its training part and its validation part."""
        if document.split is not None:
            yield document
            return
        match self.mode:
            case "none":
                yield document._replace(split="train")
            case "hash":
                hash_value = split_hash(document)
                split = "validation" if hash_value < self.bound else "train"
                cached = hash_value if document.key is None else None
                yield document._replace(split=split, hash=cached)
            case "tails":
                yield from _cut_tail(document, self.fraction)
            case _:
                assert_never(self.mode)


def plan_split(documents: Iterable[Document], validation_fraction: float) -> SplitRule:
    """Return the rule for a corpus; see `assign_splits`. Reads only as many documents as the decision needs."""
    return _plan(documents, validation_fraction)[0]


def assign_splits(documents: Iterable[Document], validation_fraction: float) -> Iterator[Document]:
    """Yield the documents, each with a split, so that about `validation_fraction` of them are held out.

    The decision is a hash of the content. A document therefore keeps its split when documents are added or removed, and
    copies of a document have the same split. A fixed hash threshold is unreliable for a small corpus, so if fewer than
    ten validation documents are expected, the threshold is set such that exactly the requested share (those with the
    lowest hashes) is held out. If that share is less than one document, or the first documents are too long to be
    buffered until they have been counted, the last lines of each document are held out.
    """
    documents = iter(documents)
    rule, buffered = _plan(documents, validation_fraction)
    for document in itertools.chain(buffered, documents):
        yield from rule.apply(document)


def _plan(documents: Iterable[Document], fraction: float) -> tuple[SplitRule, list[Document]]:
    """Return the rule and the documents that were read to find it."""
    if fraction <= 0:
        return SplitRule("none"), []
    min_documents = int(_MIN_EXPECTED_DOCUMENTS / fraction)
    buffered = list(_take(documents, min_documents, _MAX_BUFFERED_CHARACTERS))
    if any(document.key is not None for document in buffered):
        return _plan_keys(buffered, fraction, min_documents), buffered
    if len(buffered) == min_documents:
        return SplitRule("hash", bound=int(fraction * 2**64)), buffered
    hashes = sorted(content_hash(document) for document in buffered if document.split is None)
    # At least one document stays in the training split.
    num_held_out = min(round(fraction * len(hashes)), len(hashes) - 1)
    is_huge = sum(document.size for document in buffered) >= _MAX_BUFFERED_CHARACTERS
    if hashes and (is_huge or num_held_out < 1):
        return SplitRule("tails", fraction=fraction), buffered
    return SplitRule("hash", bound=hashes[num_held_out] if hashes else 0), buffered


def _plan_keys(buffered: list[Document], fraction: float, min_keys: int) -> SplitRule:
    """Return the rule for documents with keys, whose number can be much smaller than that of the documents.

    The share is that of the keys. At least one of two or more keys is held out, and no document is cut.
    """
    hashes = sorted({split_hash(document) for document in buffered if document.split is None})
    if len(hashes) >= min_keys:
        return SplitRule("hash", bound=int(fraction * 2**64))
    num_held_out = min(max(round(fraction * len(hashes)), 1), len(hashes) - 1)
    return SplitRule("hash", bound=hashes[num_held_out] if hashes else 0)


def _take(documents: Iterable[Document], count: int, characters: int) -> Iterator[Document]:
    """Yield the first `count` documents, or fewer if those have `characters` characters in total."""
    for document in itertools.islice(documents, count):
        yield document
        characters -= document.size
        if characters <= 0:
            return


def _cut_tail(document: Document, fraction: float) -> Iterator[Document]:
    """Yield the document without its last part, then that part.

    The cut is at the end of a line if there is one, otherwise at a space. Pairs are not cut, since their inputs and
    targets belong together.
    """
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
    target = min(max(int(len(text) * (1 - fraction)), 1), len(text) - 1) if len(text) > 1 else 0
    # `rfind` returns -1 without a match, so that `+ 1` gives 0, which means that the text is not cut.
    cut = max(text.rfind("\n", 0, target) + 1, 0) or text.rfind(" ", 0, target) + 1
    for part, split in ((text[:cut], "train"), (text[cut:], "validation")):
        if part.strip():
            yield Document(part, split if cut else "train")
