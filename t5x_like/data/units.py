"""A corpus as a list of units of work: each is read and tokenised by itself, by whoever is free.

The list depends on the corpus alone, never on the number of workers, and its order is the order of the documents: so
stores are the same bytes whoever made their parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

_SMALLEST = 2**23
_LARGEST = 2**28
_MOST = 4096

Piece = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Unit:
    """Some consecutive documents of a corpus.

    Attributes:
      kind: Who reads it: `text_files`, the embedded corpus, or `seqio_source`.
      size: About how many bytes it is.
      pieces: What its reader needs to find it.
      texts: The documents themselves, of the embedded corpus.
      limit: Read only so many documents of it.
    """

    kind: Literal["files", "texts", "tfds", "task"]
    size: int
    pieces: tuple[Piece, ...] = ()
    texts: tuple[str, ...] = ()
    limit: int | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Unit:
        return Unit(**{**value, "pieces": tuple(map(tuple, value["pieces"])), "texts": tuple(value["texts"])})


def unit_bytes(total: int) -> int:
    """How large the units of a corpus of `total` bytes should be: large enough that there are few thousands, small
    enough that a kill loses little and that the last ones keep all workers busy."""
    return min(max(_SMALLEST, total // _MOST), _LARGEST)


def ranges(size: int, largest: int) -> Iterator[tuple[int, int]]:
    """[0, size) in equal parts of at most `largest`; one empty part of nothing."""
    count = max(-(-size // largest), 1)
    for index in range(count):
        yield size * index // count, size * (index + 1) // count


def grouped(pieces: Iterable[tuple[Any, int]], largest: int) -> Iterator[tuple[list[Any], int]]:
    """Consecutive (piece, size) in groups of at most `largest`, or of one piece: (pieces, their size)."""
    group: list[Any] = []
    total = 0
    for piece, size in pieces:
        if group and total + size > largest:
            yield group, total
            group, total = [], 0
        group.append(piece)
        total += size
    if group:
        yield group, total


def of_pieces(kind: Literal["files", "tfds", "task"], pieces: Sequence[tuple[Piece, int]], total: int) -> list[Unit]:
    """Units of that kind of consecutive pieces."""
    return [Unit(kind, size, tuple(group)) for group, size in grouped(pieces, unit_bytes(total))]


def of_texts(texts: Sequence[str]) -> list[Unit]:
    sized = [(text, len(text)) for text in texts]
    return [Unit("texts", size, texts=tuple(group)) for group, size in grouped(sized, unit_bytes(sum(map(len, texts))))]
