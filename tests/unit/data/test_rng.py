"""Keyed randomness: permutations are bijective, words are uniform, and keys do not influence each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.data.stream import rng


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    images = rng.permute(np.arange(size), size, rng.fold_in(key, 0))
    assert np.array_equal(np.sort(images), np.arange(size))


def test_permute_handles_huge_sets_and_depends_on_key() -> None:
    index = np.array([0, 1, 10**12 - 1])
    one = rng.permute(index, 10**12, rng.fold_in(1, 0))
    other = rng.permute(index, 10**12, rng.fold_in(2, 0))
    assert ((0 <= one) & (one < 10**12)).all()
    assert (one != other).all()
    by_row = rng.permute(index, 10**12, np.concatenate([rng.fold_in(1, 0), rng.fold_in(2, 0), rng.fold_in(1, 0)]))
    assert by_row.tolist() == [one[0], other[1], one[2]]


def test_permutations_of_three_are_equally_likely() -> None:
    keys = rng.fold_in(7, np.arange(6000))
    orders = [rng.permute(np.full(6000, index), 3, keys) for index in range(3)]
    _, counts = np.unique(np.stack(orders, axis=1), axis=0, return_counts=True)
    assert len(counts) == 6
    assert np.sum((counts - 1000) ** 2 / 1000) < 20.5  # chi-square, 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize("derive", ["keys", "streams", "positions"])
def test_words_are_uniform_over_keys_and_positions(derive: str) -> None:
    words = {
        "keys": lambda: rng.bits(rng.fold_in(0, np.arange(65536)), 1, 1)[:, 0],
        "streams": lambda: np.concatenate([rng.bits(rng.fold_in(0, 5), stream, 1)[0] for stream in range(16384)]),
        "positions": lambda: rng.bits(rng.fold_in(3, 0), 1, 65536)[0],
    }[derive]()
    for shift in (0, 24, 48, 56):
        counts = np.bincount(((words >> np.uint64(shift)) & np.uint64(255)).astype(int), minlength=256)
        expected = len(words) / 256
        assert np.sum((counts - expected) ** 2 / expected) < 347  # 255 degrees of freedom, p = 0.0001


def test_words_of_a_key_do_not_depend_on_other_keys() -> None:
    keys = rng.fold_in(11, np.arange(5))
    assert np.array_equal(rng.bits(keys, 2, 9)[3], rng.bits(keys[3:4], 2, 9)[0])
    assert not np.array_equal(rng.bits(keys, 2, 9), rng.bits(keys, 3, 9))
