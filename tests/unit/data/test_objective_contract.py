"""Properties of the denoisers, over random configurations and lengths from two tokens up."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from helpers.data_examples import restored
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import CausalLM, MaskedLM, Objective, PrefixLM, SpanCorruption
from t5x_like.data.objectives.registry import denoise, restore
from t5x_like.data.objectives.span_corruption import random_cuts, span_mask
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.vocabulary import EOS_ID, NUM_SPECIAL, Vocabulary

VOCABULARY = Vocabulary(base_size=2000, num_sentinels=400)
MODE = st.sampled_from([None, "R", "S", "X"])


def keys(rows: int, seed: int = 0) -> rng.Keys:
    return rng.fold_in(seed, np.arange(rows))


def numbered(rows: int, length: int) -> np.ndarray:
    """Return rows of distinct tokens, so that the position of a token follows from its id."""
    return np.tile(np.arange(NUM_SPECIAL, NUM_SPECIAL + length), (rows, 1))


span_corruptions = st.builds(
    SpanCorruption,
    name=st.just("spans"),
    mean_noise_span_length=st.floats(1, 70),
    noise_density=st.floats(0.01, 0.99),
    mode=MODE,
    t5_exact=st.booleans(),
)
prefix_lms = st.builds(
    lambda bounds, mode: PrefixLM(
        name="prefix", min_target_fraction=min(bounds), max_target_fraction=max(bounds), mode=mode
    ),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    MODE,
)
masked_lms = st.builds(MaskedLM, mask_rate=st.floats(0.01, 1.0))
objectives = st.one_of(span_corruptions, prefix_lms, st.just(CausalLM()), masked_lms)


@settings(max_examples=200, deadline=None)
@given(objective=objectives, length=st.integers(2, 700), seed=st.integers(0, 2**32 - 1))
def test_round_trip(objective: Objective, length: int, seed: int) -> None:
    tokens = numbered(3, length)
    examples = denoise(tokens, keys(3, seed), objective, VOCABULARY)
    for row in range(3):
        assert np.array_equal(restored(examples, row, objective, VOCABULARY), tokens[0])


@settings(max_examples=150, deadline=None)
@given(objective=span_corruptions, length=st.integers(2, 700), seed=st.integers(0, 2**32 - 1))
def test_span_corruption_counts_and_sentinels(objective: SpanCorruption, length: int, seed: int) -> None:
    examples = denoise(numbered(4, length), keys(4, seed), objective, VOCABULARY)
    noise, spans = objective.noise_counts(length)
    most_inputs, most_targets, _ = objective.longest_example(length)
    mode = 0 if objective.mode is None else 1
    for row in range(4):
        inputs = examples.inputs_NxI[row, : examples.input_lengths_N[row]]
        targets = examples.targets_NxT[row, : examples.target_lengths_N[row]]
        assert not examples.inputs_NxI[row, len(inputs) :].any()
        assert not examples.targets_NxT[row, len(targets) :].any()
        assert len(inputs) <= most_inputs and len(targets) <= most_targets
        assert inputs[-1] == targets[-1] == EOS_ID
        if objective.mode is not None:
            assert inputs[0] == VOCABULARY.mode_id(objective.mode)

        is_text = (targets >= NUM_SPECIAL) & (targets < VOCABULARY.base_size)
        assert is_text.sum() == noise
        sentinels = targets[targets >= VOCABULARY.base_size]
        assert len(sentinels) in ({spans} if objective.t5_exact else {spans, objective.max_spans(length)})
        # The k-th span has the k-th sentinel on both sides: none twice, none beyond, all in order.
        assert np.array_equal(sentinels, VOCABULARY.first_sentinel_id - np.arange(len(sentinels)))
        assert np.array_equal(inputs[mode:][inputs[mode:] >= VOCABULARY.base_size], sentinels)
        # Nothing of the targets' text is visible in the inputs.
        assert not np.intersect1d(inputs, targets[is_text]).size
        assert len(inputs) == mode + length - noise + len(sentinels) + 1


def test_rows_are_independent_of_the_batch() -> None:
    tokens = np.random.default_rng(0).integers(NUM_SPECIAL, 2000, (6, 90))
    for objective in (SpanCorruption(name="s", noise_density=0.5), PrefixLM(name="p"), MaskedLM(), CausalLM()):
        together = denoise(tokens, keys(6), objective, VOCABULARY)
        for row in range(6):
            alone = denoise(tokens[row : row + 1], keys(6)[row : row + 1], objective, VOCABULARY)
            width = alone.inputs_NxI.shape[1]
            assert np.array_equal(together.inputs_NxI[row, :width], alone.inputs_NxI[0])
            assert np.array_equal(
                np.trim_zeros(together.targets_NxT[row], "b"), np.trim_zeros(alone.targets_NxT[0], "b")
            )


def chi_square(counts: np.ndarray, expected: float) -> float:
    return float(np.sum((counts - expected) ** 2) / expected)


@pytest.mark.parametrize(("total", "parts"), [(7, 3), (6, 1), (6, 6), (5, 2)])
def test_compositions_are_uniform(total: int, parts: int) -> None:
    rows = 12_000
    lengths = np.diff(random_cuts(keys(rows), 1, total, parts), axis=1)
    assert (lengths.sum(axis=1) == total).all() and (lengths >= 1).all()
    found, counts = np.unique(lengths, axis=0, return_counts=True)
    number = math.comb(total - 1, parts - 1)
    assert len(found) == number
    # The 0.999 quantile of chi-square with k degrees of freedom is below k + 3.1 sqrt(2 k) + 6.
    freedom = number - 1
    assert chi_square(counts, rows / number) <= freedom + 3.1 * math.sqrt(2 * freedom) + 6


def test_t5_exact_draws_every_mask_of_t5_equally_often() -> None:
    """T5's `random_spans_noise_mask`: clean and noise runs alternate, clean first; both lists of lengths uniform."""
    objective = SpanCorruption(name="t5", mean_noise_span_length=2.0, noise_density=0.4, t5_exact=True)
    length, rows = 10, 15_000
    noise, spans = objective.noise_counts(length)
    assert (noise, spans) == (4, 2)

    def compositions(total: int) -> list[tuple[int, int]]:
        return [(first, total - first) for first in range(1, total)]

    masks = set()
    for clean, masked in itertools.product(compositions(length - noise), compositions(noise)):
        runs = zip(clean, masked, strict=True)
        masks.add(tuple(bit for c, m in runs for bit in [False] * c + [True] * m))
    found, counts = np.unique(span_mask(keys(rows), objective, length), axis=0, return_counts=True)
    assert {tuple(row) for row in found.tolist()} == masks
    assert chi_square(counts, rows / len(masks)) < len(masks) - 1 + 3.1 * math.sqrt(2 * len(masks)) + 6


