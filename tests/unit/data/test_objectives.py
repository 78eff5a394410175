"""Properties of all objectives."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
import pytest
from helpers.config_examples import changed, example
from helpers.data_examples import data_config, restored, text_store
from helpers.objective_examples import (
    TRAITS,
    VOCABULARY,
    everything,
    keys,
    moving,
    noisy,
    numbered,
    prefixes,
    spans,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import (
    BartDenoising,
    BlankInfilling,
    CausalLM,
    CausalMasking,
    FillInTheMiddle,
    MaskedLM,
    Objective,
    PrefixLM,
    SpanCorruption,
    mixtures,
)
from t5x_like.config.objectives import Layout
from t5x_like.config.validation import validate
from t5x_like.data.objectives.registry import denoise, restore
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.tokenizers.vocabulary import EOS_ID, NUM_SPECIAL, TokenTraits, Vocabulary
from t5x_like.errors import DataError


@settings(max_examples=300, deadline=None)
@given(objective=everything, length=st.integers(2, 400), seed=st.integers(0, 2**32 - 1))
def test_examples_agree_with_the_length_arithmetic(objective: Objective, length: int, seed: int) -> None:
    """Round trip, lengths, padding, EOS, and ids within the vocabulary."""
    rows = 4
    tokens = numbered(rows, length)
    examples = noisy(tokens, objective, seed)
    lengths = objective.longest_example(length)
    scored = examples.scored_NxT
    for row in range(rows):
        inputs = examples.inputs_NxI[row, : examples.input_lengths_N[row]]
        targets = examples.targets_NxT[row, : examples.target_lengths_N[row]]
        assert inputs.all() and targets.all()
        assert not examples.inputs_NxI[row, len(inputs) :].any()
        assert not examples.targets_NxT[row, len(targets) :].any()
        assert len(inputs) <= lengths.inputs and len(targets) <= lengths.targets
        assert (len(inputs) if examples.aligned else len(inputs) + len(targets)) <= lengths.total
        assert examples.aligned or (targets[-1] == EOS_ID and not len(inputs)) or inputs[-1] == EOS_ID
        assert max(targets.max(), inputs.max(initial=0)) < VOCABULARY.vocab_size
        assert scored is None or (scored[row].any() and not scored[row, len(targets) :].any())
        assert np.array_equal(restored(examples, row, objective, VOCABULARY), tokens[row])


@settings(max_examples=200, deadline=None)
@given(objective=everything, length=st.integers(2, 400))
def test_lengths_do_not_decrease_with_the_window(objective: Objective, length: int) -> None:
    for lengths in (objective.longest_example, objective.row_lengths):
        shorter, longer = lengths(length), lengths(length + 1)
        assert all(a <= b for a, b in zip(shorter, longer, strict=True)) and shorter.total < longer.total


@settings(max_examples=100, deadline=None)
@given(
    objective=everything,
    layout=st.sampled_from(["encoder_decoder", "prefix_lm"]),
    inputs_length=st.integers(1, 300),
    targets_length=st.integers(1, 300),
)
def test_window_length_is_the_largest_that_fits(
    objective: Objective, layout: Layout, inputs_length: int, targets_length: int
) -> None:
    def fits(length: int) -> bool:
        lengths = objective.row_lengths(length)
        if layout == "encoder_decoder":
            return lengths.inputs <= inputs_length and lengths.targets <= targets_length
        return lengths.total <= inputs_length + targets_length

    found = objective.raw_window_length(layout, inputs_length, targets_length)
    assert not fits(max(found + 1, 2)) and (found == 0 or (found >= 2 and fits(found)))
    needed = objective.sentinels_needed(found)
    if found and needed <= VOCABULARY.num_sentinels:
        enough = Vocabulary(base_size=2000, num_sentinels=needed)
        denoise(numbered(2, found), keys(2), objective, enough, TRAITS)


@settings(max_examples=60, deadline=None)
@given(objective=everything, length=st.integers(2, 120), seed=st.integers(0, 2**32 - 1))
def test_rows_are_independent_of_the_batch(objective: Objective, length: int, seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(NUM_SPECIAL, 2000, (5, length))
    tokens[0, length // 2] = EOS_ID
    together = noisy(tokens, objective, seed)
    for row in range(5):
        alone = denoise(tokens[row : row + 1], keys(5, seed)[row : row + 1], objective, VOCABULARY, TRAITS)
        for one, all_ in (
            (alone.inputs_NxI, together.inputs_NxI),
            (alone.targets_NxT, together.targets_NxT),
            (alone.scored_NxT, together.scored_NxT),
        ):
            if one is not None and all_ is not None:
                width = min(one.shape[1], all_.shape[1])
                assert np.array_equal(one[0, :width], all_[row, :width])
                assert not one[0, width:].any() and not all_[row, width:].any()


@settings(max_examples=25, deadline=None)
@given(objective=st.one_of(moving, spans, prefixes), length=st.integers(2, 60))
def test_expected_loss_tokens_equals_the_sample_mean(objective: Objective, length: int) -> None:
    rows = 3000
    examples = noisy(numbered(rows, length), objective)
    scored = examples.target_lengths_N if examples.scored_NxT is None else examples.scored_NxT.sum(axis=1)
    error = 5 * scored.std() / math.sqrt(rows) + 1e-9
    assert abs(scored.mean() - objective.expected_loss_tokens(length)) <= error + 0.005


@pytest.mark.parametrize("objective", [CausalLM(), MaskedLM(), FillInTheMiddle(), CausalMasking()])
def test_objectives_with_windows_of_one_token(objective: Objective) -> None:
    assert objective.min_raw_length == 1
    examples = noisy(numbered(50, 1), objective)
    for row in range(50):
        assert restored(examples, row, objective, VOCABULARY).tolist() == [NUM_SPECIAL]


def test_too_short_windows_are_refused() -> None:
    for objective in (SpanCorruption(name="spans"), PrefixLM(name="prefix"), BartDenoising(), BlankInfilling()):
        with pytest.raises(ValueError, match=f"{objective.name}: found windows of 1 tokens, expected 2 or more"):
            noisy(numbered(3, 1), objective)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), objective=everything, layout=st.sampled_from(["encoder_decoder", "prefix_lm", "encoder"]))
def test_valid_objectives_make_examples_that_fit(data: st.DataObject, objective: Objective, layout: Layout) -> None:
    """Any field values give either problems, or examples within their lengths and sentinels."""
    numbers = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective) if f.name != "rate"}
    numbers = {name: value for name, value in numbers.items() if isinstance(value, int | float) and value is not True}
    if numbers:
        name = data.draw(st.sampled_from(sorted(numbers)))
        value = data.draw(st.integers(-2, 300) if isinstance(numbers[name], int) else st.floats(width=32))
        objective = dataclasses.replace(objective, **{name: bool(value) if numbers[name] is False else value})
    run = changed(example(layout), "data.mixture", (objective,))
    if validate(run):
        return
    length = objective.raw_window_length(layout, run.data.inputs_length, run.data.targets_length)
    vocabulary = Vocabulary(base_size=2000, num_sentinels=run.data.tokenizer.num_sentinels)
    rows = numbered(8, length * objective.windows_per_row)
    examples = denoise(rows, keys(8), objective, vocabulary, TRAITS)
    lengths = objective.longest_example(length)
    assert examples.input_lengths_N.max() <= lengths.inputs and examples.target_lengths_N.max() <= lengths.targets
    assert 0 < objective.expected_loss_tokens(length) <= lengths.targets


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Store:
    sentence = "It is a truth, universally acknowledged. So be it! Or not? Who knows.\n"
    return text_store(tmp_path_factory.mktemp("texts") / "store", [sentence * (1 + n % 7) for n in range(40)])


@pytest.mark.parametrize("examples", ["windows", "documents"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gpt_bert", "prefix_lm"),
        ("span_bert", "encoder"),
        ("bert", "encoder"),
        ("bart", "encoder_decoder"),
        ("bart", "prefix_lm"),
        ("glm", "prefix_lm"),
        ("glm", "encoder_decoder"),
        ("cm3", "causal_lm"),
        ("fim", "causal_lm"),
        ("fim", "prefix_lm"),
    ],
)
def test_streams_of_presets(texts: Store, name: str, layout: Layout, examples: Literal["windows", "documents"]) -> None:
    mixture = mixtures.bert(whole_words=True) if name == "bert" else getattr(mixtures, name)()
    data = dataclasses.replace(data_config(layout, mixture), example_mode=examples)
    (features,) = TrainingStream([texts], data, batch_size=32).batch(0).values()
    stack = "encoder" if layout == "encoder" else "decoder"
    weights, targets = features[f"{stack}_loss_weights"], features[f"{stack}_target_tokens"]
    assert (weights.sum(axis=1) > 0).all() and targets[weights > 0].all()
    if layout != "prefix_lm" or name != "gpt_bert":
        return
    # Causal rows see one direction, masked rows both; each reads its text one position later.
    masked = np.where(features["denoiser_ids"] == 1, 1, 0)
    masked = masked if masked.ndim == 2 else np.repeat(masked[:, None], targets.shape[1], axis=1)
    flag = features["decoder_causal_attention"] > 0
    assert flag[(masked > 0) & (targets > 0)].all() and 0 < masked.mean() < 1
    changed = features["decoder_input_tokens"][:, 1:] != targets[:, :-1]
    assert changed[(masked[:, 1:] > 0) & (targets[:, 1:] > 0)].mean() == pytest.approx(0.15 * 0.9, abs=0.03)


def test_objectives_state_whether_they_need_token_traits() -> None:
    for objective in (MaskedLM(masking_unit="word"), MaskedLM(masking_unit="span"), BartDenoising()):
        assert objective.needs_token_traits
        with pytest.raises(ValueError, match="no traits"):
            denoise(numbered(1, 20), keys(1), objective, VOCABULARY)
    for objective in (MaskedLM(), BartDenoising(permute_sentences=False), CausalLM()):
        assert not objective.needs_token_traits
        denoise(numbered(1, 20), keys(1), objective, VOCABULARY)
    wordless = TokenTraits(np.zeros(2000, np.bool_), np.zeros(2000, np.bool_))
    with pytest.raises(DataError, match="begins a word"):
        denoise(numbered(1, 20), keys(1), MaskedLM(masking_unit="word"), VOCABULARY, wordless)


def test_restore_refuses_inputs_and_targets_that_do_not_match() -> None:
    blank = noisy(numbered(1, 40), BlankInfilling())
    inputs = blank.inputs_NxI[0].copy()
    inputs[inputs == VOCABULARY.sentinel_id(0)] = VOCABULARY.sentinel_id(9)
    with pytest.raises(ValueError, match="sentinels"):
        restore(inputs, blank.targets_NxT[0], BlankInfilling(), VOCABULARY)
    moved = noisy(numbered(1, 40), CausalMasking())
    targets = moved.targets_NxT[0].copy()
    targets[np.flatnonzero(targets == VOCABULARY.sentinel_id(0))[0]] = VOCABULARY.sentinel_id(9)
    with pytest.raises(ValueError, match="twice"):
        restore(moved.inputs_NxI[0], targets, CausalMasking(), VOCABULARY)
