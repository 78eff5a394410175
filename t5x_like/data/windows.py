"""Windows of a corpus by number: each token in one window per epoch, under one objective.

The text is cut into superblocks, which hold the same number of windows of each objective, in an order of their own.
So each token is in exactly one window per epoch although the objectives' windows differ in length. The text that does
not fill a last superblock is left out; since every epoch starts its first superblock at another place, it is not the
same text each time. The windows of one objective are visited in a pseudo-random permutation.

Where the proportions of the objectives change within an epoch, a new stretch begins: what is left of the epoch's text
is cut anew and visited by a permutation of its own.
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
    """

    pattern: tuple[int, ...]
    size: int
    epoch: int
    offset: int
    first: int
    per_epoch: int

    def end(self, superblocks: int) -> tuple[int, int]:
        """(epoch, offset) behind so many superblocks."""
        if superblocks < self.first:
            return self.epoch, self.offset + superblocks * self.size
        full, rest = divmod(superblocks - self.first, self.per_epoch)
        return self.epoch + 1 + full, rest * self.size

    def epochs(self, superblocks: float, tokens: int) -> float:
        """Passes over a split of so many tokens that end behind so many superblocks, with fractions."""
        if superblocks < self.first:
            return self.epoch + (self.offset + superblocks * self.size) / tokens
        return self.epoch + 1 + (superblocks - self.first) / self.per_epoch


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

    def starts(self, stretch: int, objective: int, number_N: Integers) -> Integers:
        """First token of windows of one objective, by their number within the stretch."""
        cut = self.stretches[stretch]
        count = cut.pattern[objective]
        in_first_N = number_N < cut.first * count
        epoch_N = np.full(len(number_N), cut.epoch, np.int64)
        local_N = number_N.copy()
        if not in_first_N.all():
            later_N = ~in_first_N
            full_N, local_N[later_N] = np.divmod(number_N[later_N] - cut.first * count, cut.per_epoch * count)
            epoch_N[later_N] += 1 + full_N
        epoch_key_N = rng.fold_in(rng.fold_in(self._key, stretch), epoch_N)
        shuffle_key_N = rng.fold_in(rng.fold_in(epoch_key_N, _SHUFFLE), objective)
        place_N = np.empty(len(number_N), np.int64)
        for here_N, superblocks in ((in_first_N, cut.first), (~in_first_N, cut.per_epoch)):
            if here_N.any():
                place_N[here_N] = rng.permute(local_N[here_N], superblocks * count, shuffle_key_N[here_N])
        superblock_N, rank_N = np.divmod(place_N, count)
        before_N = self._before(cut, objective, rank_N, rng.fold_in(rng.fold_in(epoch_key_N, _ORDER), superblock_N))
        phase_N = rng.below(rng.fold_in(rng.fold_in(self._key, _PHASE), epoch_N), self.num_tokens)
        offset_N = np.where(in_first_N, cut.offset, 0)
        return (phase_N + offset_N + superblock_N * cut.size + before_N) % self.num_tokens

    def _before(self, cut: Stretch, objective: int, rank_N: Integers, key_N: rng.Keys) -> Integers:
        """Tokens of a superblock before its window of this objective with this rank: its slots are in an order of the
        superblock's own."""
        slots = np.repeat(np.arange(len(cut.pattern)), cut.pattern)
        if len(slots) == 1:
            return np.zeros(len(rank_N), np.int64)
        order_NxS = slots[np.argsort(rng.bits(key_N, 0, len(slots)), axis=1)]
        mine_NxS = order_NxS == objective
        rank_NxS = np.cumsum(mine_NxS, axis=1)
        slot_N = np.argmax(mine_NxS & (rank_NxS == rank_N[:, None] + 1), axis=1)
        ends_NxS = np.cumsum(np.asarray(self.lengths)[order_NxS], axis=1)
        return np.take_along_axis(ends_NxS, slot_N[:, None], axis=1)[:, 0] - self.lengths[objective]
