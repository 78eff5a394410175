"""Work units: a corpus as a list of pieces that are read and tokenised independently of each other.

The list depends on the corpus alone, never on the number of workers, and its order is the order of the documents.
Stores are therefore the same bytes whichever process made which shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

MIN_UNIT_BYTES = 2**23
MAX_UNIT_BYTES = 2**28
MAX_UNITS = 4096

UnitKind = Literal["files", "texts", "tfds", "task", "generator"]
FileRange = tuple[str | int, ...]
"""Address of consecutive documents for the reader: (path, start, end), (split, start, stop), (Task, split, shard,
number of shards), or (split,)."""


@dataclasses.dataclass(frozen=True)
class WorkUnit:
    """Consecutive documents of a corpus.

    Attributes:
      kind: Reader of the unit: `text_files`, the embedded corpus ("texts"), `tfds_and_seqio` or `generators`.
      size: Approximate size in bytes.
      pieces: Ranges that the reader reads, in order.
      texts: The documents themselves (embedded corpus only).
      limit: Maximum number of documents to read; None for all.
      split: Split of all documents; None if a fraction of them is held out.
    """

    kind: UnitKind
    size: int
    pieces: tuple[FileRange, ...] = ()
    texts: tuple[str, ...] = ()
    limit: int | None = None
    split: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> WorkUnit:
        return WorkUnit(**{**value, "pieces": tuple(map(tuple, value["pieces"])), "texts": tuple(value["texts"])})


def unit_bytes(total: int) -> int:
    """Return the size of the units of a corpus of `total` bytes.

    Units are large enough that there are at most a few thousand, and small enough that an interruption loses little
    work and that the last units keep all workers busy.
    """
    return min(max(MIN_UNIT_BYTES, total // MAX_UNITS), MAX_UNIT_BYTES)


def split_range(size: int, max_size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of equal parts of [0, size), each at most `max_size`; one empty part if `size` is 0."""
    count = max(-(-size // max_size), 1)
    for index in range(count):
        yield size * index // count, size * (index + 1) // count


def group_by_size(items: Iterable[tuple[Any, int]], max_size: int) -> Iterator[tuple[list[Any], int]]:
    """Group consecutive (item, size) and yield (items, total size).

    A group has at most `max_size`, unless it consists of a single item that is larger.
    """
    group: list[Any] = []
    total = 0
    for item, size in items:
        if group and total + size > max_size:
            yield group, total
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group, total


def units_of_ranges(
    kind: UnitKind, ranges: Sequence[tuple[FileRange, int]], total: int, split: str | None = None
) -> list[WorkUnit]:
    """Return work units of consecutive (range, size) of a corpus of `total` bytes."""
    groups = group_by_size(ranges, unit_bytes(total))
    return [WorkUnit(kind, size, tuple(group), split=split) for group, size in groups]


def units_of_texts(texts: Sequence[str]) -> list[WorkUnit]:
    """Return work units that hold the texts themselves."""
    sized_texts = [(text, len(text)) for text in texts]
    max_size = unit_bytes(sum(map(len, texts)))
    return [WorkUnit("texts", size, texts=tuple(group)) for group, size in group_by_size(sized_texts, max_size)]
