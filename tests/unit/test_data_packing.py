"""Packed rows: every document whole and once per epoch, in every layout; pairs as they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from data_examples import data_config, numbered_store, pair_store, raw_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import CausalLM, DataError, MaskedLM, Objective, PrefixLM, SpanCorruption, Supervised
from t5x_like.config.objectives import Layout
from t5x_like.data import describe
from t5x_like.data.packing import first_fit
from t5x_like.data.rows import segments
from t5x_like.data.stream import Stream
from t5x_like.data.validation import objective_batches
from t5x_like.data.vocabulary import EOS_ID, NUM_SPECIAL

LENGTHS = [2, 3, 5, 9, 14, 30, 31, 90, 200, 7, 7, 7, 40, 1, 26] * 6
MIXTURES: dict[Layout, tuple[Objective, ...]] = {
    "encoder_decoder": (SpanCorruption(name="spans", mode="R"), PrefixLM(name="prefix", rate=2.0)),
    "prefix_lm": (PrefixLM(name="prefix"), SpanCorruption(name="spans", noise_density=0.5)),
    "causal_lm": (CausalLM(),),
    "encoder": (MaskedLM(),),
}


@given(
    cells=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=60),
    open_rows=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_first_fit_takes_the_first_open_row_with_room(cells: list[tuple[int, int]], open_rows: int) -> None:
    rows = first_fit(np.array(cells), (20, 9), open_rows)
    used: dict[int, np.ndarray] = {}
    for row, size in zip(rows.tolist(), cells, strict=True):
        newest = sorted(used)[-open_rows:]
        room = [known for known in newest if (used[known] + size <= (20, 9)).all()]
        assert row == (room[0] if room else len(used))
        used[row] = used.get(row, np.zeros(2, int)) + size
    assert all((total <= (20, 9)).all() for total in used.values())


@pytest.mark.parametrize("layout", list(MIXTURES))
def test_each_document_is_whole_and_once_per_epoch(tmp_path: Path, layout: Layout) -> None:
    store = numbered_store(tmp_path / "s", sum(LENGTHS), lengths=LENGTHS)
    data = dataclasses.replace(data_config(layout, MIXTURES[layout]), examples="documents")
    stream = Stream([store], data, 4)
    rows = stream.rows_per_epoch["python_docs"]
    for epoch in range(2):
        features = stream.rows(np.arange(epoch * rows, (epoch + 1) * rows))
        pieces = []
        for row in range(rows):
            for example in segments({name: values[row] for name, values in features.items()}):
                assert len(set(example["denoiser_ids"].tolist())) == 1
                one = {name: values[None] for name, values in example.items()}
                one["denoiser_ids"] = example["denoiser_ids"][:1]
                pieces.append(raw_tokens(one, data, store.vocabulary) - NUM_SPECIAL)
        for piece in pieces:
            assert np.array_equal(piece, np.arange(piece[0], piece[0] + len(piece)))
        # Documents without their last token, EOS; those of one token alone are left out.
        starts = np.cumsum([0, *LENGTHS[:-1]])
        wanted = [np.arange(a, a + n - 1) for a, n in zip(starts.tolist(), LENGTHS, strict=True) if n > 2]
        assert sorted(np.concatenate(pieces).tolist()) == np.concatenate(wanted).tolist()
    stacks = {"encoder": ("encoder",), "encoder_decoder": ("encoder", "decoder")}.get(layout, ("decoder",))
    for stack in stacks:
        ids, positions = features[f"{stack}_segment_ids"], features[f"{stack}_positions"]
        # A segment is a run of cells, which its positions count from 0.
        assert (np.diff(ids, axis=1) <= 1).all() and (positions[ids == 0] == 0).all()
        begins = (np.diff(ids, axis=1, prepend=0) != 0) & (ids > 0)
        assert np.array_equal(begins, (positions == 0) & (ids > 0))
    assert features[f"{stacks[0]}_segment_ids"].max() > 2


def test_short_documents_fill_their_rows(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "s", sum(LENGTHS), lengths=LENGTHS)
    data = dataclasses.replace(data_config("causal_lm"), examples="documents")
    stream = Stream([store], data, 4)
    features = stream.rows(np.arange(stream.rows_per_epoch["python_docs"]))
    alone = sum(LENGTHS) / (96 * len(LENGTHS))
    assert (features["decoder_segment_ids"] > 0).mean() > max(0.85, 2 * alone)


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm", "causal_lm"])
def test_pairs_are_given_and_predicted_as_they_are(tmp_path: Path, layout: Layout) -> None:
    generator = np.random.default_rng(0)
    lengths = [(int(a), int(b)) for a, b in generator.integers(1, 20, (80, 2))] + [(70, 3), (0, 4), (4, 0)]
    store, pairs = pair_store(tmp_path / "s", lengths)
    data = dataclasses.replace(data_config(layout, (Supervised(mode="S"),)), examples="documents")
    stream = Stream([store], data, 4)
    features = stream.rows(np.arange(stream.rows_per_epoch["python_docs"]))
    found = []
    for row in range(len(features["denoiser_ids"])):
        for example in segments({name: values[row] for name, values in features.items()}):
            scored = example["decoder_loss_weights"] > 0
            stream_ = example["decoder_target_tokens"]
            inputs = example["encoder_input_tokens"] if layout == "encoder_decoder" else stream_[~scored]
            found.append((inputs.tolist(), stream_[scored].tolist()))
            # Each example reads its own targets one place later, behind a 0.
            assert example["decoder_input_tokens"].tolist() == [0, *stream_[:-1].tolist()]
            if layout == "prefix_lm":
                assert example["decoder_causal_attention"].sum() == len(inputs) + 1
    mode = store.vocabulary.mode_id("S")
    wanted = [([mode, *given[:46], EOS_ID], [*targets, EOS_ID]) for given, targets in pairs if targets]
    assert sorted(found) == sorted(wanted)
    assert stream.sources[0].reader.cut == 1 and stream.sources[0].reader.too_short == 1
    caption = str(describe.mixture_table(stream).caption)
    assert "1 pairs are longer" in caption and "1 documents are too short" in caption


@pytest.mark.parametrize("layout", ["encoder_decoder", "causal_lm"])
def test_held_out_pairs_have_a_row_each(tmp_path: Path, layout: Layout) -> None:
    store, pairs = pair_store(tmp_path / "s", [(3, 4), (5, 6), (7, 2), (2, 9), (4, 4)])
    data = dataclasses.replace(data_config(layout, (Supervised(),)), examples="documents")
    batches = list(objective_batches(store, data, data.sources[0], 4, data.mixture[0], 9, split="train"))
    assert len(batches) == 2
    weights = np.concatenate([batch["main"]["decoder_loss_weights"].sum(axis=1) for batch in batches])
    assert sorted(weights.tolist()) == sorted([*(len(targets) + 1 for _, targets in pairs), 0, 0, 0])


def test_a_corpus_without_an_example_is_refused(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "s", 10, lengths=[1] * 10)
    with pytest.raises(DataError, match="found none of at least two tokens"):
        Stream([store], dataclasses.replace(data_config("causal_lm"), examples="documents"), 4)


@pytest.mark.parametrize("layout", list(MIXTURES))
def test_fewer_documents_than_objectives(tmp_path: Path, layout: Layout) -> None:
    """An objective that no document is drawn for has no part in the plan."""
    store = numbered_store(tmp_path / "s", 30, lengths=[30])
    mixture = (MaskedLM(name="x"), MaskedLM(name="y", mask_rate=0.4)) if layout == "encoder" else MIXTURES["prefix_lm"]
    stream = Stream([store], dataclasses.replace(data_config(layout, mixture), examples="documents"), 4)
    assert stream.rows_per_epoch == {"python_docs": 1} and stream.row(0)["denoiser_ids"].max() in (0, 1)
