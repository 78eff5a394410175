"""Packed rows contain every document completely once per epoch in every layout, and pairs unchanged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers.data_examples import data_config, numbered_store, pair_store, raw_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import CausalLM, MaskedLM, Objective, PrefixLM, SpanCorruption, Supervised
from t5x_like.config.objectives import Layout
from t5x_like.data.inspection import console_view
from t5x_like.data.stream import first_fit as fitting
from t5x_like.data.stream import packing_planner
from t5x_like.data.stream.first_fit import first_fit, first_fit_in_lanes, first_fit_of_first
from t5x_like.data.stream.heldout import objective_batches
from t5x_like.data.stream.packing import PackedRows
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.stream.unpack import segments
from t5x_like.data.tokenizers.vocabulary import EOS_ID, NUM_SPECIAL
from t5x_like.errors import DataError

LENGTHS = [2, 3, 5, 9, 14, 30, 31, 90, 200, 7, 7, 7, 40, 1, 26] * 6
MIXTURES: dict[Layout, tuple[Objective, ...]] = {
    "encoder_decoder": (SpanCorruption(name="spans", mode="R"), PrefixLM(name="prefix", rate=2.0)),
    "prefix_lm": (PrefixLM(name="prefix"), SpanCorruption(name="spans", noise_density=0.5)),
    "causal_lm": (CausalLM(),),
    "encoder": (MaskedLM(),),
}


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=60),
    open_rows=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_first_fit_uses_first_open_row_that_fits(sizes: list[tuple[int, int]], open_rows: int) -> None:
    rows = first_fit(np.array(sizes), (20, 9), open_rows)
    used: dict[int, np.ndarray] = {}
    for row, size in zip(rows.tolist(), sizes, strict=True):
        newest = sorted(used)[-open_rows:]
        fitting = [known for known in newest if (used[known] + size <= (20, 9)).all()]
        assert row == (fitting[0] if fitting else len(used))
        used[row] = used.get(row, np.zeros(2, int)) + size
    assert all((total <= (20, 9)).all() for total in used.values())


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=60),
    count=st.integers(1, 20),
    open_rows=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_first_examples_are_those_of_the_whole_plan(sizes: list[tuple[int, int]], count: int, open_rows: int) -> None:
    row_N = first_fit(np.array(sizes), (20, 9), open_rows)
    whole = np.argsort(row_N, kind="stable")
    example_M, row_M = first_fit_of_first(np.array(sizes), (20, 9), count, open_rows)
    found = example_M[np.argsort(row_M, kind="stable")]
    assert len(found) >= min(count, len(sizes))
    np.testing.assert_array_equal(found, whole[: len(found)])


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=60),
    lanes=st.integers(1, 7),
    open_rows=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_lanes_are_packed_by_first_fit_one_after_the_other(
    sizes: list[tuple[int, int]], lanes: int, open_rows: int
) -> None:
    array = np.array(sizes)
    steps = -(-len(array) // lanes)
    expected: list[np.ndarray] = []
    for first in range(0, len(array), steps):
        rows = first_fit(array[first : first + steps], (20, 9), open_rows)
        expected.append(rows + max((int(part.max()) + 1 for part in expected), default=0))
    np.testing.assert_array_equal(first_fit_in_lanes(array, (20, 9), lanes, open_rows), np.concatenate(expected))


def test_plan_in_parts_holds_each_document_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = numbered_store(tmp_path / "s", sum(LENGTHS), lengths=LENGTHS)
    data = dataclasses.replace(data_config("causal_lm"), example_mode="documents")
    whole = TrainingStream([store], data, 4)
    monkeypatch.setattr(packing_planner, "DOCUMENTS_PER_PART", 25)
    monkeypatch.setattr(fitting, "LANES", 3)
    parts = TrainingStream([store], data, 4)
    (reader,) = (source.reader for source in parts.sources)
    assert isinstance(reader, PackedRows)
    assert parts.fingerprint != whole.fingerprint
    found = []
    for stream in (whole, parts):
        targets = stream.get_rows(np.arange(stream.rows_per_epoch["python_docs"]))["decoder_target_tokens"]
        found.append(np.sort(targets[targets >= NUM_SPECIAL]))
    np.testing.assert_array_equal(*found)
    (objective,) = data.mixture
    assert reader.row_share(objective) == pytest.approx(1.0)
    assert reader.row_means(objective)[0] * reader.num_rows == pytest.approx(found[0].size)
    store_folder = [path.name for path in tmp_path.iterdir()]
    assert store_folder == ["s"], "temporary files have no name"


@pytest.mark.parametrize("layout", list(MIXTURES))
def test_each_document_occurs_completely_once_per_epoch(tmp_path: Path, layout: Layout) -> None:
    store = numbered_store(tmp_path / "s", sum(LENGTHS), lengths=LENGTHS)
    data = dataclasses.replace(data_config(layout, MIXTURES[layout]), example_mode="documents")
    stream = TrainingStream([store], data, 4)
    rows = stream.rows_per_epoch["python_docs"]
    for epoch in range(2):
        features = stream.get_rows(np.arange(epoch * rows, (epoch + 1) * rows))
        pieces = []
        for row in range(rows):
            for example in segments({name: values[row] for name, values in features.items()}):
                assert len(set(example["denoiser_ids"].tolist())) == 1
                one = {name: values[None] for name, values in example.items()}
                one["denoiser_ids"] = example["denoiser_ids"][:1]
                pieces.append(raw_tokens(one, data, store.vocabulary) - NUM_SPECIAL)
        for piece in pieces:
            assert np.array_equal(piece, np.arange(piece[0], piece[0] + len(piece)))
        # Documents have no EOS here. Documents of a single token are left out.
        starts = np.cumsum([0, *LENGTHS[:-1]])
        wanted = [np.arange(a, a + n - 1) for a, n in zip(starts.tolist(), LENGTHS, strict=True) if n > 2]
        assert sorted(np.concatenate(pieces).tolist()) == np.concatenate(wanted).tolist()
    stacks = {"encoder": ("encoder",), "encoder_decoder": ("encoder", "decoder")}.get(layout, ("decoder",))
    for stack in stacks:
        ids, positions = features[f"{stack}_segment_ids"], features[f"{stack}_positions"]
        # A segment is a run of token positions, numbered from 0.
        assert (np.diff(ids, axis=1) <= 1).all() and (positions[ids == 0] == 0).all()
        begins = (np.diff(ids, axis=1, prepend=0) != 0) & (ids > 0)
        assert np.array_equal(begins, (positions == 0) & (ids > 0))
    assert features[f"{stacks[0]}_segment_ids"].max() > 2


def test_short_documents_fill_rows(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "s", sum(LENGTHS), lengths=LENGTHS)
    data = dataclasses.replace(data_config("causal_lm"), example_mode="documents")
    stream = TrainingStream([store], data, 4)
    features = stream.get_rows(np.arange(stream.rows_per_epoch["python_docs"]))
    alone = sum(LENGTHS) / (96 * len(LENGTHS))
    assert (features["decoder_segment_ids"] > 0).mean() > max(0.85, 2 * alone)


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm", "causal_lm"])
def test_packed_pairs_equal_the_stored_pairs(tmp_path: Path, layout: Layout) -> None:
    generator = np.random.default_rng(0)
    lengths = [(int(a), int(b)) for a, b in generator.integers(1, 20, (80, 2))] + [(70, 3), (0, 4), (4, 0)]
    store, pairs = pair_store(tmp_path / "s", lengths)
    data = dataclasses.replace(data_config(layout, (Supervised(mode="S"),)), example_mode="documents")
    stream = TrainingStream([store], data, 4)
    features = stream.get_rows(np.arange(stream.rows_per_epoch["python_docs"]))
    found = []
    for row in range(len(features["denoiser_ids"])):
        for example in segments({name: values[row] for name, values in features.items()}):
            scored = example["decoder_loss_weights"] > 0
            stream_ = example["decoder_target_tokens"]
            inputs = example["encoder_input_tokens"] if layout == "encoder_decoder" else stream_[~scored]
            found.append((inputs.tolist(), stream_[scored].tolist()))
            # Each example reads its own targets shifted by one position, with 0 in front.
            assert example["decoder_input_tokens"].tolist() == [0, *stream_[:-1].tolist()]
            if layout == "prefix_lm":
                assert example["decoder_causal_attention"].sum() == len(inputs) + 1
    mode = store.vocabulary.mode_id("S")
    # The inputs of 70 tokens are cut where they have a stack of 48 positions; a single stream of 96 holds the pair.
    longest = 46 if layout == "encoder_decoder" else 70
    wanted = [([mode, *given[:longest], EOS_ID], [*targets, EOS_ID]) for given, targets in pairs if targets]
    assert sorted(found) == sorted(wanted)
    reader = stream.sources[0].reader
    assert reader.totals.truncated == reader.totals.cut_inputs == (layout == "encoder_decoder")
    assert reader.totals.too_short == 1 and reader.totals.cut_targets == 0
    caption = str(console_view.mixture_table(stream).caption)
    assert ("1 pairs are longer" in caption) == (layout == "encoder_decoder")
    assert "1 documents are too short" in caption


@pytest.mark.parametrize(
    ("layout", "lengths", "kept"),
    [
        ("causal_lm", (60, 34), (60, 34)),  # 96 positions in all, two of them EOS.
        ("causal_lm", (60, 35), (59, 35)),  # The targets are within their own length, so the inputs are cut.
        ("causal_lm", (20, 90), (20, 74)),
        ("prefix_lm", (90, 90), (47, 47)),
        ("encoder_decoder", (20, 60), (20, 47)),
        ("encoder_decoder", (60, 20), (47, 20)),
    ],
)
def test_pairs_are_cut_by_the_length_of_the_row(
    tmp_path: Path, layout: Layout, lengths: tuple[int, int], kept: tuple[int, int]
) -> None:
    """A part that is shorter than its share leaves the rest to the other one; cut targets do not end in EOS."""
    store, [(given, targets)] = pair_store(tmp_path / "s", [lengths])
    data = dataclasses.replace(data_config(layout, (Supervised(),)), example_mode="documents")
    stream = TrainingStream([store], data, 4)
    (example,) = segments({name: values[0] for name, values in stream.get_rows(np.arange(1)).items()})
    scored = example["decoder_loss_weights"] > 0
    stream_ = example["decoder_target_tokens"]
    inputs = example["encoder_input_tokens"] if layout == "encoder_decoder" else stream_[~scored]
    assert inputs.tolist() == [*given[: kept[0]], EOS_ID]
    end = [EOS_ID] if kept[1] == lengths[1] else []
    assert stream_[scored].tolist() == [*targets[: kept[1]], *end]
    reader = stream.sources[0].reader
    assert (reader.totals.cut_inputs, reader.totals.cut_targets) == (kept[0] < lengths[0], kept[1] < lengths[1])
    ((batch,),) = [objective_batches(store, data, data.sources[0], 1, data.mixture[0], 1, split="train")]
    assert batch["main"]["decoder_loss_weights"].sum() == kept[1] + len(end)


def test_targets_of_one_token_fill_rows_of_two(tmp_path: Path) -> None:
    store, [(given, targets)] = pair_store(tmp_path / "s", [(9, 1)])
    data = dataclasses.replace(
        data_config("encoder_decoder", (Supervised(),)), example_mode="documents", targets_length=2
    )
    rows = TrainingStream([store], data, 4).get_rows(np.arange(1))
    ((held_out,),) = [objective_batches(store, data, data.sources[0], 1, data.mixture[0], 1, split="train")]
    for features in (rows, held_out["main"]):
        assert features["decoder_target_tokens"].tolist() == [[*targets, EOS_ID]]
        assert features["encoder_input_tokens"][0, : len(given) + 1].tolist() == [*given, EOS_ID]


@pytest.mark.parametrize("layout", ["encoder_decoder", "causal_lm"])
def test_held_out_pairs_are_not_packed(tmp_path: Path, layout: Layout) -> None:
    store, pairs = pair_store(tmp_path / "s", [(3, 4), (5, 6), (7, 2), (2, 9), (4, 4)])
    data = dataclasses.replace(data_config(layout, (Supervised(),)), example_mode="documents")
    batches = list(objective_batches(store, data, data.sources[0], 4, data.mixture[0], 9, split="train"))
    assert len(batches) == 2
    weights = np.concatenate([batch["main"]["decoder_loss_weights"].sum(axis=1) for batch in batches])
    assert sorted(weights.tolist()) == sorted([*(len(targets) + 1 for _, targets in pairs), 0, 0, 0])


def test_corpus_without_examples_is_refused(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "s", 10, lengths=[1] * 10)
    with pytest.raises(DataError, match="found none of at least two tokens"):
        TrainingStream([store], dataclasses.replace(data_config("causal_lm"), example_mode="documents"), 4)


@pytest.mark.parametrize("layout", list(MIXTURES))
def test_fewer_documents_than_objectives_can_be_read(tmp_path: Path, layout: Layout) -> None:
    """An objective for which no document is drawn does not occur in the plan."""
    store = numbered_store(tmp_path / "s", 30, lengths=[30])
    mixture = (MaskedLM(name="x"), MaskedLM(name="y", mask_rate=0.4)) if layout == "encoder" else MIXTURES["prefix_lm"]
    stream = TrainingStream([store], dataclasses.replace(data_config(layout, mixture), example_mode="documents"), 4)
    assert stream.rows_per_epoch == {"python_docs": 1} and stream.get_row(0)["denoiser_ids"].max() in (0, 1)
