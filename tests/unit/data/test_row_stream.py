"""Rows by index: each token occurs once per epoch for any number of hosts, objectives and steps."""

from __future__ import annotations

import collections
import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from helpers.config_examples import example
from helpers.data_examples import data_config, numbered_store, raw_tokens, text_store, without_zeros
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import (
    BartDenoising,
    BlankInfilling,
    CausalLM,
    CausalMasking,
    CorpusConfig,
    CorpusShareConfig,
    DataConfig,
    FillInTheMiddle,
    MaskedLM,
    Objective,
    PrefixLM,
    RatePhaseConfig,
    SpanCorruption,
    batch_spec,
    ul2,
)
from t5x_like.config.mixture_schedule import integer_proportions, row_tokens
from t5x_like.config.objectives import Layout
from t5x_like.data.inspection import console_view
from t5x_like.data.objectives.registry import restore
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream.heldout import objective_batches
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.tokenizers.vocabulary import NUM_SPECIAL
from t5x_like.errors import ConfigError, DataError

LAYOUTS: tuple[Layout, ...] = ("encoder_decoder", "prefix_lm", "causal_lm", "encoder")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return numbered_store(tmp_path_factory.mktemp("stores") / "numbers", 6000, 900)


def epoch_rows(stream: TrainingStream) -> int:
    """Return the rows of an epoch of a stream over one corpus."""
    (rows,) = stream.rows_per_epoch.values()
    return rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_once_per_epoch(store: Store, layout: Layout) -> None:
    data = data_config(layout)
    stream = TrainingStream([store], data, batch_size=8)
    left_out = []
    rows = epoch_rows(stream)
    for epoch in range(2):
        seen: list[np.ndarray] = []
        features = stream.get_rows(np.arange(epoch * rows, (epoch + 1) * rows))
        for index in range(rows):
            row = {name: values[index : index + 1] for name, values in features.items()}
            seen.append(raw_tokens(row, data, store.vocabulary))
        tokens = np.concatenate(seen)
        assert len(np.unique(tokens)) == len(tokens)
        # A window is consecutive text, and less than a block of the split is outside all windows.
        positions = [window.astype(int) - NUM_SPECIAL for window in seen]
        assert all((np.diff(window) % 6000 == 1).all() for window in positions)
        block = sum(row_tokens(objective, data) for objective in data.mixture)
        assert 6000 - len(tokens) == 6000 % block
        counts = np.bincount(features["denoiser_ids"], minlength=len(data.mixture))
        assert (counts == rows // len(data.mixture)).all()
        left_out.append(frozenset(range(NUM_SPECIAL, NUM_SPECIAL + 6000)) - set(tokens.tolist()))
        assert stream.epochs((epoch + 1) * rows)["python_docs"] == epoch + 1
    if left_out[0]:
        assert left_out[0] != left_out[1]


@pytest.mark.parametrize(
    ("layout", "objective"),
    [
        ("prefix_lm", MaskedLM()),
        ("causal_lm", FillInTheMiddle()),
        ("prefix_lm", BlankInfilling(mode="S")),
        ("encoder_decoder", BartDenoising(permute_sentences=False)),
        ("causal_lm", CausalMasking()),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_other_objectives_also_read_each_token_once_per_epoch(
    store: Store, layout: Layout, objective: Objective
) -> None:
    """In a mixture with a plain objective, every token occurs once, and held-out batches have the same shape."""
    plain = PrefixLM(name="plain") if layout != "causal_lm" else CausalLM(name="plain")
    data = data_config(layout, (objective, plain))
    stream = TrainingStream([store], data, 8)
    rows = epoch_rows(stream)
    features = stream.get_rows(np.arange(rows))
    seen = [
        raw_tokens({name: values[row : row + 1] for name, values in features.items()}, data, store.vocabulary)
        for row in range(rows)
    ]
    tokens = np.concatenate(seen)
    assert len(np.unique(tokens)) == len(tokens) > 5800
    held_out = next(iter(objective_batches(store, data, data.sources[0], 8, objective, 1)))["main"]
    assert {name: values.shape for name, values in held_out.items()} == {
        name: (8, *values.shape[1:]) for name, values in features.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hosts", [2, 3, 8, 13])
def test_host_parts_concatenate_to_the_global_batch(store: Store, layout: Layout, hosts: int) -> None:
    stream = TrainingStream([store], data_config(layout), batch_size=10)
    for step in (0, 7, 1000):
        whole = stream.batch(step)["main"]
        parts = [stream.batch(step, host, hosts)["main"] for host in range(hosts)]
        for name, values in whole.items():
            assert np.array_equal(np.concatenate([part[name] for part in parts]), values), name


def test_batch_equals_its_rows_at_early_and_late_steps(store: Store) -> None:
    stream = TrainingStream([store], data_config(), batch_size=6)
    for step in (0, 10**9):
        batch = stream.batch(step)["main"]
        for row in range(6):
            alone = stream.get_row(step * 6 + row)
            assert all(np.array_equal(alone[name][0], batch[name][row]) for name in batch)


@pytest.mark.parametrize("short", [(), (20,)], ids=["one shape", "two shapes"])
def test_other_batch_size_continues_with_the_next_rows(store: Store, short: tuple[int, ...]) -> None:
    """Batches of 7, of 21 by three hosts, and of 14 contain the rows of one large batch."""
    data = dataclasses.replace(data_config(), targets_length_buckets=short)
    parts, row = [], 0
    for rows, hosts in ((7, 1), (7, 2), (21, 3), (14, 8)):
        stream = TrainingStream([store], data, rows)
        parts += [stream.batch_at(row, host, hosts) for host in range(hosts)]
        row += rows
    whole = TrainingStream([store], data, row).batch_at(0)
    assert len(whole) == 1 + len(short)
    for name, features in whole.items():
        for feature, values in features.items():
            assert np.array_equal(np.concatenate([part[name][feature] for part in parts]), values)


@given(segments=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 8]), st.integers(1, 9)), min_size=1))
@settings(max_examples=15, deadline=None)
def test_epoch_has_equal_rows_for_any_restarts_batch_sizes_and_hosts(
    segments: list[tuple[int, int, int]], store: Store, whole_epoch: collections.Counter[bytes]
) -> None:
    """A run is interrupted and resumed with arbitrary numbers of steps, hosts and rows."""
    data = dataclasses.replace(data_config(), targets_length_buckets=(20,))
    total = sum(whole_epoch.values())
    seen: collections.Counter[bytes] = collections.Counter()
    row = 0
    while row < total:
        for multiple, hosts, steps in segments:
            rows = min(7 * multiple, total - row)
            if not rows:
                break
            stream = TrainingStream([store], data, rows)
            for _ in range(min(steps, (total - row) // rows)):
                for host in range(hosts):
                    seen += rows_of(stream.batch_at(row, host, hosts))
                row += rows
    assert seen == whole_epoch


def rows_of(batch: Mapping[str, Mapping[str, np.ndarray]]) -> collections.Counter[bytes]:
    """Return the rows of a batch as a multiset."""
    inputs = [row.tobytes() for part in batch.values() for row in part["encoder_input_tokens"]]
    return collections.Counter(inputs)


@pytest.fixture(scope="module")
def whole_epoch(store: Store) -> collections.Counter[bytes]:
    data = dataclasses.replace(data_config(), targets_length_buckets=(20,))
    rows = epoch_rows(TrainingStream([store], data, 7))
    found = rows_of(TrainingStream([store], data, rows).batch(0))
    assert set(found.values()) == {1} and len(found) == rows
    return found


def test_sub_batches_consume_text_at_the_same_rate(store: Store) -> None:
    data = dataclasses.replace(data_config(), targets_length_buckets=(20,))
    stream = TrainingStream([store], data, 7)
    seen: list[np.ndarray] = []
    for step in range(epoch_rows(stream) // 7):
        batch = stream.batch(step)
        assert batch["main"]["decoder_target_tokens"].shape == (4, 48)
        assert batch["targets_20"]["decoder_target_tokens"].shape == (3, 20)
        assert sorted(np.concatenate([part["denoiser_ids"] for part in batch.values()])) == list(range(7))
        for features in batch.values():
            for row in range(len(features["denoiser_ids"])):
                one = {name: values[row : row + 1] for name, values in features.items()}
                seen.append(raw_tokens(one, data, store.vocabulary))
    tokens = np.concatenate(seen)
    assert len(np.unique(tokens)) == len(tokens) > 5500


def filled(batch: Mapping[str, Mapping[str, np.ndarray]]) -> float:
    """Return the share of token positions that are not padding."""
    arrays = [values for part in batch.values() for name, values in part.items() if name.endswith("_segment_ids")]
    if not arrays:
        names = ("encoder_input_tokens", "decoder_target_tokens")
        arrays = [values for part in batch.values() for name, values in part.items() if name in names]
    return sum(int((values > 0).sum()) for values in arrays) / sum(values.size for values in arrays)


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm"])
def test_rows_of_the_seven_denoisers_are_full(tmp_path: Path, layout: Layout) -> None:
    """512/512 with two shorter sub-batches, and single rows of 1024: at least 97 % of the token positions are not
    padding."""
    paired = tuple(
        dataclasses.replace(objective, complementary_pairs=True) if isinstance(objective, PrefixLM) else objective
        for objective in ul2()
    )
    short = (176, 128) if layout == "encoder_decoder" else ()
    data = dataclasses.replace(
        data_config(layout, paired), inputs_length=512, targets_length=512, targets_length_buckets=short
    )
    stream = TrainingStream([numbered_store(tmp_path / "s", 30000, num_sentinels=160)], data, 56)
    assert np.mean([filled(stream.batch(step)) for step in range(4)]) >= 0.97


def test_corpora_follow_their_rates_and_have_separate_epochs(tmp_path: Path) -> None:
    stores = [numbered_store(tmp_path / name, tokens) for name, tokens in (("a", 3000), ("b", 1000))]
    corpora = (
        CorpusShareConfig(name="a", corpus=CorpusConfig(), rate=3.0),
        CorpusShareConfig(name="b", corpus=CorpusConfig(), rate=1.0, mixture=(PrefixLM(name="other"),)),
    )
    mixture = (SpanCorruption(name="x", rate=2.0), PrefixLM(name="y"))
    data = dataclasses.replace(data_config(mixture=mixture), corpora=corpora)
    with pytest.raises(DataError, match="made by the tokenizer"):
        TrainingStream(stores, data, 4)
    stores[1] = numbered_store(tmp_path / "c", 1000, base=3000)
    stream = TrainingStream(stores, data, 4)
    assert [(corpus, objective.name, share) for corpus, objective, share in stream.mixture_shares()] == [
        ("a", "x", 0.5),
        ("a", "y", 0.25),
        ("b", "other", 0.25),
    ]
    rows = stream.get_rows(np.arange(4 * stream.rows_per_epoch["b"]))
    ids = rows["denoiser_ids"]
    assert np.array_equal(np.bincount(ids) / len(ids), [0.5, 0.25, 0.25])
    epochs = stream.epochs(len(ids))
    assert epochs["b"] == 1.0 and epochs["a"] == pytest.approx(3 * len(ids) / 4 / stream.rows_per_epoch["a"])
    examples = zip(rows["encoder_input_tokens"], rows["decoder_target_tokens"], ids, strict=True)
    windows = [
        restore(without_zeros(one), without_zeros(two), data.objectives[number], stream.vocabulary)
        for one, two, number in examples
    ]
    tokens = np.concatenate([window for window, number in zip(windows, ids, strict=True) if number == 2])
    assert len(np.unique(tokens)) == len(tokens)


def test_rate_changes_neither_repeat_nor_lose_text_of_an_epoch(store: Store) -> None:
    """After a change within the first epoch, the rest of its text is read under the new rates, and nothing twice."""
    mixture = (SpanCorruption(name="x", rate=1.0), PrefixLM(name="y", rate=1.0))
    data = data_config(mixture=mixture)
    changed = dataclasses.replace(data, rate_schedule=(RatePhaseConfig(start_step=5, objectives=(("x", 0.0),)),))
    stream = TrainingStream([store], changed, 8)
    assert [np.bincount(stream.batch(step)["main"]["denoiser_ids"], minlength=2).tolist() for step in range(5)] == [
        [4, 4]
    ] * 5
    for step in (5, 900):
        assert (stream.batch(step)["main"]["denoiser_ids"] == 1).all()
    rows, seen = 0, []
    while stream.epochs(rows)["python_docs"] < 1.0:
        seen.append(raw_tokens(stream.get_row(rows), data, store.vocabulary))
        rows += 1
    tokens = np.concatenate(seen)
    assert len(np.unique(tokens)) == len(tokens)
    # The incomplete last block of each epoch span is not read.
    assert 6000 - len(tokens) < sum(row_tokens(objective, data) for objective in mixture) + row_tokens(mixture[1], data)


def test_corpora_continue_at_their_position_when_their_rate_rises(tmp_path: Path) -> None:
    stores = [numbered_store(tmp_path / "a", 3000), numbered_store(tmp_path / "b", 3000)]
    corpora = tuple(CorpusShareConfig(name=name, corpus=CorpusConfig()) for name in "ab")
    data = dataclasses.replace(
        data_config(), corpora=corpora, rate_schedule=(RatePhaseConfig(start_step=3, corpora=(("b", 3.0),)),)
    )
    stream = TrainingStream(stores, data, 14)
    assert [stream.epochs(rows)["a"] for rows in (0, 42)] == [0, 3 * 7 / stream.rows_per_epoch["a"]]
    assert stream.epochs(42 + 28)["b"] == pytest.approx((21 + 21) / stream.rows_per_epoch["b"])


def test_epoch_count_of_a_corpus_never_decreases(store: Store) -> None:
    """An epoch span that ends within an epoch ends where the next one begins, before the incomplete last block."""
    mixture = (SpanCorruption(name="x", rate=1.0), PrefixLM(name="y", rate=20.0))
    schedule = tuple(
        RatePhaseConfig(start_step=step, objectives=(("y", rate),)) for step, rate in ((6, 3.0), (50, 9.0))
    )
    stream = TrainingStream([store], dataclasses.replace(data_config(mixture=mixture), rate_schedule=schedule), 21)
    epochs = [stream.epochs(rows)["python_docs"] for rows in range(60 * 21)]
    assert (np.diff(epochs) >= 0).all() and epochs[-1] > 2


def test_corpus_with_rate_zero_begins_when_the_schedule_raises_it(tmp_path: Path) -> None:
    stores = [numbered_store(tmp_path / name, 3000) for name in "ab"]
    corpora = (
        CorpusShareConfig(name="a", corpus=CorpusConfig()),
        CorpusShareConfig(name="b", corpus=CorpusConfig(), rate=0.0),
    )
    schedule = (RatePhaseConfig(start_step=2, corpora=(("b", 1.0),)),)
    stream = TrainingStream(stores, dataclasses.replace(data_config(), corpora=corpora, rate_schedule=schedule), 14)
    corpus_R = stream.corpus_of(np.arange(4 * 14))
    assert not corpus_R[:28].any() and corpus_R[28:].sum() == 14
    assert stream.epochs(28)["b"] == 0 and stream.epochs(42)["b"] == pytest.approx(7 / stream.rows_per_epoch["b"])


@pytest.mark.parametrize("unit", ["token", "loss_token"])
def test_rates_can_be_shares_of_tokens(tmp_path: Path, unit: Literal["token", "loss_token"]) -> None:
    data = dataclasses.replace(data_config(), rate_unit=unit)
    shares = console_view.mixture_shares(TrainingStream([numbered_store(tmp_path / "s", 20000)], data, 8))
    assert [getattr(share, f"by_{unit}") for share in shares] == pytest.approx([1 / 7] * 7, abs=0.02)
    assert max(share.by_example for share in shares) > 0.17


def test_epochs_and_seeds_differ(store: Store) -> None:
    data = data_config()
    stream = TrainingStream([store], data, 8)
    index = np.arange(8)
    first, second = stream.get_rows(index), stream.get_rows(index + epoch_rows(stream))
    other = TrainingStream([store], dataclasses.replace(data, seed=1), 8).get_rows(index)
    again = TrainingStream([store], data, 8).get_rows(index)
    for name in ("encoder_input_tokens", "denoiser_ids"):
        assert not np.array_equal(first[name], second[name])
        assert not np.array_equal(first[name], other[name])
        assert np.array_equal(first[name], again[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_match_the_batch_spec(tmp_path: Path, layout: Layout) -> None:
    run = example(layout)
    store = text_store(tmp_path / "s", ["some text, " * 800], num_sentinels=run.data.tokenizer.num_sentinels)
    batch = TrainingStream([store], run.data, run.training.global_batch_size).batch(3)
    specification = batch_spec(run)
    assert batch.keys() == specification.keys()
    for name, array in specification["main"].items():
        assert batch["main"][name].shape == array.shape and batch["main"][name].dtype == array.dtype
    assert batch["main"].keys() == specification["main"].keys()


def test_rates_decide_the_windows_of_a_block() -> None:
    assert integer_proportions((1.0,) * 7) == (1,) * 7
    assert integer_proportions((0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.2)) == (2, 2, 1, 1, 1, 1, 2)
    assert integer_proportions((2.5,)) == (1,)
    uneven = integer_proportions((0.5, 0.3141, 0.1859))
    assert sum(uneven) == 100 and uneven == (50, 31, 19)
    assert integer_proportions((1.0, 1e-6)) == (99, 1)
    assert integer_proportions((1.0, 0.0, 1.0)) == (1, 0, 1)


def test_fingerprint_changes_with_everything_that_determines_rows(store: Store, tmp_path: Path) -> None:
    data = data_config()
    changes: list[DataConfig] = [
        dataclasses.replace(data, seed=1),
        dataclasses.replace(data, inputs_length=49),
        dataclasses.replace(data, layout="prefix_lm"),
        dataclasses.replace(data, mixture=ul2(uniform=False)),
        dataclasses.replace(data, mixture=data.mixture[:6]),
    ]
    prints = [TrainingStream([store], changed, 8).fingerprint for changed in (data, *changes)]
    prints.append(TrainingStream([numbered_store(tmp_path / "o", 5999)], data, 8).fingerprint)
    assert len(set(prints)) == len(prints)
    assert (
        TrainingStream([store], dataclasses.replace(data, prefetch_batches=5, store_dir="elsewhere"), 9).fingerprint
        == prints[0]
    )


def test_too_little_text_and_too_few_sentinels_are_refused_with_the_numbers(store: Store, tmp_path: Path) -> None:
    small = numbered_store(tmp_path / "s", 100)
    data = data_config()
    needed = sum(row_tokens(objective, data) for objective in data.mixture)
    with pytest.raises(DataError, match=f"found 100 train tokens, expected at least {needed}"):
        TrainingStream([small], data, 8)
    poor = numbered_store(tmp_path / "p", 6000, num_sentinels=5)
    with pytest.raises(ConfigError, match=r"X_3_0.5.*up to \d+ spans.*at most 5"):
        TrainingStream([poor], data, 8)


def test_tokens_of_mixed_objectives_are_in_proportion(tmp_path: Path) -> None:
    mixture = (SpanCorruption(name="a", rate=3.0), PrefixLM(name="b", rate=1.0))
    stream = TrainingStream([numbered_store(tmp_path / "s", 5000)], data_config(mixture=mixture), 16)
    ids = np.concatenate([stream.batch(step)["main"]["denoiser_ids"] for step in range(40)])
    whole = ids[: len(ids) // epoch_rows(stream) * epoch_rows(stream)]
    assert np.bincount(whole).tolist() == [len(whole) * 3 // 4, len(whole) // 4]


def test_masked_lm_windows_fill_their_rows(store: Store) -> None:
    stream = TrainingStream([store], data_config("encoder", (MaskedLM(),)), 4)
    assert (stream.batch(0)["main"]["encoder_target_tokens"] > 0).all()


def test_reading_a_store_imports_no_framework(store: Store) -> None:
    code = f"""
import sys
from pathlib import Path
from t5x_like.config import DataConfig, ul2
from t5x_like.data.inspection import console_view
from t5x_like.data.store import prepare
from t5x_like.data.stream import heldout, prefetch
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream.row_stream import TrainingStream
data = DataConfig(layout="encoder_decoder", mixture=ul2(), inputs_length=48, targets_length=48)
TrainingStream([Store.open(Path({str(store.path)!r}))], data, 8).batch(0)
heavy = {{"jax", "tensorflow", "seqio", "sentencepiece", "pyarrow"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


SCHEDULE = ((2, 0.5), (4, 0.3), (6, 0.2), (6, 0.1))


def test_mask_rates_are_linear_between_their_points() -> None:
    objective = MaskedLM(mask_rate=0.4, mask_rate_schedule=SCHEDULE)
    rates = [objective.at_step(step).mask_rate for step in range(9)]
    assert rates == pytest.approx([0.4, 0.4, 0.5, 0.4, 0.3, 0.25, 0.1, 0.1, 0.1])
    assert [problem.where for problem in MaskedLM(mask_rate_schedule=SCHEDULE[::-1]).problems("x")] == [
        "x.mask_rate_schedule"
    ]


@pytest.mark.parametrize("example_mode", ["windows", "documents"])
def test_a_row_has_the_mask_rate_of_the_step_that_reads_it(tmp_path: Path, example_mode: str) -> None:
    """Each row equals that of a run with this constant rate, however the rows are requested."""
    texts = [f"Text {number} of a few words. " * (number % 4 + 1) for number in range(90)]
    store = text_store(tmp_path / "text", texts)

    def stream_of(objective: Objective, batch_size: int = 4) -> TrainingStream:
        data = dataclasses.replace(data_config("encoder", mixture=(objective,)), example_mode=example_mode)
        return TrainingStream([store], data, batch_size)

    scheduled = MaskedLM(mask_rate=0.4, mask_rate_schedule=SCHEDULE)
    stream = stream_of(scheduled)
    for step in (0, 2, 5, 7):
        constant = stream_of(MaskedLM(mask_rate=scheduled.at_step(step).mask_rate)).batch(step)["main"]
        alone = [stream.get_row(index) for index in range(4 * step, 4 * step + 4)]
        for name, values in stream.batch(step)["main"].items():
            np.testing.assert_array_equal(values, constant[name])
            np.testing.assert_array_equal(values, np.concatenate([row[name] for row in alone]))
    together = stream.get_rows(np.arange(32))
    for name, values in stream.batch(6)["main"].items():
        np.testing.assert_array_equal(values, together[name][24:28])
    # The rows of a step follow from the batch size, and those of an objective without a schedule do not.
    assert stream.fingerprint != stream_of(scheduled, 8).fingerprint
    assert stream_of(MaskedLM()).fingerprint == stream_of(MaskedLM(), 8).fingerprint
