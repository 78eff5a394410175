"""Windows of a corpus by index: each token is in one window per epoch, under one objective.

The text is cut into blocks that hold the same number of windows of each objective, in an order of their own. Each token
is therefore in exactly one window per epoch, although the windows of the objectives differ in length. Text that does
not fill a last block is left out. Since every epoch starts its first block at another offset, it is not the same text
each time. The windows of one objective are visited in a pseudo-random permutation.

If the proportions of the objectives change within an epoch, the epoch span ends: its last epoch is only as much of the
text as it needs, and the next span cuts the rest, visited by a permutation of its own.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from t5x_like.data.stream import rng
from t5x_like.utils.type_aliases import IntArray

# Uses of the key. Changing a number changes the data of every seed.
_PHASE, _SHUFFLE, _ORDER = range(1, 4)


@dataclasses.dataclass(frozen=True)
class EpochSpan:
    """Range of epochs in which a corpus is cut in one way: the rest of an epoch, then whole epochs.

    Attributes:
      rows_per_block: Windows of each objective in a block.
      block_tokens: Tokens of a block.
      epoch, offset: Start of the span: an epoch, and the number of tokens of that epoch that were used before.
      first_blocks: Blocks in the rest of the first epoch.
      blocks_per_epoch: Blocks in each epoch that follows.
      total_blocks: Blocks of the whole span; None if it has no end.
    """

    rows_per_block: tuple[int, ...]
    block_tokens: int
    epoch: int
    offset: int
    first_blocks: int
    blocks_per_epoch: int
    total_blocks: int | None = None

    def end(self) -> tuple[int, int]:
        """Return the (epoch, offset) at which the next span begins."""
        assert self.total_blocks is not None
        if self.total_blocks < self.first_blocks:
            return self.epoch, self.offset + self.total_blocks * self.block_tokens
        full_epochs, rest = divmod(self.total_blocks - self.first_blocks, self.blocks_per_epoch)
        return self.epoch + 1 + full_epochs, rest * self.block_tokens

    def sections(self) -> list[tuple[int, int]]:
        """Return (first block, blocks per epoch) of the sections of the span.

        The sections are the rest of the first epoch, the whole epochs, and the incomplete last epoch if there is one.
        """
        # Sections differ in their number of blocks per epoch, which the size of the shuffling permutation follows.
        sections = [(0, self.first_blocks), (self.first_blocks, self.blocks_per_epoch)]
        if self.total_blocks is None:
            return sections
        if self.total_blocks < self.first_blocks:
            return [(0, self.total_blocks)]
        last = (self.total_blocks - self.first_blocks) % self.blocks_per_epoch
        return [*sections, (self.total_blocks - last, last)] if last else sections

    def epochs(self, blocks: float, tokens: int) -> float:
        """Return the fractional number of epochs of a split of `tokens` tokens after `blocks` blocks of the span.

        At the end of a span, the result is at most the position at which the next span begins.
        """
        if blocks < self.first_blocks:
            epochs = self.epoch + (self.offset + blocks / self.first_blocks * (tokens - self.offset)) / tokens
        else:
            epochs = self.epoch + 1 + (blocks - self.first_blocks) / self.blocks_per_epoch
        if self.total_blocks is None:
            return epochs
        epoch, offset = self.end()
        return min(epochs, epoch + offset / tokens)


class Windows:
    """Windows of one corpus.

    Args:
      num_tokens: Tokens of the split.
      lengths: Tokens of a window of each objective.
      key: One key, which belongs to this corpus.
    """

    def __init__(self, num_tokens: int, lengths: tuple[int, ...], key: rng.Keys):
        self.num_tokens = num_tokens
        self.lengths = lengths
        self.epoch_spans: list[EpochSpan] = []
        self._key = key

    @property
    def blocks_per_epoch(self) -> int:
        return self.epoch_spans[0].blocks_per_epoch

    def epochs(self, epoch_span: int, blocks: float) -> float:
        """Return the fractional number of epochs after `blocks` blocks of an epoch span."""
        return self.epoch_spans[epoch_span].epochs(blocks, self.num_tokens)

    def block_tokens(self, rows_per_block: tuple[int, ...]) -> int:
        """Return the number of tokens of a block."""
        return int(np.dot(rows_per_block, self.lengths))

    def begin_span(self, rows_per_block: tuple[int, ...], epoch: int, offset: int) -> int:
        """Begin an epoch span and return its index. The split must have at least one block of tokens."""
        block_tokens = self.block_tokens(rows_per_block)
        blocks_per_epoch = self.num_tokens // block_tokens
        first_blocks = (self.num_tokens - offset) // block_tokens
        self.epoch_spans.append(EpochSpan(rows_per_block, block_tokens, epoch, offset, first_blocks, blocks_per_epoch))
        return len(self.epoch_spans) - 1

    def end_span(self, blocks: int) -> tuple[int, int]:
        """End the newest span after `blocks` blocks and return the (epoch, offset) at which the next begins."""
        self.epoch_spans[-1] = dataclasses.replace(self.epoch_spans[-1], total_blocks=blocks)
        return self.epoch_spans[-1].end()

    def starts(self, epoch_span: int, objective_N: IntArray, rank_N: IntArray) -> IntArray:
        """Return [N]: the first token of each window.

        Args:
          epoch_span: Index of the span.
          objective_N: Objective of each window.
          rank_N: Rank of each window among the windows of its objective within the span.
        """
        span = self.epoch_spans[epoch_span]
        # A block has a fixed number of windows of each objective, so the rank gives the block and thus the section.
        per_block_N = np.asarray(span.rows_per_block)[objective_N]
        sections = span.sections()
        section_N = np.searchsorted([first for first, _ in sections], rank_N // per_block_N, side="right") - 1
        first_block_N, epoch_blocks_N = np.array(sections, np.int64)[section_N].T
        # Within a section, each epoch has `epoch_windows_N` windows of the objective.
        epoch_windows_N = epoch_blocks_N * per_block_N
        full_epochs_N, rank_in_epoch_N = np.divmod(rank_N - first_block_N * per_block_N, epoch_windows_N)
        # Section 0 is the epoch in which the span begins. Later sections are preceded by it and by the whole epochs.
        epochs_before_N = np.where(section_N == 0, 0, 1 + (first_block_N - span.first_blocks) // span.blocks_per_epoch)
        epoch_N = span.epoch + epochs_before_N + full_epochs_N
        # Shuffle: a permutation of the epoch's windows of one objective. `permute` takes one size at a time, and the
        # sections have at most three different sizes for each objective.
        epoch_key_N = rng.fold_in(rng.fold_in(self._key, epoch_span), epoch_N)
        shuffle_key_N = rng.fold_in(rng.fold_in(epoch_key_N, _SHUFFLE), objective_N)
        shuffled_N = np.empty(len(rank_N), np.int64)
        for size in np.unique(epoch_windows_N).tolist():
            is_size = epoch_windows_N == size
            shuffled_N[is_size] = rng.permute(rank_in_epoch_N[is_size], size, shuffle_key_N[is_size])
        # Position in the text: the epoch's random start, the tokens used before the span, the blocks before this one,
        # and the windows before this one within its block. The text is a ring.
        block_N, rank_in_block_N = np.divmod(shuffled_N, per_block_N)
        order_key_N = rng.fold_in(rng.fold_in(epoch_key_N, _ORDER), block_N)
        within_block_N = self._tokens_before(span, objective_N, rank_in_block_N, order_key_N)
        # The start of an epoch depends on the epoch alone, not on the span: two spans within one epoch then share a
        # ring, and `offset_N` keeps their texts apart.
        phase_N = rng.below(rng.fold_in(rng.fold_in(self._key, _PHASE), epoch_N), self.num_tokens)
        offset_N = np.where(epoch_N == span.epoch, span.offset, 0)
        return (phase_N + offset_N + block_N * span.block_tokens + within_block_N) % self.num_tokens

    def _tokens_before(self, span: EpochSpan, objective_N: IntArray, rank_N: IntArray, key_N: rng.Keys) -> IntArray:
        """Return [N]: the tokens of a block before its window of this objective with this rank.

        The W windows of a block are in a random order, which the key of the block decides.
        """
        objective_W = np.repeat(np.arange(len(span.rows_per_block)), span.rows_per_block)
        if len(objective_W) == 1:
            return np.zeros(len(rank_N), np.int64)
        # Sorting random words gives a random permutation of the windows of each block.
        order_NxW = objective_W[np.argsort(rng.bits(key_N, 0, len(objective_W)), axis=1)]
        is_objective_NxW = order_NxW == objective_N[:, None]
        # The running count of the objective's windows identifies the one with the given rank.
        is_window_NxW = is_objective_NxW & (np.cumsum(is_objective_NxW, axis=1) == rank_N[:, None] + 1)
        lengths_NxW = np.asarray(self.lengths)[order_NxW]
        # `logical_or.accumulate` is True from the window on: only the lengths before it remain.
        return np.where(np.logical_or.accumulate(is_window_NxW, axis=1), 0, lengths_NxW).sum(axis=1)
