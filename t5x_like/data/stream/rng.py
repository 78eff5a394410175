"""Counter-based random numbers: functions of (seed, index) without state, equal in any order and on any host.

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014; Stafford's variant 13). A key is a
uint64. `fold_in` derives a key from a key, and `bits` reads the output sequence of SplitMix64 for a key by position.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Integers = int | npt.NDArray[np.integer[Any]]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FINALISER = (
    (np.uint64(0xBF58476D1CE4E5B9), np.uint64(27)),
    (np.uint64(0x94D049BB133111EB), np.uint64(31)),
)
_WORD = 0xFFFFFFFFFFFFFFFF
_ROUNDS = 8


def _as_uint64(value: Integers) -> Keys:
    if isinstance(value, int):
        return np.array([value & _WORD], np.uint64)
    return np.atleast_1d(np.asarray(value).astype(np.uint64, copy=False))


def mix(values: Keys) -> Keys:
    """Return a bijection of uint64 in which every output bit depends on every input bit."""
    # z ^= z >> 30; z *= a; z ^= z >> 27; z *= b; z ^= z >> 31, with two arrays that are reused in place.
    mixed = values >> np.uint64(30)
    for factor, shift in _FINALISER:
        mixed ^= values
        mixed *= factor
        values = mixed
        mixed = values >> shift
    mixed ^= values
    return mixed


def fold_in(key: Integers, value: Integers) -> Keys:
    """Return keys that depend on both arguments, which broadcast. The result is at least one-dimensional."""
    # key + (value + 1) * gamma, mixed, is output number `value` of SplitMix64 seeded with the key. Sums and products
    # wrap around at 2**64 by design.
    if isinstance(value, int):  # The most frequent case; it avoids arithmetic on arrays of one number.
        return mix(_as_uint64(key) + np.uint64(int(_GAMMA) * (value + 1) & _WORD))
    return mix(_as_uint64(key) + _GAMMA * (_as_uint64(value) + np.uint64(1)))


def bits(keys_N: Keys, stream: int, count: int) -> npt.NDArray[np.uint64]:
    """Return [N, count] independent random words for N keys. `stream` separates different uses of a key."""
    # SplitMix64 adds the golden gamma before each output.
    positions = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
    return mix(fold_in(keys_N, stream)[:, None] + positions)


def bits_at(keys_R: Keys, stream: int, position_R: npt.NDArray[np.int64]) -> Keys:
    """Return [R]: for each key its word at one position of the sequence that `bits` returns."""
    return mix(fold_in(keys_R, stream) + (position_R + 1).astype(np.uint64) * _GAMMA)


def below(words: Keys, bound: Integers) -> npt.NDArray[np.int64]:
    """Return uniform integers in [0, bound), made from random words. The bias is at most bound / 2**64."""
    return (words % _as_uint64(bound)).astype(np.int64)


def stratified(key: Keys, index_N: npt.NDArray[np.int64]) -> Keys:
    """Return [N]: words for indices, such that each 2^m indices from a multiple of 2^m on are stratified.

    The words of such a block lie one in each of the 2^m equal parts of the 64-bit range, for every m. Over random keys,
    the word of an index is uniform. This is van der Corput's sequence in base 2 with a random digital shift.

    Args:
      key: The key of the shift, [1].
      index_N: Indices from 0.
    """
    words_N = index_N.astype(np.uint64)
    # The bits of the index in reverse order: neighbours are swapped, then pairs, and so on up to halves of the word.
    for width, low in ((1, 0x5555555555555555), (2, 0x3333333333333333), (4, 0x0F0F0F0F0F0F0F0F)):
        shift, mask = np.uint64(width), np.uint64(low)
        words_N = words_N >> shift & mask | (words_N & mask) << shift
    return words_N.byteswap() ^ key


def choose(keys_N: Keys, stream: int, total: int, count: int) -> npt.NDArray[np.int64]:
    """Return [N, count]: for each key a uniform random subset of [0, total), in increasing order."""
    # Each number gets a random word whose lowest bits are replaced by the number itself. All words then differ, and the
    # number can be read back from a selected word. The `count` smallest words are a uniform subset.
    ending = np.uint64(max(total - 1, 1).bit_length())
    words_NxT = bits(keys_N, stream, total)
    words_NxT >>= ending
    words_NxT <<= ending
    words_NxT |= np.arange(total, dtype=np.uint64)
    if count < total:
        words_NxT.partition(max(count - 1, 0), axis=1)
    chosen = words_NxT[:, :count] & ((np.uint64(1) << ending) - np.uint64(1))
    chosen.sort(axis=1)
    return chosen.astype(np.int64)


def permute(index: npt.NDArray[np.int64], size: int, key: Keys) -> npt.NDArray[np.int64]:
    """Return [N]: the images of `index` under a keyed pseudo-random permutation of [0, size).

    Time and memory per index are constant. The permutation is a generalised Feistel network on a rectangle of
    ceil(sqrt(size)) rows and enough columns (Black and Rogaway 2002), with cycle walking: a result that is not below
    `size` is permuted again until it is.

    Args:
      index: [N] in [0, size).
      size: Size of the permuted set, at least 1.
      key: Keys [N], or one key [1].
    """
    # The rectangle has fewer than `rows` cells too many, about sqrt(size) of `size`, so that cycle walking rarely takes
    # a second pass.
    rows = np.uint64(max(int(np.ceil(np.sqrt(size))), 1))
    columns = np.uint64(-(-size // int(rows)))
    round_keys = fold_in(key, np.arange(_ROUNDS)[:, None])

    def apply_rounds(values: Keys, select: npt.NDArray[np.bool_] | slice) -> Keys:
        # A value is (left, right) = (row, column). Each round adds a keyed hash of one half to the other half, modulo
        # its range, which is a bijection.
        left, right = values // columns, values % columns
        for number, round_key in enumerate(round_keys):
            word_key = round_key if round_key.size == 1 else round_key[select]
            if number % 2:
                right = (right + fold_in(word_key, left) % columns) % columns
            else:
                left = (left + fold_in(word_key, right) % rows) % rows
        return left * columns + right

    # Cycle walking ends: the cycle of a number below `size` returns to such a number at the latest when it is complete.
    # Restricted to [0, size), the walk is a bijection again.
    values = apply_rounds(np.asarray(index, np.int64).astype(np.uint64), slice(None))
    while (outside := values >= np.uint64(size)).any():
        values[outside] = apply_rounds(values[outside], outside)
    return values.astype(np.int64)
