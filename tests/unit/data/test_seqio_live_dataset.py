"""seqio Tasks and Mixtures read live: batches, resumption, and refused configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

pytest.importorskip("seqio")

from helpers.seqio_examples import examples, live_config  # noqa: E402

from t5x_like.config import DataConfig  # noqa: E402
from t5x_like.data.seqio_.live_dataset import LiveBatches, identity, load_provider, require_same_pipeline
from t5x_like.errors import DataError, SafetyError  # noqa: E402


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)


def take(batches: LiveBatches, count: int) -> list[dict[str, Any]]:
    return [next(batches)["main"] for _ in range(count)]


@pytest.mark.parametrize(("name", "pack"), [pytest.param("both", True, marks=pytest.mark.slow), ("numbers", False)])
def test_restored_pipeline_continues_exactly(name: str, pack: bool) -> None:
    data = live_config(name, pack=pack)
    batches = LiveBatches(data, 4)
    first = take(batches, 6)
    files = batches.state_files()
    following = take(batches, 6)

    again = LiveBatches(data, 4)
    assert all(map(same, take(again, 2), first)), "the same run begins with the same batches"
    again.restore(files)
    found = take(again, 6)
    assert all(map(same, found, following))
    assert not any(map(same, found, first)), "the test must see a difference"


@pytest.mark.parametrize(
    ("change", "batch_size", "hosts", "message"),
    [
        ({"seed": 4}, 4, 1, "seed: the checkpoint has 3, this run 4"),
        ({"layout": "prefix_lm"}, 4, 1, "layout: "),
        ({}, 4, 2, "hosts: the checkpoint has 1, this run 2"),
        ({}, 8, 1, "batch_size: the checkpoint has 4, this run 8"),
        ({"name": "both_otherwise"}, 4, 1, "rates: "),
        ({"name": "numbers"}, 4, 1, "mixture_or_task: the checkpoint has 'both', this run 'numbers'"),
        ({"pack": False}, 4, 1, "pack: the checkpoint has True, this run False"),
        ({"shuffle": False}, 4, 1, "shuffle: the checkpoint has True, this run False"),
    ],
)
def test_state_of_other_data_is_refused(change: dict[str, Any], batch_size: int, hosts: int, message: str) -> None:
    def of(data: DataConfig, batch_size: int, hosts: int) -> dict[str, Any]:
        assert data.seqio is not None
        return identity(load_provider(data.seqio.mixture_or_task, None), data, batch_size, "train", hosts)

    saved = of(live_config("both"), 4, 1)
    require_same_pipeline(saved, of(live_config("both"), 4, 1))
    with pytest.raises(SafetyError, match="belongs to other data") as refusal:
        require_same_pipeline(saved, of(live_config(**{"name": "both", **change}), batch_size, hosts))
    assert message in str(refusal.value)


def test_state_of_another_host_is_refused() -> None:
    files = LiveBatches(live_config("numbers"), 4).state_files()
    with pytest.raises(SafetyError, match="hosts: the checkpoint has 1, this run 2"):
        LiveBatches(live_config("numbers"), 4, host=1, hosts=2).restore(files)


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = LiveBatches(live_config("numbers"), 4)
    files = batches.state_files()
    monkeypatch.setitem(batches.identity, "versions", {**batches.identity["versions"], "seqio": "9.9"})
    with pytest.raises(SafetyError, match=r"versions: .*this run .*'9\.9'"):
        batches.restore(files)


def test_checkpoint_without_state_is_refused() -> None:
    with pytest.raises(SafetyError, match="trained on a prepared store"):
        LiveBatches(live_config("numbers"), 4).restore({})


def test_tfdata_itself_restores_another_seed_silently() -> None:
    """The reason for the identity: without it the run would continue, with the old seed."""
    one, other = (LiveBatches(live_config("numbers", seed=seed), 4) for seed in (3, 4))
    assert not same(take(one, 1)[0], take(other, 1)[0])
    files = one.state_files()
    other.identity = one.identity
    other.restore(files)
    assert all(map(same, take(other, 3), take(one, 3)))


def test_hosts_read_disjoint_examples() -> None:
    """Each example of an epoch is read by one host."""
    data = live_config("numbers", pack=False, num_epochs=1)
    rows: list[tuple[int, ...]] = []
    for host in range(2):
        for features in take(LiveBatches(data, 10, host=host, hosts=2), 4):
            rows += map(tuple, features["decoder_target_tokens"].tolist())
    expected = [tuple(np.pad(e["targets"], (0, 16 - len(e["targets"]))).tolist()) for e in examples(0)]
    assert sorted(rows) == sorted(expected)


def test_end_of_data_raises_data_error() -> None:
    batches = LiveBatches(live_config("few_numbers", pack=False, num_epochs=1), 2)
    take(batches, 2)
    with pytest.raises(DataError, match="ended after 2 batches, which are 1 epochs"):
        next(batches)


def test_pipeline_that_cannot_be_saved_is_refused_at_the_first_batch() -> None:
    """tf.data itself reports this only at the first save."""
    with pytest.raises(DataError, match=r"'drawn_in_python' cannot be saved: .* PyFunc, .* stateful=False"):
        next(LiveBatches(live_config("drawn_in_python"), 4))


def test_packing_that_pairs_wrong_examples_is_refused() -> None:
    """seqio's packing does not count an example with empty inputs in the encoder's segments."""
    with pytest.raises(DataError, match="examples attend to the inputs of others"):
        take(LiveBatches(live_config("empty_inputs"), 4), 3)
    take(LiveBatches(live_config("empty_inputs", pack=False), 4), 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (live_config("nobody"), "expected a registered Task or Mixture"),
        (live_config("numbers", module="no_such_module"), "cannot be imported"),
        (live_config("text_alone"), "expected inputs and targets"),
        (live_config("numbers", use_cached=True), "found no cache of numbers"),
    ],
)
def test_missing_task_split_or_feature_is_reported(config: DataConfig, message: str) -> None:
    with pytest.raises(DataError, match=message):
        LiveBatches(config, 4)


def test_batch_size_must_be_a_multiple_of_hosts() -> None:
    with pytest.raises(DataError, match="found 5 rows for 2 hosts"):
        LiveBatches(live_config("numbers"), 5, hosts=2)


def test_identity_contains_preprocessors_and_their_arguments() -> None:
    data = live_config("both")
    found = identity(load_provider("both", None), data, 4, "train", 1)
    assert found["preprocessors"]["other_numbers"] == [["helpers.seqio_examples.add_number", {"number": 11}]]
    assert found["rates"] == {"numbers": 1.0, "other_numbers": 2.0}
    more_ahead = dataclasses.replace(data, prefetch_batches=5)
    assert identity(load_provider("both", None), more_ahead, 4, "train", 1) == found
