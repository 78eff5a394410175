"""Windows with masked document borders equal packed rows of the parts of the documents."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers.config_examples import example
from helpers.data_examples import data_config, text_store

from t5x_like.config import PrefixLM, SpanCorruption, batch_spec, evaluation_spec
from t5x_like.config.objectives import Layout
from t5x_like.config.validation import validate
from t5x_like.data.objectives.examples import without_inputs
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream.feature_converters import NO_DENOISER, Features, put_packed
from t5x_like.data.stream.heldout import objective_batches, prefix_lm_batches
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.tokenizers.vocabulary import EOS_ID


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    texts = [chr(97 + number % 26) * (1 + number * 7 % 61) for number in range(80)]
    return text_store(tmp_path_factory.mktemp("stores") / "texts", texts, texts[:20])


def rows(store: Store, layout: Layout, borders: bool) -> tuple[TrainingStream, Features]:
    data = dataclasses.replace(data_config(layout), mask_document_borders=borders)
    stream = TrainingStream([store], data, 8)
    return stream, stream.batch(0)["main"]


def test_windows_equal_packed_rows_of_their_parts(store: Store) -> None:
    _, plain = rows(store, "causal_lm", borders=False)
    _, masked = rows(store, "causal_lm", borders=True)
    np.testing.assert_array_equal(masked["decoder_target_tokens"], plain["decoder_target_tokens"])
    packed = {name: np.zeros_like(values) for name, values in masked.items()}
    packed["denoiser_ids"][:] = NO_DENOISER
    for number, tokens in enumerate(masked["decoder_target_tokens"]):
        tokens = tokens[: int(np.flatnonzero(tokens)[-1]) + 1]
        parts = [part for part in np.split(tokens, np.flatnonzero(tokens == EOS_ID) + 1) if len(part)]
        offset = 0
        for segment, part in enumerate(parts, start=1):
            examples = without_inputs(part[None], np.array([len(part)]))
            put_packed(
                packed,
                np.array([number]),
                np.array([segment]),
                {"decoder": np.array([offset])},
                examples,
                "causal_lm",
                0,
            )
            offset += len(part)
    assert masked["decoder_segment_ids"].max() > 3
    for name, values in packed.items():
        np.testing.assert_array_equal(masked[name], values, err_msg=name)


def test_masked_lm_has_a_segment_for_each_document(store: Store) -> None:
    _, plain = rows(store, "encoder", borders=False)
    _, masked = rows(store, "encoder", borders=True)
    for name in ("encoder_input_tokens", "encoder_target_tokens", "encoder_loss_weights"):
        np.testing.assert_array_equal(masked[name], plain[name])
    ends = masked["encoder_target_tokens"] == EOS_ID
    segments = masked["encoder_segment_ids"]
    np.testing.assert_array_equal(np.diff(segments, axis=1)[:, :-1] == 1, ends[:, :-2])
    np.testing.assert_array_equal(masked["encoder_positions"][:, 1:-1] == 0, ends[:, :-2])


@pytest.mark.parametrize("layout", ["causal_lm", "encoder"])
def test_batches_have_the_features_that_the_program_is_compiled_for(store: Store, layout: Layout) -> None:
    stream, batch = rows(store, layout, borders=True)
    run = example(layout)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, **dataclasses.asdict(stream.data) | {
        "corpus": run.data.corpus, "mixture": stream.data.mixture, "tokenizer": run.data.tokenizer,
        "corpus_mixing": run.data.corpus_mixing,
    }))  # fmt: skip
    assert {name: values.shape for name, values in batch.items()} == {
        name: spec.shape for name, spec in batch_spec(run)["main"].items()
    }
    (share,) = stream.data.sources
    held_out = [*objective_batches(store, stream.data, share, 8, stream.data.mixture[0], 1)]
    held_out += [scored.batch for scored in prefix_lm_batches(store, stream.data, 8, 1)]
    assert len(held_out) == (2 if layout == "causal_lm" else 1)
    for one in held_out:
        expected = {name: spec.shape for name, spec in evaluation_spec(run)["main"].items()}
        assert {name: values.shape for name, values in one["main"].items()} == expected
    assert stream.fingerprint != rows(store, layout, borders=False)[0].fingerprint


def test_borders_need_targets_that_are_the_text() -> None:
    run = example("causal_lm")
    for changes, expected in (
        ({"mixture": (PrefixLM(name="S"),)}, "True with 'S'"),
        ({"example_mode": "documents"}, "True with example_mode documents"),
    ):
        data = dataclasses.replace(run.data, mask_document_borders=True, **changes)  # type: ignore[arg-type]
        problems = [str(problem) for problem in validate(dataclasses.replace(run, data=data))]
        assert any(expected in problem for problem in problems), problems
    other = example("encoder_decoder")
    data = dataclasses.replace(other.data, mask_document_borders=True, mixture=(SpanCorruption(name="R"),))
    assert any("with the layout encoder_decoder" in str(p) for p in validate(dataclasses.replace(other, data=data)))
