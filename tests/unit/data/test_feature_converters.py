"""Model features equal those of seqio's converters for the same examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from t5x_like.config import CausalLM, MaskedLM, Objective, PrefixLM, SpanCorruption
from t5x_like.config.objectives import Layout
from t5x_like.data.objectives.examples import Examples
from t5x_like.data.objectives.registry import denoise
from t5x_like.data.stream import rng
from t5x_like.data.stream.feature_converters import convert
from t5x_like.data.tokenizers.vocabulary import NUM_SPECIAL, Vocabulary

VOCABULARY = Vocabulary(base_size=500, num_sentinels=40)
INPUTS, TARGETS = 56, 44
SPANS = SpanCorruption(name="spans", noise_density=0.3, mode="R")
PREFIX = PrefixLM(name="prefix", max_target_fraction=0.8, mode="S")
ALL_MASKED = MaskedLM(replace_with_mask=1.0, replace_with_random=0.0)


def some_examples(objective: Objective, rows: int = 5, length: int = 38) -> Examples:
    tokens = np.random.default_rng(0).integers(NUM_SPECIAL, VOCABULARY.base_size, (rows, length))
    return denoise(tokens, rng.fold_in(1, np.arange(rows)), objective, VOCABULARY)


def by_seqio(converter: Any, lengths: dict[str, int], examples: Examples) -> dict[str, np.ndarray]:
    """Return the features of a seqio converter for the same inputs and targets."""
    import tensorflow as tf

    def generate() -> Any:
        for row, (given, wanted) in enumerate(zip(examples.input_lengths_N, examples.target_lengths_N, strict=True)):
            pair = {"inputs": examples.inputs_NxI[row, :given], "targets": examples.targets_NxT[row, :wanted]}
            yield {name: pair[name] for name in lengths}

    signature = {name: tf.TensorSpec([None], tf.int32) for name in lengths}
    dataset = tf.data.Dataset.from_generator(generate, output_signature=signature)
    rows = list(converter(dataset, lengths).as_numpy_iterator())
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(
    ("layout", "name", "lengths", "objective"),
    [
        ("encoder_decoder", "EncDecFeatureConverter", {"inputs": INPUTS, "targets": TARGETS}, SPANS),
        ("encoder_decoder", "EncDecFeatureConverter", {"inputs": INPUTS, "targets": TARGETS}, PREFIX),
        ("prefix_lm", "PrefixLMFeatureConverter", {"inputs": INPUTS, "targets": TARGETS}, SPANS),
        ("prefix_lm", "PrefixLMFeatureConverter", {"inputs": INPUTS, "targets": TARGETS}, PREFIX),
        ("prefix_lm", "PrefixLMFeatureConverter", {"inputs": INPUTS, "targets": TARGETS}, CausalLM()),
        ("causal_lm", "LMFeatureConverter", {"targets": INPUTS + TARGETS}, CausalLM()),
        ("encoder", "EncoderFeatureConverter", {"inputs": INPUTS, "targets": INPUTS}, ALL_MASKED),
    ],
)
def test_features_equal_those_of_seqios_converters(
    layout: Layout, name: str, lengths: dict[str, int], objective: Objective
) -> None:
    seqio = pytest.importorskip("seqio")
    examples = some_examples(objective)
    arguments = {"mask_id": VOCABULARY.mask_id} if layout == "encoder" else {}
    expected = by_seqio(getattr(seqio, name)(pack=False, **arguments), lengths, examples)
    found = convert(examples, layout, INPUTS, 0 if layout == "encoder" else TARGETS)
    assert set(found) == set(expected)
    for feature, values in expected.items():
        assert np.array_equal(found[feature], values), feature
        assert found[feature].dtype == np.int32


def test_prefix_lm_matches_the_example_in_seqios_docstring() -> None:
    """inputs [9, 4, 6, 1], targets [3, 9, 1]."""
    examples = Examples(
        np.array([[9, 4, 6, 1]], np.int32), np.array([[3, 9, 1]], np.int32), np.array([4]), np.array([3])
    )
    features = {name: values[0].tolist() for name, values in convert(examples, "prefix_lm", 5, 4).items()}
    assert features == {
        "decoder_target_tokens": [9, 4, 6, 1, 3, 9, 1, 0, 0],
        "decoder_input_tokens": [0, 9, 4, 6, 1, 3, 9, 1, 0],
        "decoder_loss_weights": [0, 0, 0, 0, 1, 1, 1, 0, 0],
        "decoder_causal_attention": [1, 1, 1, 1, 1, 0, 0, 0, 0],
    }


def test_span_corruption_in_a_causal_row_is_scored_on_its_targets_only() -> None:
    examples = some_examples(SPANS)
    causal = convert(examples, "causal_lm", INPUTS, TARGETS)
    prefix = convert(examples, "prefix_lm", INPUTS, TARGETS)
    flag = prefix.pop("decoder_causal_attention")
    assert "decoder_causal_attention" not in causal
    assert all(np.array_equal(causal[name], prefix[name]) for name in prefix)
    assert np.array_equal(causal["decoder_loss_weights"].sum(axis=1), examples.target_lengths_N)
    assert np.array_equal(flag.sum(axis=1), examples.input_lengths_N + 1)


def test_masked_lm_scores_random_and_unchanged_tokens_too() -> None:
    examples = some_examples(MaskedLM(mask_rate=0.5))
    features = convert(examples, "encoder", INPUTS, 0)
    assert (features["encoder_loss_weights"].sum(axis=1) == 19).all()
    assert (features["encoder_input_tokens"] == VOCABULARY.mask_id).sum() < 19 * 5


def test_masked_lm_in_single_stream_predicts_the_next_token() -> None:
    """GPT-BERT: the input is the masked text shifted by one, the targets are the raw text, attention is
    bidirectional."""
    examples = some_examples(MaskedLM(mask_rate=0.5))
    length = examples.targets_NxT.shape[1]
    features = convert(examples, "prefix_lm", length, 3)
    reads, predicts = features["decoder_input_tokens"], features["decoder_target_tokens"]
    assert not reads[:, 0].any() and np.array_equal(reads[:, 1:length], examples.inputs_NxI[:, :-1])
    assert np.array_equal(predicts[:, :length], examples.targets_NxT)
    assert np.array_equal(features["decoder_loss_weights"][:, :length] > 0, examples.scored_NxT)
    assert (features["decoder_causal_attention"] == (np.arange(length + 3) < length)).all()
    assert not any(values[:, length:].any() for values in features.values())


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm", "causal_lm"])
def test_too_long_example_raises_value_error(layout: Layout) -> None:
    examples = some_examples(SPANS)
    longest = int(examples.target_lengths_N.max())
    with pytest.raises(ValueError, match="does not fit a row"):
        convert(examples, layout, int(examples.input_lengths_N.max()), longest - 1)
