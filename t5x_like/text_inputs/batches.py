"""Batches of texts of about one length, which need less padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

SHORTEST = 16
"""Length of the shortest rows; each next length that is compiled is twice as long."""
TOKENS_PER_BATCH = 2**14
"""Token positions of a batch, padding included."""


def batches(lengths: Sequence[int], longest: int, shares: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (padded length, indices of texts), the longest first, with about `TOKENS_PER_BATCH` positions each."""
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(_padded_length(length, longest), []).append(index)
    for padded in sorted(by_length, reverse=True):
        size = batch_rows(padded, shares)
        for start in range(0, len(by_length[padded]), size):
            yield padded, by_length[padded][start : start + size]


def _padded_length(length: int, longest: int) -> int:
    padded = SHORTEST
    while padded < length:
        padded *= 2
    return min(padded, longest)


def batch_rows(padded_length: int, shares: int) -> int:
    """Return the number of rows of a full batch, a multiple of the number of devices that share it."""
    return max(TOKENS_PER_BATCH // padded_length // shares, 1) * shares
