"""Prefetching keeps the order of batches, passes errors on, and stops its threads on close."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data_examples import data_config, numbered_store

from t5x_like.config import BatchSizes
from t5x_like.data.stream.host_shard import HostShard
from t5x_like.data.stream.prefetch import Prefetcher
from t5x_like.data.stream.row_stream import TrainingStream


@pytest.fixture(params=[1, 4])
def stream(tmp_path: Path, request: pytest.FixtureRequest) -> TrainingStream:
    data = dataclasses.replace(data_config(), prefetch_threads=request.param)
    return TrainingStream([numbered_store(tmp_path / "s", 3000)], data, 6)


def test_batches_are_in_order_from_the_first_row(stream: TrainingStream) -> None:
    with Prefetcher(stream, 5 * 6, HostShard(1, 2)) as batches:
        for step in range(5, 40):
            expected = stream.batch(step, 1, 2)["main"]
            assert all(np.array_equal(values, expected[name]) for name, values in next(batches)["main"].items())


@pytest.mark.parametrize("first_step", [0, 2, 9])
def test_growing_batches_have_the_rows_of_a_run_without_a_ramp(tmp_path: Path, first_step: int) -> None:
    """Of any step, so also after a restart within the ramp; with several threads, whose groups end with a stage."""
    data = dataclasses.replace(data_config(), prefetch_threads=3)
    store = numbered_store(tmp_path / "s", 3000)
    sizes = BatchSizes(6, ((3, 2), (10, 4)))
    plain, ramp = TrainingStream([store], data, 6), TrainingStream([store], data, sizes)
    row = sizes.rows_before(first_step)
    with Prefetcher(ramp, row, first_step=first_step) as batches:
        for step in range(first_step, 30):
            batch = next(batches)["main"]
            rows = np.arange(row, row + sizes.at(step))
            np.testing.assert_array_equal(batches.last_indices()["main"], rows)
            expected = plain.get_rows(rows)
            assert all(np.array_equal(values, expected[name]) for name, values in batch.items())
            again = ramp.batch(step)["main"]
            assert all(np.array_equal(values, again[name]) for name, values in batch.items())
            row += len(rows)
    assert row == sizes.rows_before(30) == 3 * 2 + 7 * 4 + 20 * 6


def test_prefetch_depth_is_bounded(stream: TrainingStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of batches per call at most doubles with each call, and is at most 16, in each of the threads."""
    made: list[int] = []
    batches_at = stream.batches_at
    monkeypatch.setattr(stream, "batches_at", lambda row, n, *location: made.append(n) or batches_at(row, n, *location))
    with Prefetcher(stream, 0) as batches:
        for taken in range(1, 60):
            next(batches)
            if taken in (1, 10, 59):
                time.sleep(0.1)
                ahead, threads = stream.data.prefetch_batches, stream.data.prefetch_threads or 1
                if threads == 1:
                    assert sum(made) <= taken + ahead + min(taken + ahead + 1, 16)
                assert sum(made) <= taken + ahead + threads * 16
    assert max(made) == 16


def test_threads_read_at_the_same_time_after_the_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of three threads meet, which they can not unless they run at once; the first one is alone."""
    data = dataclasses.replace(data_config(), prefetch_threads=3)
    stream, meeting, calls = TrainingStream([numbered_store(tmp_path / "s", 3000)], data, 6), threading.Barrier(3), []
    batches_at = stream.batches_at

    def met(row: int, *location: Any) -> Any:
        calls.append(row)
        if row > 0:
            meeting.wait(60)
        else:
            assert calls == [0]
        return batches_at(row, *location)

    monkeypatch.setattr(stream, "batches_at", met)
    with Prefetcher(stream, 0) as batches:
        for step in range(4):
            expected = batches_at(6 * step, 1)[0]["main"]
            assert all(np.array_equal(values, expected[name]) for name, values in next(batches)["main"].items())
        meeting.abort()


def test_error_is_raised_in_place_of_its_batch(stream: TrainingStream, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = stream.get_rows

    def failing(index_N: np.ndarray, *sub_batch: str) -> object:
        if 12 in index_N:
            raise OSError("the disk is gone")
        return rows(index_N, *sub_batch)

    monkeypatch.setattr(stream, "get_rows", failing)
    batches = Prefetcher(stream, 0)
    next(batches), next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    with pytest.raises(StopIteration):
        next(batches)


def test_close_stops_the_thread_in_any_state(stream: TrainingStream) -> None:
    for taken in range(4):
        batches = Prefetcher(stream, 0)
        for _ in range(taken):
            next(batches)
        batches.close()
        batches.close()
        assert not any(thread.name == "prefetch" for thread in threading.enumerate())
