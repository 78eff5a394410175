"""Grain sources give the batches and rows of the stream, by Grain's index and in its worker processes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

grain = pytest.importorskip("grain")

from helpers.data_examples import data_config, numbered_store  # noqa: E402

from t5x_like.data.grain import RowSource, StepSource, map_dataset  # noqa: E402
from t5x_like.data.stream.row_stream import TrainingStream  # noqa: E402

STEPS, ROWS = 12, 6


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TrainingStream:
    return TrainingStream([numbered_store(tmp_path_factory.mktemp("grain") / "s", 3000)], data_config(), ROWS)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)


def test_element_equals_batch_of_its_step(stream: TrainingStream) -> None:
    dataset = map_dataset(StepSource(stream, STEPS))
    found = list(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1)))
    assert len(dataset) == len(found) == STEPS
    assert all(same(batch["main"], stream.batch(step)["main"]) for step, batch in enumerate(found))


def test_hosts_load_disjoint_parts_of_the_batch(stream: TrainingStream) -> None:
    parts = [map_dataset(StepSource(stream, STEPS, host, 3))[4]["main"] for host in range(3)]
    assert same({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, stream.batch(4)["main"])


def test_grain_shards_and_batches_rows(stream: TrainingStream) -> None:
    dataset = map_dataset(RowSource(stream, 4 * ROWS))
    found = [dataset[host::2].batch(ROWS)[1] for host in range(2)]
    for host, batch in enumerate(found):
        expected = stream.get_rows(np.arange(2 * ROWS + host, 4 * ROWS, 2))
        assert same(batch, expected)


def test_state_is_grains_index_and_resumes_exactly(stream: TrainingStream) -> None:
    def batches() -> Any:
        return iter(map_dataset(StepSource(stream, STEPS)).to_iter_dataset(grain.ReadOptions(num_threads=1)))

    before = batches()
    for _ in range(5):
        next(before)
    state = before.get_state()
    assert len(str(state)) < 100
    after = batches()
    after.set_state(state)
    assert all(same(next(after)["main"], stream.batch(step)["main"]) for step in range(5, STEPS))


def test_sources_are_pickled_by_store_paths(stream: TrainingStream) -> None:
    for source in (StepSource(stream, STEPS, 1, 2), RowSource(stream, 30)):
        pickled = pickle.dumps(source)
        assert len(pickled) < 4000
        again = pickle.loads(pickled)
        assert repr(again) == repr(source) and len(again) == len(source)
        one, other = (each[7] if isinstance(each, RowSource) else each[7]["main"] for each in (source, again))
        assert same(one, other)


def test_index_out_of_range_raises_index_error(stream: TrainingStream) -> None:
    with pytest.raises(IndexError, match="found element 12, expected 0 to 11"):
        StepSource(stream, STEPS)[STEPS]


def test_worker_processes_read_equal_batches(stream: TrainingStream) -> None:
    """The program is not started by absl."""
    code = f"""
import grain, pickle
from t5x_like.data.grain import map_dataset
if __name__ == "__main__":
    source = pickle.loads(bytes.fromhex({pickle.dumps(StepSource(stream, STEPS)).hex()!r}))
    dataset = map_dataset(source).to_iter_dataset(grain.ReadOptions(num_threads=1))
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=1))
    print([int(batch["main"]["decoder_target_tokens"].sum()) for batch in dataset])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [int(stream.batch(step)["main"]["decoder_target_tokens"].sum()) for step in range(STEPS)]
    assert done.stdout.strip().splitlines()[-1] == str(expected)
