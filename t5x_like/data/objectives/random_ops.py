"""Random operations that several objectives share.

Each use of a row's key has a stream number of its own. The numbers are part of the meaning of a seed: changing one
changes the data of every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from t5x_like.data.objectives.examples import Mask
from t5x_like.data.stream import rng
from t5x_like.utils.type_aliases import IntArray

NOISE, CLEAN, ROTATION, CUT, CHOICE, REPLACEMENT, RANDOM_TOKEN = range(1, 8)
FORM, COUNT, LENGTHS, PLACES, ORDER, SENTENCES, DOCUMENT, SINGLES = range(8, 16)


def as_fraction(words: rng.Keys) -> npt.NDArray[np.float64]:
    """Return numbers uniform in [0, 1) from random 64-bit words."""
    # The upper 53 bits fit a float64 exactly, so that no word is rounded up to 1.
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform(keys_N: rng.Keys, stream: int, count: int) -> npt.NDArray[np.float64]:
    """Return numbers uniform in [0, 1) ([N, count])."""
    return as_fraction(rng.bits(keys_N, stream, count))


def sample_categorical(keys_N: rng.Keys, stream: int, probabilities: Sequence[float], count: int) -> IntArray:
    """Return independent draws ([N, count]): k with probability `probabilities[k]`."""
    below = np.cumsum(probabilities)
    # Rounding must not make the sum less than 1, and outcomes of probability 0 are never drawn.
    below[np.flatnonzero(probabilities)[-1] :] = 1.0
    return np.searchsorted(below, uniform(keys_N, stream, count), side="right")


def rotate(values_NxL: npt.NDArray[Any], offset_N: IntArray) -> npt.NDArray[Any]:
    """Return each row rotated to the left by its offset."""
    rows, length = values_NxL.shape
    twice = np.concatenate([values_NxL, values_NxL], axis=1).ravel()
    # A window into the doubled rows copies whole stretches, which is many times faster than indexing each position.
    return sliding_window_view(twice, length)[np.arange(rows) * 2 * length + offset_N]


def random_subset(keys_N: rng.Keys, stream: int, total: int, most: int) -> IntArray:
    """Return distinct numbers from [0, total) in random order for each key ([N, most]).

    The first k of a row are a uniform subset of size k, for every k.
    """
    # Random words whose low bits are replaced by their index: the smallest words, sorted, give the indices in random
    # order.
    ending = np.uint64(max(total - 1, 1).bit_length())
    # The shift drops high bits and makes room for the index; distinct indices make all words differ.
    words_NxT = rng.bits(keys_N, stream, total) << ending | np.arange(total, dtype=np.uint64)
    if most < total:
        words_NxT.partition(most - 1, axis=1)
    words_NxM = np.sort(words_NxT[:, :most], axis=1)
    return (words_NxM & ((np.uint64(1) << ending) - np.uint64(1))).astype(np.int64)


def span_lengths_with_total(
    keys_N: rng.Keys, stream: int, probabilities: Sequence[float], total: int, most: int
) -> tuple[IntArray, IntArray]:
    """Return span lengths that are drawn until they sum to `total`, the last one cut, and their number.

    Lengths are [N, most], padded with 0; their numbers are [N]. If `most` draws do not reach the total, the last one
    takes the rest.
    """
    lengths_NxM = sample_categorical(keys_N, stream, probabilities, most)
    before_NxM = np.cumsum(lengths_NxM, axis=1) - lengths_NxM
    # Lengths are drawn until the total is reached. The last one is cut, and what follows is 0.
    drawn_NxM = before_NxM < total
    lengths_NxM = np.where(drawn_NxM, np.minimum(lengths_NxM, total - before_NxM), 0)
    lengths_NxM[:, -1] = np.where(drawn_NxM[:, -1], total - before_NxM[:, -1], 0)
    return lengths_NxM, drawn_NxM.sum(axis=1)


def place_spans_cyclic(keys_N: rng.Keys, lengths_NxM: IntArray, count_N: IntArray, length: int) -> tuple[Mask, Mask]:
    """Place spans on rows of `length` tokens, with clean tokens between them.

    Every row masks the same number of tokens. The spans are placed, in their order, before a uniform subset of the
    clean tokens. Then the row is rotated by a uniform offset, so that each token is masked with the same probability,
    and the ends of the row can cut a span in two.

    Returns:
      The mask of the spans, and the mask of tokens that a span of length 0 precedes; both [N, length].
    """
    rows, most = lengths_NxM.shape
    # The same total in each row is what makes the arrays rectangular: all rows have `clean` clean tokens.
    masked = int(lengths_NxM[0].sum())
    clean = length - masked
    chosen_NxM = random_subset(keys_N, PLACES, clean, most)
    is_span_NxM = np.arange(most) < count_N[:, None]
    # Length of the span before each clean token; -1: no span. A span of length 0 is thereby told from none.
    before_NxC = np.full((rows, clean), -1, np.int64)
    flagged_NxC = np.zeros((rows, clean), np.bool_)
    # The chosen places come in random order. Going through flags in row-major order sorts them, and hands the spans to
    # them in the order of the draws.
    flagged_NxC[np.nonzero(is_span_NxM)[0], chosen_NxM[is_span_NxM]] = True
    before_NxC.ravel()[np.flatnonzero(flagged_NxC)] = lengths_NxM[is_span_NxM]
    # Position of each clean token: every clean token before it and every span before it, its own span included. Flat
    # indices (row * length added) are faster than pairs.
    position_NxC = np.cumsum(np.maximum(before_NxC, 0) + 1, axis=1) - 1 + np.arange(rows)[:, None] * length
    mask_NxL = np.ones((rows, length), np.bool_)
    mask_NxL.ravel()[position_NxC] = False
    empty_NxL = np.zeros((rows, length), np.bool_)
    empty_NxL.ravel()[position_NxC.ravel()[np.flatnonzero(before_NxC == 0)]] = True
    offset_N = rng.below(rng.bits(keys_N, ROTATION, 1)[:, 0], length)
    return rotate(mask_NxL, offset_N), rotate(empty_NxL, offset_N)


def random_order(keys_N: rng.Keys, stream: int, count_N: IntArray, most: int) -> IntArray:
    """Return for each row the numbers below its count in uniformly random order, then the others ([N, most])."""
    # Random words whose low 24 bits are their number, and whose highest bit marks the numbers that come last. The
    # number of bits must not depend on `most`, which other rows of the batch influence.
    number = (np.uint64(1) << np.uint64(24)) - np.uint64(1)
    words_NxM = rng.bits(keys_N, stream, most) >> np.uint64(1) & ~number | np.arange(most, dtype=np.uint64)
    words_NxM[np.arange(most) >= count_N[:, None]] |= np.uint64(1) << np.uint64(63)
    words_NxM.sort(axis=1)
    return (words_NxM & number).astype(np.int64)


def find_runs(mask_NxL: Mask, most: int) -> tuple[IntArray, IntArray, IntArray]:
    """Return starts and ends of the runs of True ([N, most], padded with the row's length), and their number [N]."""
    rows, length = mask_NxL.shape
    padded = np.zeros((rows, length + 2), np.int8)
    padded[:, 1:-1] = mask_NxL
    # With a False at either end, a run at the border of the row also has a step up and a step down.
    steps = np.diff(padded, axis=1)
    row_R, start_R = np.nonzero(steps == 1)
    end_R = np.nonzero(steps == -1)[1]
    count_N = np.bincount(row_R, minlength=rows)
    rank_R = np.arange(len(row_R)) - np.repeat(np.cumsum(count_N) - count_N, count_N)
    starts_NxM, ends_NxM = np.full((2, rows, most), length, np.int64)
    starts_NxM[row_R, rank_R] = start_R
    ends_NxM[row_R, rank_R] = end_R
    return starts_NxM, ends_NxM, count_N
