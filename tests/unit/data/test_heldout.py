"""Held-out batches are equal in every run, contain each window once, and report the exact bytes of scored tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.data_examples import data_config, numbered_store, raw_tokens, text_store

from t5x_like.config import CausalLM, DataConfig, PrefixLM, SpanCorruption
from t5x_like.config.objectives import Layout
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream.heldout import Batch, objective_batches, prefix_lm_batches

TEXTS = [f"Document {i}: " + "größer als dieser Text – " * (i % 7 + 1) for i in range(40)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return text_store(tmp_path_factory.mktemp("stores") / "texts", ["unused " * 100], TEXTS)


def held_out_batches(store: Store, data: DataConfig, rows: int, objective: int, num_batches: int) -> Iterator[Batch]:
    return objective_batches(store, data, data.sources[0], rows, data.mixture[objective], num_batches)


def rows_of(batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [
        {name: values[row : row + 1] for name, values in batch.items()} for row in range(len(batch["denoiser_ids"]))
    ]


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm", "causal_lm", "encoder"])
def test_windows_do_not_overlap_and_last_batch_is_padded_with_zero_weight_rows(tmp_path: Path, layout: Layout) -> None:
    data = data_config(layout)
    store = numbered_store(tmp_path / "s", 10, 900)
    weights = "encoder_loss_weights" if layout == "encoder" else "decoder_loss_weights"
    for index in range(len(data.mixture)):
        seen: list[np.ndarray] = []
        filling = 0
        for batch in held_out_batches(store, data, 4, index, num_batches=100):
            assert (batch["main"]["denoiser_ids"] == index).all()
            for row in rows_of(batch["main"]):
                if row[weights].any():
                    seen.append(raw_tokens(row, data, store.vocabulary))
                else:
                    filling += 1
                    assert not any(values.any() for name, values in row.items() if name != "denoiser_ids")
        tokens = np.concatenate(seen)
        length = len(seen[0])
        assert len(np.unique(tokens)) == len(tokens) == 900 // length * length
        assert filling == -len(seen) % 4


def test_batches_depend_on_text_and_objective_only(store: Store) -> None:
    data = data_config()
    other = dataclasses.replace(data, seed=9, mixture=data.mixture[1:], prefetch_batches=3)
    for one, two in zip(held_out_batches(store, data, 4, 3, 2), held_out_batches(store, other, 4, 2, 2), strict=True):
        assert np.array_equal(one["main"]["encoder_input_tokens"], two["main"]["encoder_input_tokens"])
    some = next(iter(held_out_batches(store, data, 8, 0, 1)))["main"]["encoder_input_tokens"]
    parts = [batch["main"]["encoder_input_tokens"] for batch in held_out_batches(store, data, 4, 0, 2)]
    assert np.array_equal(np.concatenate(parts), some)


PLAIN = dataclasses.replace(data_config("causal_lm"), mixture=(CausalLM(),))
SPANS_ONLY = data_config(mixture=(SpanCorruption(name="t5"),))


@pytest.mark.parametrize(
    "data",
    [data_config(), data_config("prefix_lm"), data_config("causal_lm", (PrefixLM(name="p"),)), PLAIN, SPANS_ONLY],
    ids=["encoder_decoder", "prefix_lm", "causal_lm with prefix", "causal_lm", "spans only"],
)
def test_second_half_is_scored_and_its_bytes_are_exact(store: Store, data: DataConfig) -> None:
    held_out = store.split("validation")
    text = b"".join(store.tokenizer.to_bytes(held_out.tokens(0, held_out.num_tokens).tolist()) for _ in range(1))
    scored = list(prefix_lm_batches(store, data, 4, num_batches=3))
    assert len(scored) == 3
    for batch in scored:
        features = batch.batch["main"]
        weights = features["decoder_loss_weights"] > 0
        assert np.array_equal(features["decoder_target_tokens"][weights], batch.tokens)
        assert batch.text == bytes(int(token) - 3 for token in batch.tokens if token >= 3)
        assert len(batch.tokens) == weights.sum() == 4 * weights[0].sum()
        for row in rows_of(features):
            half = bytes(int(t) - 3 for t in row["decoder_target_tokens"][row["decoder_loss_weights"] > 0] if t >= 3)
            assert half in text
    first = scored[0].batch["main"]
    if "encoder_input_tokens" in first:
        window = first["encoder_input_tokens"][0]
        mode = [store.vocabulary.mode_id("S")] if data.mixture[-1].mode == "S" else []
        assert window[: len(mode)].tolist() == mode
        given = bytes(int(t) - 3 for t in window[len(mode) :] if 3 <= t < 259)
        half = bytes(int(t) - 3 for t in first["decoder_target_tokens"][0] if t >= 3)
        assert given + half in text and abs(len(given) - len(half)) <= 2


def test_causal_row_continues_the_text_without_separator(store: Store) -> None:
    (batch, *_) = prefix_lm_batches(store, PLAIN, 4, 1)
    row = batch.batch["main"]["decoder_target_tokens"][0]
    weights = batch.batch["main"]["decoder_loss_weights"][0]
    window = PLAIN.row_length - 1
    given = window // 2
    assert weights.tolist() == [0] * given + [1] * (window - given) + [0]
    assert b"".join(TEXT.encode() for TEXT in TEXTS).find(bytes(int(t) - 3 for t in row[:given] if t >= 3)) >= 0


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (0.0, 0.3), (0.6, 0.9), (0.0, 1.0)])
def test_continuations_have_lengths_that_occur_in_training(store: Store, low: float, high: float) -> None:
    objective = PrefixLM(name="S", min_target_fraction=low, max_target_fraction=high)
    data = data_config(mixture=(objective,))
    length = objective.raw_window_length(data.layout, data.inputs_length, data.targets_length)
    (batch, *_) = prefix_lm_batches(store, data, 4, 1)
    scored_N = (batch.batch["main"]["decoder_loss_weights"] > 0).sum(axis=1)
    fewest, most = objective.target_range(length)
    assert scored_N.tolist() == [min(max(length // 2, fewest), most)] * 4


def test_short_split_is_one_window_and_empty_split_has_none(tmp_path: Path) -> None:
    data = data_config()
    short = text_store(tmp_path / "short", ["x"], ["only this"])
    (batch,) = prefix_lm_batches(short, data, 4, 3)
    assert batch.text == b"this"
    assert len(list(held_out_batches(short, data, 4, 0, 3))) == 1
    empty = text_store(tmp_path / "empty", ["x"])
    assert not list(prefix_lm_batches(empty, data, 4, 3)) and not list(held_out_batches(empty, data, 4, 0, 3))


def test_encoder_has_no_continuations(store: Store) -> None:
    assert not list(prefix_lm_batches(store, data_config("encoder"), 4, 3))
