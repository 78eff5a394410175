"""Random laws that several objectives share.

Each use of a row's key has a number of its own. The numbers are part of what a seed means: changing one changes every
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from t5x_like.data import keys as rng
from t5x_like.data.denoising.examples import Mask

NOISE, CLEAN, ROTATION, CUT, CHOICE, REPLACEMENT, RANDOM_TOKEN = range(1, 8)
FORM, COUNT, LENGTHS, PLACES, ORDER, SENTENCES, DOCUMENT, SINGLES = range(8, 16)

Integers = npt.NDArray[np.int64]


def as_fraction(words: rng.Keys) -> npt.NDArray[np.float64]:
    """Numbers uniform in [0, 1) out of random words."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform(keys_N: rng.Keys, stream: int, count: int) -> npt.NDArray[np.float64]:
    """[N, count] numbers uniform in [0, 1)."""
    return as_fraction(rng.bits(keys_N, stream, count))


def sample(keys_N: rng.Keys, stream: int, law: Sequence[float], count: int) -> Integers:
    """[N, count] independent draws: k with probability law[k]."""
    below = np.cumsum(law)
    # Rounding must not make the sum less than 1, and what has no probability is never drawn.
    below[np.flatnonzero(law)[-1] :] = 1.0
    return np.searchsorted(below, uniform(keys_N, stream, count), side="right")


def rotate(values_NxL: npt.NDArray[Any], offset_N: Integers) -> npt.NDArray[Any]:
    """Each row from its offset on, then from its beginning."""
    rows, length = values_NxL.shape
    twice = np.concatenate([values_NxL, values_NxL], axis=1).ravel()
    # Whole stretches are copied, which is many times faster than an index for each position.
    return sliding_window_view(twice, length)[np.arange(rows) * 2 * length + offset_N]


def first_chosen(keys_N: rng.Keys, stream: int, total: int, most: int) -> Integers:
    """[N, most]: for each key different numbers of [0, total) in random order, so that its first k are a uniform subset
    of size k, whatever k is."""
    ending = np.uint64(max(total - 1, 1).bit_length())
    words_NxT = rng.bits(keys_N, stream, total) << ending | np.arange(total, dtype=np.uint64)
    if most < total:
        words_NxT.partition(most - 1, axis=1)
    words_NxM = np.sort(words_NxT[:, :most], axis=1)
    return (words_NxM & ((np.uint64(1) << ending) - np.uint64(1))).astype(np.int64)


def lengths_until(
    keys_N: rng.Keys, stream: int, law: Sequence[float], total: int, most: int
) -> tuple[Integers, Integers]:
    """Span lengths drawn from `law` until they sum to `total`, the last one cut: ([N, most] padded with 0, how many).

    Where `most` draws do not reach the total, the last takes what is left.
    """
    lengths_NxM = sample(keys_N, stream, law, most)
    before_NxM = np.cumsum(lengths_NxM, axis=1) - lengths_NxM
    drawn_NxM = before_NxM < total
    lengths_NxM = np.where(drawn_NxM, np.minimum(lengths_NxM, total - before_NxM), 0)
    lengths_NxM[:, -1] = np.where(drawn_NxM[:, -1], total - before_NxM[:, -1], 0)
    return lengths_NxM, drawn_NxM.sum(axis=1)


def place_on_circle(keys_N: rng.Keys, lengths_NxM: Integers, count_N: Integers, length: int) -> tuple[Mask, Mask]:
    """Lays spans over rows of `length` tokens, with clean tokens between them: (mask [N, length], empties [N, length]).

    Every row masks the same number of tokens. The spans stand, in their order, before a uniform subset of the clean
    tokens; then the row begins at a uniform place of that circle, so that each token is masked with the same
    probability, and a span can be cut in two by the row's ends. `empties` marks the tokens before which a span of
    length 0 stands.
    """
    rows, most = lengths_NxM.shape
    masked = int(lengths_NxM[0].sum())
    clean = length - masked
    chosen_NxM = first_chosen(keys_N, PLACES, clean, most)
    of_span_NxM = np.arange(most) < count_N[:, None]
    before_NxC = np.full((rows, clean), -1, np.int64)
    flagged_NxC = np.zeros((rows, clean), np.bool_)
    flagged_NxC[np.nonzero(of_span_NxM)[0], chosen_NxM[of_span_NxM]] = True
    before_NxC.ravel()[np.flatnonzero(flagged_NxC)] = lengths_NxM[of_span_NxM]
    place_NxC = np.cumsum(np.maximum(before_NxC, 0) + 1, axis=1) - 1 + np.arange(rows)[:, None] * length
    mask_NxL = np.ones((rows, length), np.bool_)
    mask_NxL.ravel()[place_NxC] = False
    empty_NxL = np.zeros((rows, length), np.bool_)
    empty_NxL.ravel()[place_NxC.ravel()[np.flatnonzero(before_NxC == 0)]] = True
    offset_N = rng.below(rng.bits(keys_N, ROTATION, 1)[:, 0], length)
    return rotate(mask_NxL, offset_N), rotate(empty_NxL, offset_N)


def random_order(keys_N: rng.Keys, stream: int, count_N: Integers, most: int) -> Integers:
    """[N, most]: the numbers below each count in uniformly random order, then the others."""
    # Words that end in their number, in as many bits whatever `most` is, since rows beside a row may need more; those
    # that come last have the highest bit.
    number = (np.uint64(1) << np.uint64(24)) - np.uint64(1)
    words_NxM = rng.bits(keys_N, stream, most) >> np.uint64(1) & ~number | np.arange(most, dtype=np.uint64)
    words_NxM[np.arange(most) >= count_N[:, None]] |= np.uint64(1) << np.uint64(63)
    words_NxM.sort(axis=1)
    return (words_NxM & number).astype(np.int64)


def edges_of(mask_NxL: Mask, most: int) -> tuple[Integers, Integers, Integers]:
    """Runs of True: where each starts and where it ends ([N, most], padded with the row's length), and how many."""
    rows, length = mask_NxL.shape
    padded = np.zeros((rows, length + 2), np.int8)
    padded[:, 1:-1] = mask_NxL
    steps = np.diff(padded, axis=1)
    row_R, start_R = np.nonzero(steps == 1)
    end_R = np.nonzero(steps == -1)[1]
    count_N = np.bincount(row_R, minlength=rows)
    rank_R = np.arange(len(row_R)) - np.repeat(np.cumsum(count_N) - count_N, count_N)
    starts_NxM, ends_NxM = np.full((2, rows, most), length, np.int64)
    starts_NxM[row_R, rank_R] = start_R
    ends_NxM[row_R, rank_R] = end_R
    return starts_NxM, ends_NxM, count_N
