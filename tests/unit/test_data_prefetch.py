"""The thread ahead of the step: in order, with its errors, and gone when closed."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_examples import data_config, numbered_store

from t5x_like.data.prefetch import Prefetcher
from t5x_like.data.stream import Stream


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    return Stream([numbered_store(tmp_path / "s", 3000)], data_config(), 6)


def test_batches_come_in_order_from_the_start_step(stream: Stream) -> None:
    with Prefetcher(stream, 5 * 6, host=1, hosts=2) as batches:
        for step in range(5, 12):
            expected = stream.batch(step, 1, 2)["main"]
            assert all(np.array_equal(values, expected[name]) for name, values in next(batches)["main"].items())


def test_it_stays_no_further_ahead_than_it_may(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    batch_at = stream.batch_at
    monkeypatch.setattr(stream, "batch_at", lambda row, *place: made.append(row) or batch_at(row, *place))
    with Prefetcher(stream, 0) as batches:
        next(batches)
        time.sleep(0.2)
        assert len(made) <= 1 + stream.data.prefetch + 1


def test_an_error_is_raised_where_its_batch_was_due(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_at = stream.batch_at

    def failing(row: int, *place: int) -> object:
        if row == 12:
            raise OSError("the disk is gone")
        return batch_at(row, *place)

    monkeypatch.setattr(stream, "batch_at", failing)
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
