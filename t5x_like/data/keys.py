"""Randomness as a function of (seed, index): no generator, no state, the same in any order and on any host.

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014; Stafford's variant 13). A key is a
uint64; `fold_in` derives a key from a key, `bits` reads SplitMix64's output sequence of a key by position.
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
    """A bijection on uint64 of which every output bit depends on every input bit."""
    mixed = values >> np.uint64(30)
    for factor, shift in _FINALISER:
        mixed ^= values
        mixed *= factor
        values = mixed
        mixed = values >> shift
    mixed ^= values
    return mixed


def fold_in(key: Integers, value: Integers) -> Keys:
    """Keys that depend on both arguments, which broadcast against each other. At least one-dimensional."""
    if isinstance(value, int):  # most often, and then without arithmetic on arrays of one number
        return mix(_as_uint64(key) + np.uint64(int(_GAMMA) * (value + 1) & _WORD))
    return mix(_as_uint64(key) + _GAMMA * (_as_uint64(value) + np.uint64(1)))


def bits(keys_N: Keys, stream: int, count: int) -> npt.NDArray[np.uint64]:
    """Independent random words [N, count] for each key; `stream` keeps the uses of one key apart."""
    positions = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
    return mix(fold_in(keys_N, stream)[:, None] + positions)


def bits_at(keys_R: Keys, stream: int, position_R: npt.NDArray[np.int64]) -> Keys:
    """[R]: of each key's words, as `bits` gives them, the one at a position."""
    return mix(fold_in(keys_R, stream) + (position_R + 1).astype(np.uint64) * _GAMMA)


def below(words: Keys, bound: Integers) -> npt.NDArray[np.int64]:
    """Uniform integers in [0, bound) out of random words; the bias is at most bound / 2**64."""
    return (words % _as_uint64(bound)).astype(np.int64)


def choose(keys_N: Keys, stream: int, total: int, count: int) -> npt.NDArray[np.int64]:
    """[N, count]: for each key a uniform subset of [0, total), in increasing order."""
    # Each number gets a random word that ends in the number itself: all words differ, and no index has to be kept.
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
    """The images of `index` under a keyed pseudo-random permutation of [0, size), in constant time and memory each.

    A Feistel network on the rectangle of ceil(sqrt(size)) by enough columns (Black and Rogaway 2002), with cycle
    walking for the few cells beyond `size`.

    Args:
      index: [N] in [0, size).
      size: Of the permuted set, at least 1.
      key: [N] or [1].
    """
    rows = np.uint64(max(int(np.ceil(np.sqrt(size))), 1))
    columns = np.uint64(-(-size // int(rows)))
    round_keys = fold_in(key, np.arange(_ROUNDS)[:, None])

    def once(values: Keys, select: npt.NDArray[np.bool_] | slice) -> Keys:
        left, right = values // columns, values % columns
        for number, round_key in enumerate(round_keys):
            word_key = round_key if round_key.size == 1 else round_key[select]
            if number % 2:
                right = (right + fold_in(word_key, left) % columns) % columns
            else:
                left = (left + fold_in(word_key, right) % rows) % rows
        return left * columns + right

    values = once(np.asarray(index, np.int64).astype(np.uint64), slice(None))
    while (outside := values >= np.uint64(size)).any():
        values[outside] = once(values[outside], outside)
    return values.astype(np.int64)