@pytest.mark.parametrize(("mean", "density"), [(3.0, 0.15), (8.0, 0.5), (64.0, 0.15), (64.0, 0.5)])
def test_every_position_is_masked_with_the_same_probability(mean: float, density: float) -> None:
    objective = SpanCorruption(name="s", mean_noise_span_length=mean, noise_density=density)
    length, rows = 200, 8000
    noise, _ = objective.noise_counts(length)
    share = span_mask(keys(rows), objective, length).mean(axis=0)
    deviation = math.sqrt(noise / length * (1 - noise / length) / rows)
    assert np.abs(share - noise / length).max() < 4.5 * deviation
    exact = SpanCorruption(name="t5", mean_noise_span_length=mean, noise_density=density, t5_exact=True)
    t5_mask = span_mask(keys(100), exact, length)
    assert not t5_mask[:, 0].any() and t5_mask[:, -1].all()


def test_t5_published_lengths() -> None:
    """Raw tokens, targets and spans for 512 inputs equal those of T5's `random_spans_helper`."""
    published = {
        (3.0, 0.15): (568, 512, 114, 28),
        (8.0, 0.15): (588, 512, 100, 11),
        (3.0, 0.5): (766, 512, 512, 128),
        (8.0, 0.5): (908, 512, 512, 57),
        (64.0, 0.15): (600, 512, 92, 1),
        (64.0, 0.5): (1006, 512, 512, 8),
    }
    for (mean, density), (raw, inputs, targets, spans) in published.items():
        objective = SpanCorruption(name="t5", mean_noise_span_length=mean, noise_density=density, t5_exact=True)
        examples = denoise(numbered(2, raw), keys(2), objective, VOCABULARY)
        assert (examples.input_lengths_N == inputs).all() and (examples.target_lengths_N == targets).all()
        assert (examples.targets_NxT >= VOCABULARY.base_size).sum() == 2 * spans


