"""Bins of the loss by position. `tests/integration/test_masked_diffusion.py` compares their mean with `eval`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.evaluation.position_losses import binned


@given(st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_bins_cover_each_position_once(length: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = random.integers(0, 3, length).astype(float)
    losses = weights * random.random(length)
    bins = binned(np.stack([losses, weights]))
    assert sum(one["tokens"] for one in bins) == weights.sum()
    assert sum(one["tokens"] * one["loss"] for one in bins) == pytest.approx(losses.sum())
    for one in bins:
        part = slice(one["first"], one["last"] + 1)
        assert one["tokens"] == weights[part].sum() > 0 and one["last"] < length
        assert one["first"] in (0, 1, 2, 4, 8, 16, 32, 64)
        assert one["last"] in (max(2 * one["first"] - 1, one["first"]), length - 1)
