"""The thread ahead of the step: in order, with its errors, and gone when closed."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_examples import data_config, numbered_store

from t5x_like.data.prefetch import Prefetcher
from t5x_like.data.share import Share
from t5x_like.data.stream import Stream


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    return Stream([numbered_store(tmp_path / "s", 3000)], data_config(), 6)


def test_batches_come_in_order_from_the_start_step(stream: Stream) -> None:
    with Prefetcher(stream, 5 * 6, Share(1, 2)) as batches:
        for step in range(5, 40):
            expected = stream.batch(step, 1, 2)["main"]
            assert all(np.array_equal(values, expected[name]) for name, values in next(batches)["main"].items())


def test_it_stays_no_further_ahead_than_it_may(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches made at once are at most as many as were made before, and at most 16."""
    made: list[int] = []
    batches_at = stream.batches_at
    monkeypatch.setattr(stream, "batches_at", lambda row, n, *place: made.append(n) or batches_at(row, n, *place))
    with Prefetcher(stream, 0) as batches:
        for taken in range(1, 60):
            next(batches)
            if taken in (1, 10, 59):
                time.sleep(0.1)
                assert sum(made) <= taken + stream.data.prefetch + min(taken + stream.data.prefetch + 1, 16)
    assert max(made) == 16


def test_an_error_is_raised_where_its_batch_was_due(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = stream.rows

    def failing(index_N: np.ndarray, *sub_batch: str) -> object:
        if 12 in index_N:
            raise OSError("the disk is gone")
        return rows(index_N, *sub_batch)

    monkeypatch.setattr(stream, "rows", failing)
    batches = Prefetcher(stream, 0)
    next(batches), next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    with pytest.raises(StopIteration):
        next(batches)


def test_close_ends_the_thread_whatever_it_does(stream: Stream) -> None:
    for taken in range(4):
        batches = Prefetcher(stream, 0)
        for _ in range(taken):
            next(batches)
        batches.close()
        batches.close()
        assert not any(thread.name == "prefetch" for thread in threading.enumerate())