def random_spans_helper(inputs_length: int, density: float, mean: float) -> tuple[int, int, int]:
    """Return raw tokens, target tokens and spans by T5's published arithmetic, including sentinels and EOS."""

    def lengths(raw: int) -> tuple[int, int, int]:
        noise = int(round(raw * density))
        spans = int(round(noise / mean))
        return raw - noise + spans + 1, noise + spans + 1, spans

    raw = inputs_length
    while lengths(raw + 1)[0] <= inputs_length:
        raw += 1
    inputs, targets, spans = lengths(raw)
    if density == 0.5 and targets > inputs:
        raw, targets = raw - 1, targets - 1
    return raw, targets, spans


@settings(max_examples=300, deadline=None)
@given(
    inputs_length=st.integers(16, 2100),
    density=st.one_of(st.sampled_from([0.15, 0.5]), st.floats(0.02, 0.9)),
    mean=st.one_of(st.sampled_from([3.0, 8.0, 64.0]), st.floats(1.0, 80.0)),
)
def test_window_lengths_equal_those_of_t5s_helper(inputs_length: int, density: float, mean: float) -> None:
    """Holds where T5 counts at least one span. Where its division rounds to 0, its sampler still masks one span, and
    the example is longer than the helper computes."""
    raw, targets, spans = random_spans_helper(inputs_length, density, mean)
    noise = round(raw * density)
    # More spans than clean or masked tokens cannot be; T5's sampler fails there.
    if not 1 <= spans <= min(noise, raw - noise) - 1:
        return
    objective = SpanCorruption(name="t5", mean_noise_span_length=mean, noise_density=density, t5_exact=True)
    assert objective.raw_window_length("encoder_decoder", inputs_length, targets) == raw
    assert objective.longest_example(raw).inputs in (inputs_length, inputs_length - 1)


@pytest.mark.parametrize("objective", [PrefixLM(name="s"), PrefixLM(name="uniform", max_target_fraction=1.0)])
def test_prefix_cut_is_uniform_over_its_range(objective: PrefixLM) -> None:
    length, rows = 40, 12_000
    fewest, most = objective.target_range(length)
    examples = denoise(numbered(rows, length), keys(rows), objective, VOCABULARY)
    wanted = examples.target_lengths_N - 1
    counts = np.bincount(wanted - fewest, minlength=most - fewest + 1)
    assert len(counts) == most - fewest + 1
    assert chi_square(counts, rows / len(counts)) < len(counts) - 1 + 3.1 * math.sqrt(2 * len(counts)) + 6
    assert (examples.input_lengths_N - 1 + wanted == length).all()


@settings(max_examples=100, deadline=None)
@given(objective=prefix_lms, length=st.integers(2, 400), seed=st.integers(0, 2**32 - 1))
def test_a_pair_always_has_the_same_lengths(objective: PrefixLM, length: int, seed: int) -> None:
    objective = dataclasses.replace(objective, complementary_pairs=True)
    rows = 5
    examples = denoise(numbered(rows, 2 * length), keys(rows, seed), objective, VOCABULARY)
    lengths, one = objective.row_lengths(length), objective.longest_example(length)
    assert (examples.input_lengths_N.reshape(rows, 2).sum(axis=1) == lengths.inputs).all()
    assert (examples.target_lengths_N.reshape(rows, 2).sum(axis=1) == lengths.targets).all()
    assert examples.input_lengths_N.max() <= one.inputs and examples.target_lengths_N.max() <= one.targets
    for row in range(2 * rows):
        start = NUM_SPECIAL + row % 2 * length
        assert np.array_equal(restored(examples, row, objective, VOCABULARY), np.arange(start, start + length))
    with pytest.raises(ValueError, match="2 windows of equal length"):
        denoise(numbered(1, 2 * length + 1), keys(1), objective, VOCABULARY)


