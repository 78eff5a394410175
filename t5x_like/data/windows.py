"""Windows of a corpus by number: each token in one window per epoch, under one objective.

The text is cut into superblocks, which hold the same number of windows of each objective, in an order of their own.
So each token is in exactly one window per epoch although the objectives' windows differ in length. The text that does
not fill a last superblock is left out; since every epoch starts its first superblock at another place, it is not the
same text each time. The windows of one objective are visited in a pseudo-random permutation.

Where the proportions of the objectives change within an epoch, the stretch ends: its last epoch is the part of the text
that it needs, and the next stretch cuts what is left, visited by a permutation of its own.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from t5x_like.data import keys as rng

Integers = npt.NDArray[np.int64]

# Uses of the key. The numbers are part of what a seed means.
_PHASE, _SHUFFLE, _ORDER = range(1, 4)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Text that is cut in one way: the rest of an epoch, then whole epochs.

    Attributes:
      pattern: Windows of each objective in a superblock.
      size: Tokens of a superblock.
      epoch, offset: Where it begins: in an epoch, behind so many of its tokens.
      first, per_epoch: Superblocks in the rest of the first epoch, and in each that follows.
      total: Superblocks of the whole stretch; None: it has no end.
    """

    pattern: tuple[int, ...]
    size: int
    epoch: int
    offset: int
    first: int
    per_epoch: int
    total: int | None = None

    def end(self) -> tuple[int, int]:
        """(epoch, offset) of what follows."""
        assert self.total is not None
        if self.total < self.first:
            return self.epoch, self.offset + self.total * self.size
        full, rest = divmod(self.total - self.first, self.per_epoch)
        return self.epoch + 1 + full, rest * self.size

    def parts(self) -> list[tuple[int, int]]:
        """(first superblock, superblocks of an epoch) from there on: rest of an epoch, whole epochs, a last part."""
        found = [(0, self.first), (self.first, self.per_epoch)]
        if self.total is None:
            return found
        if self.total < self.first:
            return [(0, self.total)]
        last = (self.total - self.first) % self.per_epoch
        return [*found, (self.total - last, last)] if last else found

    def epochs(self, superblocks: float, tokens: int) -> float:
        """Passes over a split of so many tokens that end behind so many superblocks, with fractions: at the end of a
        stretch no more than those that the next begins with."""
        if superblocks < self.first:
            found = self.epoch + (self.offset + superblocks / self.first * (tokens - self.offset)) / tokens
        else:
            found = self.epoch + 1 + (superblocks - self.first) / self.per_epoch
        if self.total is None:
            return found
        epoch, offset = self.end()
        return min(found, epoch + offset / tokens)


class Windows:
    """The windows of one corpus.

    Args:
      num_tokens: Of the split.
      lengths: Tokens of a window of each objective.
      key: One key, of this corpus.
    """

    def __init__(self, num_tokens: int, lengths: tuple[int, ...], key: rng.Keys):
        self.num_tokens = num_tokens
        self.lengths = lengths
        self.stretches: list[Stretch] = []
        self._key = key

    @property
    def superblocks_per_epoch(self) -> int:
        return self.stretches[0].per_epoch

    def epochs(self, stretch: int, superblocks: float) -> float:
        """Passes over the text that end behind so many superblocks of a stretch, with fractions."""
        return self.stretches[stretch].epochs(superblocks, self.num_tokens)

    def superblock(self, pattern: tuple[int, ...]) -> int:
        """Tokens of a superblock."""
        return int(np.dot(pattern, self.lengths))

    def add_stretch(self, pattern: tuple[int, ...], epoch: int, offset: int) -> int:
        """Begins a stretch; returns its index. The split must have room for one superblock."""
        size = self.superblock(pattern)
        per_epoch = self.num_tokens // size
        first = (self.num_tokens - offset) // size
        self.stretches.append(Stretch(pattern, size, epoch, offset, first, per_epoch))
        return len(self.stretches) - 1

    def end_stretch(self, superblocks: int) -> tuple[int, int]:
        """Ends the newest stretch behind so many superblocks; returns the (epoch, offset) where the next begins."""
        self.stretches[-1] = dataclasses.replace(self.stretches[-1], total=superblocks)
        return self.stretches[-1].end()

    def starts(self, stretch: int, objective_N: Integers, number_N: Integers) -> Integers:
        """First token of windows, by their objectives and their numbers among those of it within the stretch."""
        cut = self.stretches[stretch]
        count_N = np.asarray(cut.pattern)[objective_N]
        parts = cut.parts()
        part_N = np.searchsorted([first for first, _ in parts], number_N // count_N, side="right") - 1
        first_N, superblocks_N = np.array(parts, np.int64)[part_N].T
        size_N = superblocks_N * count_N
        full_N, local_N = np.divmod(number_N - first_N * count_N, size_N)
        # Whole epochs follow the first; so does a last part, behind so many of them.
        behind_N = np.where(part_N == 0, 0, 1 + (first_N - cut.first) // cut.per_epoch)
        epoch_N = cut.epoch + behind_N + full_N
        epoch_key_N = rng.fold_in(rng.fold_in(self._key, stretch), epoch_N)
        shuffle_key_N = rng.fold_in(rng.fold_in(epoch_key_N, _SHUFFLE), objective_N)
        place_N = np.empty(len(number_N), np.int64)
        for size in np.unique(size_N).tolist():
            here = size_N == size
            place_N[here] = rng.permute(local_N[here], size, shuffle_key_N[here])
        superblock_N, rank_N = np.divmod(place_N, count_N)
        order_key_N = rng.fold_in(rng.fold_in(epoch_key_N, _ORDER), superblock_N)
        before_N = self._before(cut, objective_N, rank_N, order_key_N)
        phase_N = rng.below(rng.fold_in(rng.fold_in(self._key, _PHASE), epoch_N), self.num_tokens)
        offset_N = np.where(epoch_N == cut.epoch, cut.offset, 0)
        return (phase_N + offset_N + superblock_N * cut.size + before_N) % self.num_tokens

    def _before(self, cut: Stretch, objective_N: Integers, rank_N: Integers, key_N: rng.Keys) -> Integers:
        """Tokens of a superblock before its window of this objective with this rank: its slots are in an order of the
        superblock's own."""
        slots = np.repeat(np.arange(len(cut.pattern)), cut.pattern)
        if len(slots) == 1:
            return np.zeros(len(rank_N), np.int64)
        order_NxS = slots[np.argsort(rng.bits(key_N, 0, len(slots)), axis=1)]
        mine_NxS = order_NxS == objective_N[:, None]
        is_it_NxS = mine_NxS & (np.cumsum(mine_NxS, axis=1) == rank_N[:, None] + 1)
        lengths_NxS = np.asarray(self.lengths)[order_NxS]
        # What comes in front of the one slot.
        return np.where(np.logical_or.accumulate(is_it_NxS, axis=1), 0, lengths_NxS).sum(axis=1)
