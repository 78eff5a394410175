"""Distributions of the objectives that move, blank, drop or shuffle tokens."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from helpers.objective_examples import (
    TRAITS,
    VOCABULARY,
    agree,
    blanks,
    causal_maskings,
    keys,
    noisy,
    numbered,
    whole_words,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import (
    BartDenoising,
    BlankInfilling,
    CausalMasking,
    FillInTheMiddle,
    MaskedLM,
)
from t5x_like.config.objectives.span_lengths import poisson
from t5x_like.data.objectives import random_ops
from t5x_like.data.objectives.bart import permute_sentences
from t5x_like.data.objectives.masked_lm import runs_of_words
from t5x_like.data.objectives.registry import denoise
from t5x_like.data.tokenizers.vocabulary import EOS_ID, NUM_SPECIAL, TokenTraits, Vocabulary

# Fill-in-the-middle.


def parts_of(stream: np.ndarray) -> tuple[str, int, int, int]:
    """Return the form, and the numbers of tokens between the markers and after the last one, without EOS."""
    prefix_id, suffix_id, middle_id = VOCABULARY.infilling_ids
    if stream[0] != prefix_id:
        return "plain", 0, 0, len(stream) - 1
    positions = [int(np.flatnonzero(stream == marker)[0]) for marker in (suffix_id, middle_id)]
    return "moved", positions[0] - 1, positions[1] - positions[0] - 1, len(stream) - positions[1] - 2


def test_fill_in_the_middle_streams_have_the_documented_form() -> None:
    prefix, suffix, middle = VOCABULARY.infilling_ids
    assert (prefix, suffix, middle) == tuple(VOCABULARY.sentinel_id(index) for index in (397, 398, 399))
    tokens = numbered(400, 6)
    for spm_rate, form in ((0.0, "PSM"), (1.0, "SPM")):
        seen = set()
        for stream in noisy(tokens, FillInTheMiddle(fim_rate=1.0, spm_rate=spm_rate)).targets_NxT.tolist():
            text = tokens[0].tolist()
            first, second = cuts = next(
                (a, b)
                for a, b in itertools.combinations_with_replacement(range(7), 2)
                if stream
                == (
                    [prefix, *text[:a], suffix, *text[b:], middle, *text[a:b], EOS_ID]
                    if form == "PSM"
                    else [prefix, suffix, *text[b:], middle, *text[:a], *text[a:b], EOS_ID]
                )
            )
            assert 0 <= first <= second <= 6
            seen.add(cuts)
        # SPM does not show where the first cut was; PSM does, unless the middle is empty.
        assert len(seen) == (28 if form == "PSM" else 7)
    assert [row[-1] for row in noisy(tokens, FillInTheMiddle(fim_rate=0.0)).targets_NxT] == [EOS_ID] * 400


def test_fill_in_the_middle_rates_and_cuts() -> None:
    length, rows = 5, 20_000
    objective = FillInTheMiddle(fim_rate=0.7, spm_rate=0.25)
    found = [parts_of(row[row > 0]) for row in noisy(numbered(rows, length), objective).targets_NxT]
    moved = sum(form == "moved" for form, *_ in found)
    assert agree([moved, rows - moved], [0.7, 0.3])
    # PSM whose prefix is empty looks like SPM: 11 of 36 pairs of cuts begin with 0.
    headless = sum(form == "moved" and prefix == 0 for form, prefix, _, _ in found)
    psm_headless = 0.75 * 11 / 36
    assert agree([headless, moved - headless], [0.25 + psm_headless, 0.75 - psm_headless])
    cuts = [(prefix, length - suffix) for form, prefix, suffix, _ in found if form == "moved" and prefix]
    probabilities = {(a, b): (1 if a == b else 2) / 25 for a in range(1, 6) for b in range(a, 6)}
    assert agree([cuts.count(pair) for pair in probabilities], list(probabilities.values()))


def test_fill_in_the_middle_needs_three_sentinels() -> None:
    few = Vocabulary(base_size=2000, num_sentinels=2)
    with pytest.raises(IndexError):
        denoise(numbered(1, 9), keys(1), FillInTheMiddle(), few)
    denoise(numbered(1, 9), keys(1), FillInTheMiddle(fim_rate=0.0), few)


# Causal masking.


def moved_spans(stream: np.ndarray, text: list[int]) -> tuple[tuple[int, int], ...]:
    """Return (start, end) of each span at the end of a stream; each span must be a contiguous part of the text."""
    sentinels = np.flatnonzero(stream >= VOCABULARY.base_size)
    ids = VOCABULARY.first_sentinel_id - stream[sentinels]
    count = len(ids) // 2
    assert ids.tolist() == [*range(count)] * 2
    ends = [*sentinels[count + 1 :], len(stream) - 1]
    found = []
    for start, end in zip(sentinels[count:], ends, strict=True):
        span = stream[start + 1 : end].tolist()
        start = text.index(span[0])
        assert text[start : start + len(span)] == span
        found.append((start, start + len(span)))
    return tuple(found)


def test_causal_masking_draws_every_set_of_spans_equally_often() -> None:
    length, rows = 5, 30_000
    objective = CausalMasking(mean_spans=1.5, max_spans=9)
    assert objective.max_moved_spans(length) == 3
    text = numbered(1, length)[0].tolist()
    streams = noisy(numbered(rows, length), objective).targets_NxT
    found = [moved_spans(row[row > 0], text) for row in streams]
    probabilities: dict[tuple[tuple[int, int], ...], float] = {}
    for count, share in enumerate(objective.moved_spans_distribution(length), start=1):
        sets = [tuple(zip(cuts[::2], cuts[1::2], strict=True)) for cuts in itertools.combinations(range(6), 2 * count)]
        probabilities |= {spans: share / len(sets) for spans in sets}
    assert set(found) <= set(probabilities)
    assert agree([found.count(spans) for spans in probabilities], list(probabilities.values()))
    weights = [1.5, 1.5**2 / 2, 1.5**3 / 6]
    assert np.allclose(objective.moved_spans_distribution(length), np.array(weights) / sum(weights))


@settings(max_examples=80, deadline=None)
@given(objective=causal_maskings, length=st.integers(2, 200), seed=st.integers(0, 2**32 - 1))
def test_causal_masking_scores_all_but_the_sentinels_in_the_text(
    objective: CausalMasking, length: int, seed: int
) -> None:
    examples = noisy(numbered(3, length), objective, seed)
    assert examples.scored_NxT is not None
    for row, scored in zip(examples.targets_NxT, examples.scored_NxT, strict=True):
        sentinels = np.flatnonzero(row >= VOCABULARY.base_size)
        in_text = sentinels[: len(sentinels) // 2]
        assert np.array_equal(np.flatnonzero((row > 0) & ~scored), in_text)
        text = row[(row >= NUM_SPECIAL) & (row < VOCABULARY.base_size)]
        assert np.array_equal(np.sort(text), numbered(1, length)[0])


# Span lengths drawn until a number of tokens is covered.


def test_poisson_probabilities() -> None:
    probabilities = poisson(3.0)
    assert probabilities[:4] == pytest.approx([math.exp(-3) * 3**k / math.factorial(k) for k in range(4)])
    cut = poisson(3.0, at_least=1)
    assert cut[0] == 0 and sum(cut) == pytest.approx(1)
    assert cut[1] / cut[2] == pytest.approx(probabilities[1] / probabilities[2])


@pytest.mark.parametrize("at_least", [0, 1])
def test_span_lengths_sum_to_the_total(at_least: int) -> None:
    rows, total, most = 4000, 40, 40
    probabilities = poisson(3.0, at_least)
    lengths, count = random_ops.span_lengths_with_total(keys(rows), random_ops.LENGTHS, probabilities, total, most)
    assert (lengths.sum(axis=1) == total).all()
    used = np.arange(most) < count[:, None]
    assert not lengths[~used].any() and (lengths[np.arange(rows), count - 1] > 0).all()
    # The first five never reach the total, so that they are unmodified draws.
    first = lengths[:, :5].ravel()
    assert agree(np.bincount(first, minlength=len(probabilities)), probabilities)
    assert abs(np.corrcoef(lengths[:, 0], lengths[:, 1])[0, 1]) < 4.5 / math.sqrt(rows)
    few, count = random_ops.span_lengths_with_total(keys(rows), random_ops.LENGTHS, probabilities, total, 3)
    assert (few.sum(axis=1) == total).all() and (count <= 3).all()


@pytest.mark.parametrize("objective", [BartDenoising(permute_sentences=False), BlankInfilling()])
def test_every_position_is_masked_with_the_same_probability(objective: BartDenoising | BlankInfilling) -> None:
    length, rows = 60, 8000
    tokens = numbered(rows, length)
    inputs = noisy(tokens, objective).inputs_NxI
    hidden = np.ones((rows, VOCABULARY.vocab_size), np.bool_)
    np.put_along_axis(hidden, inputs.astype(np.int64), False, axis=1)
    hidden = hidden[:, NUM_SPECIAL : NUM_SPECIAL + length]
    noise = objective.noise_counts(length)[0] if isinstance(objective, BartDenoising) else objective.blank_count(length)
    assert (hidden.sum(axis=1) == noise).all()
    deviation = math.sqrt(noise / length * (1 - noise / length) / rows)
    assert np.abs(hidden.mean(axis=0) - noise / length).max() < 4.5 * deviation


# BART.


def test_bart_targets_are_the_text_and_inputs_the_noisy_text() -> None:
    length, rows = 100, 300
    objective = BartDenoising(infill_rate=0.2, delete_rate=0.1, mask_rate=0.05)
    infilled, deleted, masked = objective.noise_counts(length)
    assert (infilled, deleted, masked) == (20, 10, 5)
    examples = noisy(numbered(rows, length), objective)
    assert np.array_equal(examples.targets_NxT[:, :-1], numbered(rows, length))
    for row, size in zip(examples.inputs_NxI, examples.input_lengths_N, strict=True):
        inputs = row[: size - 1]
        text = inputs[inputs < VOCABULARY.base_size]
        assert len(np.unique(text)) == len(text) == length - infilled - deleted - masked
        assert (inputs[inputs >= VOCABULARY.base_size] == VOCABULARY.mask_id).all()


def test_bart_infills_spans_of_poisson_length() -> None:
    """With infilling alone, each mask token replaces the numbers that are missing at its position."""
    length, rows = 400, 1500
    inputs = noisy(numbered(rows, length), BartDenoising(permute_sentences=False)).inputs_NxI
    counts = np.zeros(60, np.int64)
    for row in inputs:
        stream = row[row > EOS_ID]
        # A row that begins or ends in a mask can have a span cut in two: its first and last are left out.
        text = np.flatnonzero(stream < VOCABULARY.base_size)
        for left, right in itertools.pairwise(text.tolist()):
            if right - left > 1:
                assert right - left == 2  # never two masks in a row: clean tokens are between the spans
                counts[stream[right] - stream[left] - 1] += 1
    probabilities = np.zeros(60)
    probabilities[: len(poisson(3.0))] = poisson(3.0)
    # One span per row is cut short by the number of tokens: a twentieth of the counts, a little shorter.
    assert np.abs(counts / counts.sum() - probabilities / probabilities.sum()).max() < 0.02
    assert counts[0] > 0


def test_bart_permutes_sentences_uniformly_and_keeps_all_tokens() -> None:
    traits = TokenTraits(word_starts=np.zeros(2000, np.bool_), sentence_ends=np.isin(np.arange(2000), [5, 6, 9]))
    rows = 6000
    tokens = numbered(rows, 9)  # 3-5, 6, 7-9, 10-11
    permuted = permute_sentences(tokens.astype(np.int32), keys(rows), traits)
    found, counts = np.unique(permuted, axis=0, return_counts=True)
    sentences = ([3, 4, 5], [6], [7, 8, 9], [10, 11])
    expected = {tuple(itertools.chain(*order)) for order in itertools.permutations(sentences)}
    assert {tuple(row) for row in found.tolist()} == expected
    assert agree(counts, np.full(24, 1 / 24))


def test_bart_rotates_to_a_uniform_token() -> None:
    rows, length = 6000, 12
    objective = BartDenoising(infill_rate=0.0, permute_sentences=False, rotate_document=True)
    inputs = noisy(numbered(rows, length), objective).inputs_NxI[:, :length]
    offsets = inputs[:, 0] - NUM_SPECIAL
    assert np.array_equal(inputs - NUM_SPECIAL, (np.arange(length) + offsets[:, None]) % length)
    assert agree(np.bincount(offsets, minlength=length), np.full(length, 1 / length))


def test_bart_deletes_and_masks_uniformly() -> None:
    rows, length = 8000, 20
    for objective in (
        BartDenoising(infill_rate=0.0, delete_rate=0.25, permute_sentences=False),
        BartDenoising(infill_rate=0.0, mask_rate=0.25, permute_sentences=False),
    ):
        examples = noisy(numbered(rows, length), objective)
        assert (examples.input_lengths_N == (16 if objective.delete_rate else 21)).all()
        present = np.stack(
            [(examples.inputs_NxI == NUM_SPECIAL + index).any(axis=1) for index in range(length)], axis=1
        )
        assert np.abs(present.mean(axis=0) - 0.75).max() < 4.5 * math.sqrt(0.25 * 0.75 / rows)


# GLM.


@settings(max_examples=100, deadline=None)
@given(objective=blanks, length=st.integers(2, 300), seed=st.integers(0, 2**32 - 1))
def test_blanks_have_one_sentinel_each_and_are_not_in_the_inputs(
    objective: BlankInfilling, length: int, seed: int
) -> None:
    examples = noisy(numbered(3, length), objective, seed)
    assert examples.scored_NxT is not None
    for inputs, targets, scored in zip(examples.inputs_NxI, examples.targets_NxT, examples.scored_NxT, strict=True):
        in_text = inputs[(inputs >= VOCABULARY.base_size) & (inputs <= VOCABULARY.first_sentinel_id)]
        count = len(in_text)
        assert count <= objective.max_blanks(length)
        assert np.array_equal(in_text, VOCABULARY.first_sentinel_id - np.arange(count))
        heads = targets >= VOCABULARY.base_size
        assert np.array_equal(np.sort(targets[heads])[::-1], in_text)
        # Each span ends in EOS, after which the next begins; sentinels are given, all else is predicted.
        assert np.array_equal(
            targets[: np.flatnonzero(targets)[-1]][np.flatnonzero(heads)[1:] - 1], [EOS_ID] * (count - 1)
        )
        assert np.array_equal(scored, (targets > 0) & ~heads)
        text = targets[(targets >= NUM_SPECIAL) & ~heads]
        assert len(text) == objective.blank_count(length) and not np.intersect1d(text, inputs).size


def test_blanks_are_shuffled_uniformly() -> None:
    rows = 6000
    # Eight of forty tokens in spans of one: the order of eight sentinels; that of the first three is looked at.
    objective = BlankInfilling(mask_rate=0.2, mean_span_length=1e-6)
    targets = noisy(numbered(rows, 40), objective).targets_NxT
    heads = targets[targets >= VOCABULARY.base_size].reshape(rows, 8)
    ranks = np.argsort(np.argsort(VOCABULARY.first_sentinel_id - heads, axis=1), axis=1)
    assert agree(
        np.bincount(ranks[:, 0] * 8 + ranks[:, 1], minlength=64)[~np.eye(8, dtype=bool).ravel()], [1 / 56] * 56
    )


# Whole words and runs of them.


@settings(max_examples=150, deadline=None)
@given(objective=whole_words, length=st.integers(2, 300), seed=st.integers(0, 2**32 - 1))
def test_whole_words_are_chosen_whole(objective: MaskedLM, length: int, seed: int) -> None:
    tokens = numbered(4, length) + seed % 5
    count = objective.masked_count(length)
    examples = noisy(tokens, objective, seed)
    assert examples.scored_NxT is not None
    begins = TRAITS.word_starts[tokens]
    begins[:, 0] = True
    for row, chosen in enumerate(examples.scored_NxT):
        words = np.split(chosen, np.flatnonzero(begins[row])[1:])
        in_part = [word for word in words if word.any() and not word.all()]
        assert len(in_part) <= (1 if objective.masking_unit == "word" else 2)
        if objective.masking_unit == "span":
            assert chosen.sum() == count
        elif in_part:  # nothing fits, and the beginning of a word is taken
            assert chosen.sum() == count and sum(word.any() for word in words) == 1
            assert in_part[0][:count].all()
        else:  # no word is left out that would have fitted
            assert 1 <= chosen.sum() <= count
            assert not any(not word.any() and len(word) <= count - chosen.sum() for word in words)


def test_whole_word_masking_is_unbiased_and_close_to_the_mask_rate() -> None:
    rows, length = 3000, 120
    for unit in ("word", "span"):
        objective = MaskedLM(masking_unit=unit)
        chosen = noisy(np.random.default_rng(0).integers(NUM_SPECIAL, 2000, (rows, length)), objective).scored_NxT
        assert chosen is not None
        assert 0.9 * objective.masked_count(length) < chosen.sum(axis=1).mean() <= objective.masked_count(length)
        share = chosen.mean(axis=0)[20:-20] if unit == "word" else chosen.mean(axis=0)
        assert np.abs(share - share.mean()).max() < 4.5 * math.sqrt(share.mean() / rows)


def test_runs_of_words_have_geometric_lengths_and_are_treated_as_a_whole() -> None:
    rows, length = 12_000, 400
    traits = TokenTraits(word_starts=np.ones(2000, np.bool_), sentence_ends=np.zeros(2000, np.bool_))
    objective = MaskedLM(masking_unit="span", mask_rate=0.15, replace_with_mask=0.5, replace_with_random=0.0)
    examples = denoise(np.full((500, length), 7), keys(500), objective, VOCABULARY, traits)
    assert examples.scored_NxT is not None
    masked = examples.inputs_NxI == VOCABULARY.mask_id
    assert abs(masked.sum() / examples.scored_NxT.sum() - 0.5) < 0.05
    # Of two chosen tokens side by side most are of one run, and are treated alike.
    both = examples.scored_NxT[:, 1:] & examples.scored_NxT[:, :-1]
    assert (masked[:, 1:] == masked[:, :-1])[both].mean() > 0.9
    runs = runs_of_words(np.tile(np.arange(50), (rows, 1)), keys(rows), objective)
    lengths = np.stack([(runs == number).sum(axis=1) for number in range(3)], axis=1)
    probabilities = [0.0] + [0.8 ** (k - 1) / sum(0.8**j for j in range(10)) for k in range(1, 11)]
    assert sum(k * share for k, share in enumerate(probabilities)) == pytest.approx(3.8, abs=0.01)
    assert agree(np.bincount(lengths.ravel(), minlength=11), probabilities)