def test_both_windows_of_a_pair_have_the_distribution_of_the_cut() -> None:
    objective = PrefixLM(name="s", min_target_fraction=0.1, max_target_fraction=0.6, complementary_pairs=True)
    length, rows = 40, 12_000
    fewest, most = objective.target_range(length)
    wanted = denoise(numbered(rows, 2 * length), keys(rows), objective, VOCABULARY).target_lengths_N - 1
    for window in range(2):
        counts = np.bincount(wanted[window::2] - fewest, minlength=most - fewest + 1)
        assert len(counts) == most - fewest + 1
        assert chi_square(counts, rows / len(counts)) < len(counts) - 1 + 3.1 * math.sqrt(2 * len(counts)) + 6


def test_pairs_fill_rows_of_matching_lengths() -> None:
    uniform = PrefixLM(name="s", max_target_fraction=1.0, mode="S", complementary_pairs=True)
    assert (uniform.windows_per_row, PrefixLM(name="s").windows_per_row) == (2, 1)
    length = uniform.raw_window_length("encoder_decoder", 512, 512)
    assert (length, uniform.row_lengths(length)) == (508, (512, 510, 1022))
    quarter = PrefixLM(name="s", mode="S", complementary_pairs=True)
    length = quarter.raw_window_length("encoder_decoder", 512, 171)
    assert (length, quarter.row_lengths(length)) == (337, (509, 171, 680))


def test_masked_lm_proportions() -> None:
    objective, length, rows = MaskedLM(), 200, 2000
    tokens = np.full((rows, length), 7)
    examples = denoise(tokens, keys(rows), objective, VOCABULARY)
    chosen = examples.scored_NxT
    assert chosen is not None and (chosen.sum(axis=1) == 30).all()
    inputs = examples.inputs_NxI
    assert (inputs[~chosen] == 7).all() and (examples.targets_NxT == 7).all()
    total = chosen.sum()
    masked = (inputs == VOCABULARY.mask_id).sum() / total
    changed = ((inputs != 7) & (inputs != VOCABULARY.mask_id)).sum() / total
    assert abs(masked - 0.8) < 4 * math.sqrt(0.8 * 0.2 / total)
    assert abs(changed - 0.1) < 4 * math.sqrt(0.1 * 0.9 / total) + 1 / 1997
    replacements = inputs[chosen & (inputs != VOCABULARY.mask_id)]
    assert replacements.min() >= NUM_SPECIAL and replacements.max() < VOCABULARY.base_size
    assert len(np.unique(replacements)) > 1000
    positions = chosen.mean(axis=0)
    assert np.abs(positions - 0.15).max() < 4.5 * math.sqrt(0.15 * 0.85 / rows)
    assert objective.masked_count(2) == 1


@settings(max_examples=25, deadline=None)
@given(objective=st.one_of(span_corruptions, prefix_lms, masked_lms, st.just(CausalLM())), length=st.integers(2, 60))
def test_expected_loss_tokens_equals_the_sample_mean(objective: Objective, length: int) -> None:
    rows = 4000
    examples = denoise(numbered(rows, length), keys(rows), objective, VOCABULARY)
    scored = examples.target_lengths_N if examples.scored_NxT is None else examples.scored_NxT.sum(axis=1)
    error = 5 * scored.std() / math.sqrt(rows) + 1e-9
    assert abs(scored.mean() - objective.expected_loss_tokens(length)) <= error + 0.002


def test_too_few_sentinels_are_an_error() -> None:
    objective = SpanCorruption(name="s", noise_density=0.5)
    needed = objective.max_spans(300)
    denoise(numbered(1, 300), keys(1), objective, Vocabulary(base_size=2000, num_sentinels=needed))
    with pytest.raises(IndexError, match=f"sentinel {needed - 1} of {needed - 1}"):
        denoise(numbered(1, 300), keys(1), objective, Vocabulary(base_size=2000, num_sentinels=needed - 1))


def test_restore_refuses_inputs_and_targets_that_do_not_match() -> None:
    objective = SpanCorruption(name="s", noise_density=0.5)
    examples = denoise(numbered(1, 40), keys(1), objective, VOCABULARY)
    inputs, targets = examples.inputs_NxI[0], examples.targets_NxT[0].copy()
    second = int(np.flatnonzero(targets == VOCABULARY.sentinel_id(1))[0])
    targets[second] = VOCABULARY.sentinel_id(0)
    with pytest.raises(ValueError, match="found sentinel 0, expected 1"):
        restore(inputs, targets, objective, VOCABULARY)
