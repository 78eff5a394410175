"""Recorded rows: over kills, other numbers of processes and rollbacks, each row of the final state once."""

from __future__ import annotations

import collections
import dataclasses
import random
from pathlib import Path

import pytest
from helpers.data_examples import data_config, numbered_store
from helpers.recorded_rows import recorded_rows

from t5x_like.data.stream.host_shard import HostShard
from t5x_like.data.stream.prefetch import Prefetcher
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.trainer.row_record import RowRecord

ROWS = 14


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TrainingStream:
    """Return a stream with two sub-batches, of which 40 steps read more than one epoch."""
    store = numbered_store(tmp_path_factory.mktemp("stores") / "numbers", 6000, 900)
    return TrainingStream([store], dataclasses.replace(data_config(), targets_length_buckets=(20,)), ROWS)


def train(stream: TrainingStream, workdir: Path, hosts: int, restored: int | None, last: int, first_row: int) -> None:
    """Record the steps after `restored` as `hosts` processes do, from the row of the run on."""
    for host in range(hosts):
        record = RowRecord(workdir, host, hosts, restored)
        with Prefetcher(stream, first_row, HostShard(host, hosts)) as batches:
            for step in range((restored or 0) + 1, last + 1):
                batch = next(batches)
                record.write(step, batch, batches.last_indices())
        record.close()


def test_rows_do_not_depend_on_kills_and_numbers_of_processes(stream: TrainingStream, tmp_path: Path) -> None:
    train(stream, tmp_path / "undisturbed", 1, None, 40, 0)
    expected = recorded_rows(tmp_path / "undisturbed")
    assert sum(stream.rows_per_epoch.values()) < 40 * ROWS
    used = collections.Counter((name, index) for rows in expected.values() for name, index, _ in rows)
    assert set(used.values()) == {1} and len(used) == 40 * ROWS
    rng = random.Random(0)
    saved = None
    for _ in range(8):
        reached = min((saved or 0) + rng.randint(1, 9), 39)
        train(stream, tmp_path / "run", rng.choice((1, 2, 3, 4)), saved, reached, (saved or 0) * ROWS)
        saved = rng.randint(saved or 1, reached)  # The newest checkpoint, when all processes are killed.
    train(stream, tmp_path / "run", 2, saved, 40, (saved or 0) * ROWS)
    assert recorded_rows(tmp_path / "run") == expected


def test_rows_after_a_rollback(stream: TrainingStream, tmp_path: Path) -> None:
    """From step 9 back to the checkpoint of step 4, and on after the rows of step 9, in the same processes."""
    rows_of_steps = [*range(9), *range(9, 17)]
    steps = [*range(1, 10), *range(5, 13)]
    for host in range(2):
        record = RowRecord(tmp_path, host, 2, None)
        with Prefetcher(stream, 0, HostShard(host, 2)) as batches:
            for step in steps:
                record.write(step, next(batches), batches.last_indices())
        record.close()
    expected = dict(zip(steps, rows_of_steps, strict=True))
    for step, rows in recorded_rows(tmp_path).items():
        indices = stream.indices_at(expected.pop(step) * ROWS)
        wanted = sorted((name, index) for name, values in indices.items() for index in values.tolist())
        assert [(name, index) for name, index, _ in rows] == wanted
    assert not expected
