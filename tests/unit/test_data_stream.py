"""Rows by index: each token once per epoch, whatever the hosts, the objectives and the step."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from config_examples import example
from data_examples import data_config, numbered_store, raw_tokens, text_store

from t5x_like.config import ConfigError, DataConfig, DataError, MaskedLM, PrefixLM, SpanCorruption, batch_spec, ul2
from t5x_like.config.objectives import Layout
from t5x_like.data.store import Store
from t5x_like.data.stream import Stream, slots_per_superblock
from t5x_like.data.vocabulary import NUM_SPECIAL

LAYOUTS: tuple[Layout, ...] = ("encoder_decoder", "prefix_lm", "causal_lm", "encoder")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return numbered_store(tmp_path_factory.mktemp("stores") / "numbers", 6000, 900)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_once_per_epoch(store: Store, layout: Layout) -> None:
    data = data_config(layout)
    stream = Stream(store, data, batch_size=8)
    left_out = []
    for epoch in range(2):
        seen: list[np.ndarray] = []
        denoisers: list[int] = []
        for index in range(epoch * stream.rows_per_epoch, (epoch + 1) * stream.rows_per_epoch):
            row = stream.row(index)
            seen.append(raw_tokens(row, data, store.vocabulary))
            denoisers.append(int(row["denoiser_ids"][0]))
        tokens = np.concatenate(seen)
        assert len(np.unique(tokens)) == len(tokens)
        # A window is a stretch of text, and all but less than a superblock of the split is in one.
        places = [window.astype(int) - NUM_SPECIAL for window in seen]
        assert all((np.diff(window) % 6000 == 1).all() for window in places)
        superblock = sum(n * length for n, length in zip(stream.slots, stream.window_lengths, strict=True))
        assert 6000 - len(tokens) == 6000 % superblock
        counts = np.bincount(denoisers, minlength=len(data.mixture))
        assert np.array_equal(counts * sum(stream.slots), np.array(stream.slots) * stream.rows_per_epoch)
        left_out.append(frozenset(range(NUM_SPECIAL, NUM_SPECIAL + 6000)) - set(tokens.tolist()))
    if left_out[0]:
        assert left_out[0] != left_out[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hosts", [2, 3, 8, 13])
def test_hosts_share_out_the_global_batch(store: Store, layout: Layout, hosts: int) -> None:
    stream = Stream(store, data_config(layout), batch_size=10)
    for step in (0, 7, 1000):
        whole = stream.batch(step)["main"]
        parts = [stream.batch(step, host, hosts)["main"] for host in range(hosts)]
        for name, values in whole.items():
            assert np.array_equal(np.concatenate([part[name] for part in parts]), values), name


def test_a_batch_is_its_rows_and_a_late_step_is_like_an_early_one(store: Store) -> None:
    stream = Stream(store, data_config(), batch_size=6)
    for step in (0, 10**9):
        batch = stream.batch(step)["main"]
        for row in range(6):
            alone = stream.row(step * 6 + row)
            assert all(np.array_equal(alone[name][0], batch[name][row]) for name in batch)


def test_another_batch_size_reads_the_same_rows(store: Store) -> None:
    data = data_config()
    small, large = Stream(store, data, 4), Stream(store, data, 12)
    joined = np.concatenate([small.batch(step)["main"]["encoder_input_tokens"] for step in range(3)])
    assert np.array_equal(joined, large.batch(0)["main"]["encoder_input_tokens"])


def test_epochs_and_seeds_differ(store: Store) -> None:
    data = data_config()
    stream = Stream(store, data, 8)
    index = np.arange(8)
    first, second = stream.rows(index), stream.rows(index + stream.rows_per_epoch)
    other = Stream(store, dataclasses.replace(data, seed=1), 8).rows(index)
    again = Stream(store, data, 8).rows(index)
    for name in ("encoder_input_tokens", "denoiser_ids"):
        assert not np.array_equal(first[name], second[name])
        assert not np.array_equal(first[name], other[name])
        assert np.array_equal(first[name], again[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_as_specified(tmp_path: Path, layout: Layout) -> None:
    run = example(layout)
    store = text_store(tmp_path / "s", ["some text, " * 800], num_sentinels=run.data.tokenizer.num_sentinels)
    batch = Stream(store, run.data, run.training.batch_size).batch(3)
    specification = batch_spec(run)
    assert batch.keys() == specification.keys()
    for name, array in specification["main"].items():
        assert batch["main"][name].shape == array.shape and batch["main"][name].dtype == array.dtype
    assert batch["main"].keys() == specification["main"].keys()


def test_rates_decide_the_windows_of_a_superblock() -> None:
    assert slots_per_superblock((1.0,) * 7) == (1,) * 7
    assert slots_per_superblock((0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.2)) == (2, 2, 1, 1, 1, 1, 2)
    assert slots_per_superblock((2.5,)) == (1,)
    uneven = slots_per_superblock((0.5, 0.3141, 0.1859))
    assert sum(uneven) == 100 and uneven == (50, 31, 19)
    assert slots_per_superblock((1.0, 1e-6)) == (99, 1)


def test_fingerprint_changes_with_everything_that_decides_rows(store: Store, tmp_path: Path) -> None:
    data = data_config()
    changes: list[DataConfig] = [
        dataclasses.replace(data, seed=1),
        dataclasses.replace(data, inputs_length=49),
        dataclasses.replace(data, layout="prefix_lm"),
        dataclasses.replace(data, mixture=ul2(uniform=False)),
        dataclasses.replace(data, mixture=data.mixture[:6]),
    ]
    prints = [Stream(store, changed, 8).fingerprint for changed in (data, *changes)]
    prints += [Stream(store, data, 9).fingerprint, Stream(numbered_store(tmp_path / "o", 5999), data, 8).fingerprint]
    assert len(set(prints)) == len(prints)
    assert Stream(store, dataclasses.replace(data, prefetch=5, store="elsewhere"), 8).fingerprint == prints[0]


def test_too_little_text_and_too_few_sentinels_are_refused_with_the_numbers(store: Store, tmp_path: Path) -> None:
    small = numbered_store(tmp_path / "s", 100)
    data = data_config()
    needed = sum(Stream(store, data, 8).window_lengths)
    with pytest.raises(DataError, match=f"found 100 train tokens, expected at least {needed}"):
        Stream(small, data, 8)
    poor = numbered_store(tmp_path / "p", 6000, num_sentinels=5)
    with pytest.raises(ConfigError, match=r"X_3_0.5.*up to \d+ spans.*at most 5"):
        Stream(poor, data, 8)


def test_tokens_under_mixed_objectives_come_in_proportion(tmp_path: Path) -> None:
    mixture = (SpanCorruption(name="a", rate=3.0), PrefixLM(name="b", rate=1.0))
    stream = Stream(numbered_store(tmp_path / "s", 5000), data_config(mixture=mixture), 16)
    ids = np.concatenate([stream.batch(step)["main"]["denoiser_ids"] for step in range(40)])
    whole = ids[: len(ids) // stream.rows_per_epoch * stream.rows_per_epoch]
    assert np.bincount(whole).tolist() == [len(whole) * 3 // 4, len(whole) // 4]


def test_masked_lm_windows_fill_their_rows(store: Store) -> None:
    stream = Stream(store, data_config("encoder", (MaskedLM(),)), 4)
    assert (stream.batch(0)["main"]["encoder_target_tokens"] > 0).all()


def test_reading_a_store_imports_no_framework(store: Store) -> None:
    code = f"""
import sys
from pathlib import Path
from t5x_like.config import DataConfig, ul2
from t5x_like.data import describe, prefetch, prepare, validation
from t5x_like.data.store import Store
from t5x_like.data.stream import Stream
data = DataConfig(layout="encoder_decoder", mixture=ul2(), inputs_length=48, targets_length=48)
Stream(Store.open(Path({str(store.path)!r})), data, 8).batch(0)
heavy = {{"jax", "tensorflow", "seqio", "sentencepiece", "pyarrow"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
