"""The laws of the objectives that move, blank out, drop or shuffle tokens, and what holds for all objectives."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
from config_examples import changed, example
from data_examples import data_config, text_store
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import (
    Bart,
    BlankInfilling,
    CausalLM,
    CausalMasking,
    DataError,
    FillInTheMiddle,
    MaskedLM,
    Objective,
    PrefixLM,
    SpanCorruption,
    mixtures,
)
from t5x_like.config.lengths import (
    bart_counts,
    blank_count,
    expected_loss_tokens,
    longest,
    masked_count,
    max_blanks,
    max_moved_spans,
    min_raw_length,
    moved_spans_law,
    poisson,
    raw_window_length,
    row_lengths,
    sentinels_needed,
    windows_per_row,
)
from t5x_like.config.objectives import Layout
from t5x_like.config.validate import validate
from t5x_like.data import keys as rng
from t5x_like.data.denoise import Examples, denoise, needs_traits, restore
from t5x_like.data.denoising import draws
from t5x_like.data.denoising.bart import permute_sentences
from t5x_like.data.denoising.masking import runs_of_words
from t5x_like.data.store import Store
from t5x_like.data.stream import Stream
from t5x_like.data.vocabulary import EOS_ID, NUM_SPECIAL, TokenTraits, Vocabulary

VOCABULARY = Vocabulary(base_size=2000, num_sentinels=400)
TRAITS = TokenTraits(word_starts=np.arange(2000) % 4 == 0, sentence_ends=np.arange(2000) % 17 == 0)
MODE = st.sampled_from([None, "R", "S", "X"])


def keys(rows: int, seed: int = 0) -> rng.Keys:
    return rng.fold_in(seed, np.arange(rows))


def numbered(rows: int, length: int) -> np.ndarray:
    """Rows of distinct tokens, so that a token's place can be told from its id."""
    return np.tile(np.arange(NUM_SPECIAL, NUM_SPECIAL + length), (rows, 1))


def noisy(tokens: np.ndarray, objective: Objective, seed: int = 0) -> Examples:
    return denoise(tokens, keys(len(tokens), seed), objective, VOCABULARY, TRAITS)


def agree(counts: Sequence[int] | np.ndarray, law: Sequence[float] | np.ndarray) -> bool:
    """Chi-square at about 0.999: its quantile with k degrees of freedom is below k + 3.1 sqrt(2 k) + 6. Outcomes of
    which fewer than ten are expected count as one."""
    counts, law = np.asarray(counts, float), np.asarray(law, float)
    assert len(counts) == len(law) and math.isclose(law.sum(), 1, abs_tol=1e-9)
    expected = law * counts.sum()
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 1:
        assert counts[-1] <= 8
        counts, expected = counts[:-1], expected[:-1]
    freedom = len(counts) - 1
    return float(((counts - expected) ** 2 / expected).sum()) <= freedom + 3.1 * math.sqrt(2 * freedom) + 6


fim = st.builds(FillInTheMiddle, fim_rate=st.floats(0, 1), spm_rate=st.floats(0, 1))
causal_maskings = st.builds(CausalMasking, mean_spans=st.floats(0.1, 5), max_spans=st.integers(1, 20))
barts = st.builds(
    lambda rates, **fields: Bart(infill_rate=rates[0], delete_rate=rates[1], mask_rate=rates[2], **fields),
    st.sampled_from(
        [(0.3, 0.0, 0.0), (0.0, 0.2, 0.0), (0.0, 0.0, 0.4), (0.2, 0.3, 0.1), (0.9, 0.05, 0.05), (0.0,) * 3]
    ),
    mean_span_length=st.floats(1, 20),
    permute_sentences=st.booleans(),
    rotate_document=st.booleans(),
    mode=MODE,
)
blanks = st.builds(BlankInfilling, mask_rate=st.floats(0.01, 0.5), mean_span_length=st.floats(0.1, 20), mode=MODE)
whole_words = st.builds(
    MaskedLM,
    mask_rate=st.floats(0.01, 1.0),
    unit=st.sampled_from(["word", "span"]),
    span_end_probability=st.floats(0.05, 1.0),
    max_span_words=st.integers(1, 12),
)
spans = st.builds(
    SpanCorruption,
    name=st.just("spans"),
    mean_noise_span_length=st.floats(1, 70),
    noise_density=st.floats(0.01, 0.99),
    mode=MODE,
    t5_exact=st.booleans(),
)
prefixes = st.builds(
    lambda bounds, **fields: PrefixLM(
        name="prefix", min_target_fraction=min(bounds), max_target_fraction=max(bounds), **fields
    ),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    mode=MODE,
)
moving = st.one_of(fim, causal_maskings, barts, blanks)
everything = st.one_of(
    spans, prefixes, st.just(CausalLM()), st.builds(MaskedLM, mask_rate=st.floats(0.01, 1)), whole_words, moving
)


@settings(max_examples=300, deadline=None)
@given(objective=everything, length=st.integers(2, 400), seed=st.integers(0, 2**32 - 1))
def test_examples_are_what_the_arithmetic_says(objective: Objective, length: int, seed: int) -> None:
    """Round trip, cells, padding, ends, and ids that the vocabulary has."""
    rows = 4
    tokens = numbered(rows, length)
    examples = noisy(tokens, objective, seed)
    cells = longest(objective, length)
    scored = examples.scored_NxT
    for row in range(rows):
        inputs = examples.inputs_NxI[row, : examples.input_lengths_N[row]]
        targets = examples.targets_NxT[row, : examples.target_lengths_N[row]]
        assert inputs.all() and targets.all()
        assert not examples.inputs_NxI[row, len(inputs) :].any()
        assert not examples.targets_NxT[row, len(targets) :].any()
        assert len(inputs) <= cells.inputs and len(targets) <= cells.targets
        assert (len(inputs) if examples.aligned else len(inputs) + len(targets)) <= cells.total
        assert examples.aligned or (targets[-1] == EOS_ID and not len(inputs)) or inputs[-1] == EOS_ID
        assert max(targets.max(), inputs.max(initial=0)) < VOCABULARY.vocab_size
        assert scored is None or (scored[row].any() and not scored[row, len(targets) :].any())
        restored = restore(examples.inputs_NxI[row], examples.targets_NxT[row], objective, VOCABULARY)
        assert np.array_equal(restored, tokens[row])


@settings(max_examples=200, deadline=None)
@given(objective=everything, length=st.integers(2, 400))
def test_longer_windows_take_no_fewer_cells(objective: Objective, length: int) -> None:
    for lengths in (longest, row_lengths):
        shorter, longer = lengths(objective, length), lengths(objective, length + 1)
        assert all(a <= b for a, b in zip(shorter, longer, strict=True)) and shorter.total < longer.total


@settings(max_examples=100, deadline=None)
@given(
    objective=everything,
    layout=st.sampled_from(["encoder_decoder", "prefix_lm"]),
    inputs_length=st.integers(1, 300),
    targets_length=st.integers(1, 300),
)
def test_windows_are_the_longest_that_fit(
    objective: Objective, layout: Layout, inputs_length: int, targets_length: int
) -> None:
    def fits(length: int) -> bool:
        cells = row_lengths(objective, length)
        if layout == "encoder_decoder":
            return cells.inputs <= inputs_length and cells.targets <= targets_length
        return cells.total <= inputs_length + targets_length

    found = raw_window_length(objective, layout, inputs_length, targets_length)
    assert not fits(max(found + 1, 2)) and (found == 0 or (found >= 2 and fits(found)))
    needed = sentinels_needed(objective, layout, inputs_length, targets_length)
    if found and needed <= VOCABULARY.num_sentinels:
        enough = Vocabulary(base_size=2000, num_sentinels=needed)
        denoise(numbered(2, found), keys(2), objective, enough, TRAITS)


@settings(max_examples=60, deadline=None)
@given(objective=everything, length=st.integers(2, 120), seed=st.integers(0, 2**32 - 1))
def test_rows_do_not_depend_on_the_rows_beside_them(objective: Objective, length: int, seed: int) -> None:
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
def test_expected_loss_tokens_is_the_mean(objective: Objective, length: int) -> None:
    rows = 3000
    examples = noisy(numbered(rows, length), objective)
    scored = examples.target_lengths_N if examples.scored_NxT is None else examples.scored_NxT.sum(axis=1)
    error = 5 * scored.std() / math.sqrt(rows) + 1e-9
    assert abs(scored.mean() - expected_loss_tokens(objective, length)) <= error + 0.005


@pytest.mark.parametrize("objective", [CausalLM(), MaskedLM(), FillInTheMiddle(), CausalMasking()])
def test_objectives_of_a_single_token(objective: Objective) -> None:
    assert min_raw_length(objective) == 1
    examples = noisy(numbered(50, 1), objective)
    for inputs, targets in zip(examples.inputs_NxI, examples.targets_NxT, strict=True):
        assert restore(inputs, targets, objective, VOCABULARY).tolist() == [NUM_SPECIAL]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), objective=everything, layout=st.sampled_from(["encoder_decoder", "prefix_lm", "encoder"]))
def test_what_validation_lets_pass_makes_examples_that_fit(
    data: st.DataObject, objective: Objective, layout: Layout
) -> None:
    """Whatever numbers an objective has: a list of problems, or examples within their cells and sentinels."""
    numbers = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective) if f.name != "rate"}
    numbers = {name: value for name, value in numbers.items() if isinstance(value, int | float) and value is not True}
    if numbers:
        name = data.draw(st.sampled_from(sorted(numbers)))
        value = data.draw(st.integers(-2, 300) if isinstance(numbers[name], int) else st.floats(width=32))
        objective = dataclasses.replace(objective, **{name: bool(value) if numbers[name] is False else value})
    run = changed(example(layout), "data.mixture", (objective,))
    if validate(run):
        return
    length = raw_window_length(objective, layout, run.data.inputs_length, run.data.targets_length)
    vocabulary = Vocabulary(base_size=2000, num_sentinels=run.data.tokenizer.num_sentinels)
    rows = numbered(8, length * windows_per_row(objective))
    examples = denoise(rows, keys(8), objective, vocabulary, TRAITS)
    cells = longest(objective, length)
    assert examples.input_lengths_N.max() <= cells.inputs and examples.target_lengths_N.max() <= cells.targets
    assert 0 < expected_loss_tokens(objective, length) <= cells.targets


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
    data = dataclasses.replace(data_config(layout, mixture), examples=examples)
    (features,) = Stream([texts], data, batch_size=32).batch(0).values()
    stack = "encoder" if layout == "encoder" else "decoder"
    weights, targets = features[f"{stack}_loss_weights"], features[f"{stack}_target_tokens"]
    assert (weights.sum(axis=1) > 0).all() and targets[weights > 0].all()
    if layout != "prefix_lm" or name != "gpt_bert":
        return
    # Causal rows see one direction, masked rows both; each reads its text one place later.
    masked = np.where(features["denoiser_ids"] == 1, 1, 0)
    masked = masked if masked.ndim == 2 else np.repeat(masked[:, None], targets.shape[1], axis=1)
    flag = features["decoder_causal_attention"] > 0
    assert flag[(masked > 0) & (targets > 0)].all() and 0 < masked.mean() < 1
    changed = features["decoder_input_tokens"][:, 1:] != targets[:, :-1]
    assert changed[(masked[:, 1:] > 0) & (targets[:, 1:] > 0)].mean() == pytest.approx(0.15 * 0.9, abs=0.03)


# Fill-in-the-middle.


def parts_of(stream: np.ndarray) -> tuple[str, int, int, int]:
    """Form, and the tokens between the markers (and behind the last, without EOS)."""
    prefix_id, suffix_id, middle_id = VOCABULARY.infilling_ids
    if stream[0] != prefix_id:
        return "plain", 0, 0, len(stream) - 1
    places = [int(np.flatnonzero(stream == marker)[0]) for marker in (suffix_id, middle_id)]
    return "moved", places[0] - 1, places[1] - places[0] - 1, len(stream) - places[1] - 2


def test_fill_in_the_middle_spelled_out() -> None:
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
    law = {(a, b): (1 if a == b else 2) / 25 for a in range(1, 6) for b in range(a, 6)}
    assert agree([cuts.count(pair) for pair in law], list(law.values()))


def test_fill_in_the_middle_needs_three_sentinels() -> None:
    few = Vocabulary(base_size=2000, num_sentinels=2)
    with pytest.raises(IndexError):
        denoise(numbered(1, 9), keys(1), FillInTheMiddle(), few)
    denoise(numbered(1, 9), keys(1), FillInTheMiddle(fim_rate=0.0), few)


# Causal masking.


def moved_spans(stream: np.ndarray, text: list[int]) -> tuple[tuple[int, int], ...]:
    """(start, end) of each span at the end of a stream, found by its tokens; each must be a stretch of the text."""
    sentinels = np.flatnonzero(stream >= VOCABULARY.base_size)
    ids = VOCABULARY.first_sentinel_id - stream[sentinels]
    count = len(ids) // 2
    assert ids.tolist() == [*range(count)] * 2
    ends = [*sentinels[count + 1 :], len(stream) - 1]
    found = []
    for start, end in zip(sentinels[count:], ends, strict=True):
        span = stream[start + 1 : end].tolist()
        place = text.index(span[0])
        assert text[place : place + len(span)] == span
        found.append((place, place + len(span)))
    return tuple(found)


def test_causal_masking_draws_every_set_of_spans_equally_often() -> None:
    length, rows = 5, 30_000
    objective = CausalMasking(mean_spans=1.5, max_spans=9)
    assert max_moved_spans(objective, length) == 3
    text = numbered(1, length)[0].tolist()
    streams = noisy(numbered(rows, length), objective).targets_NxT
    found = [moved_spans(row[row > 0], text) for row in streams]
    law: dict[tuple[tuple[int, int], ...], float] = {}
    for count, share in enumerate(moved_spans_law(objective, length), start=1):
        sets = [tuple(zip(cuts[::2], cuts[1::2], strict=True)) for cuts in itertools.combinations(range(6), 2 * count)]
        law |= {spans: share / len(sets) for spans in sets}
    assert set(found) <= set(law)
    assert agree([found.count(spans) for spans in law], list(law.values()))
    weights = [1.5, 1.5**2 / 2, 1.5**3 / 6]
    assert np.allclose(moved_spans_law(objective, length), np.array(weights) / sum(weights))


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


def test_poisson_is_poisson() -> None:
    law = poisson(3.0)
    assert law[:4] == pytest.approx([math.exp(-3) * 3**k / math.factorial(k) for k in range(4)])
    cut = poisson(3.0, at_least=1)
    assert cut[0] == 0 and sum(cut) == pytest.approx(1)
    assert cut[1] / cut[2] == pytest.approx(law[1] / law[2])


@pytest.mark.parametrize("at_least", [0, 1])
def test_span_lengths_are_drawn_until_the_tokens_are_used_up(at_least: int) -> None:
    rows, total, most = 4000, 40, 40
    law = poisson(3.0, at_least)
    lengths, count = draws.lengths_until(keys(rows), draws.LENGTHS, law, total, most)
    assert (lengths.sum(axis=1) == total).all()
    used = np.arange(most) < count[:, None]
    assert not lengths[~used].any() and (lengths[np.arange(rows), count - 1] > 0).all()
    # The first five never reach the total: they are draws of the law itself.
    first = lengths[:, :5].ravel()
    assert agree(np.bincount(first, minlength=len(law)), law)
    assert abs(np.corrcoef(lengths[:, 0], lengths[:, 1])[0, 1]) < 4.5 / math.sqrt(rows)
    few, count = draws.lengths_until(keys(rows), draws.LENGTHS, law, total, 3)
    assert (few.sum(axis=1) == total).all() and (count <= 3).all()


@pytest.mark.parametrize("objective", [Bart(permute_sentences=False), BlankInfilling()])
def test_every_position_is_masked_with_the_same_probability(objective: Bart | BlankInfilling) -> None:
    length, rows = 60, 8000
    tokens = numbered(rows, length)
    inputs = noisy(tokens, objective).inputs_NxI
    hidden = np.ones((rows, VOCABULARY.vocab_size), np.bool_)
    np.put_along_axis(hidden, inputs.astype(np.int64), False, axis=1)
    hidden = hidden[:, NUM_SPECIAL : NUM_SPECIAL + length]
    noise = bart_counts(objective, length)[0] if isinstance(objective, Bart) else blank_count(objective, length)
    assert (hidden.sum(axis=1) == noise).all()
    deviation = math.sqrt(noise / length * (1 - noise / length) / rows)
    assert np.abs(hidden.mean(axis=0) - noise / length).max() < 4.5 * deviation


# BART.


def test_bart_targets_are_the_text_and_inputs_what_the_noise_leaves() -> None:
    length, rows = 100, 300
    objective = Bart(infill_rate=0.2, delete_rate=0.1, mask_rate=0.05)
    infilled, deleted, masked = bart_counts(objective, length)
    assert (infilled, deleted, masked) == (20, 10, 5)
    examples = noisy(numbered(rows, length), objective)
    assert np.array_equal(examples.targets_NxT[:, :-1], numbered(rows, length))
    for row, size in zip(examples.inputs_NxI, examples.input_lengths_N, strict=True):
        inputs = row[: size - 1]
        text = inputs[inputs < VOCABULARY.base_size]
        assert len(np.unique(text)) == len(text) == length - infilled - deleted - masked
        assert (inputs[inputs >= VOCABULARY.base_size] == VOCABULARY.mask_id).all()


def test_bart_infills_spans_of_poisson_length() -> None:
    """With infilling alone, each mask token stands for the numbers that are missing where it is."""
    length, rows = 400, 1500
    inputs = noisy(numbered(rows, length), Bart(permute_sentences=False)).inputs_NxI
    counts = np.zeros(60, np.int64)
    for row in inputs:
        stream = row[row > EOS_ID]
        # A row that begins or ends in a mask can have a span cut in two: its first and last are left out.
        text = np.flatnonzero(stream < VOCABULARY.base_size)
        for left, right in itertools.pairwise(text.tolist()):
            if right - left > 1:
                assert right - left == 2  # never two masks in a row: clean tokens are between the spans
                counts[stream[right] - stream[left] - 1] += 1
    law = np.zeros(60)
    law[: len(poisson(3.0))] = poisson(3.0)
    # One span per row is cut short by the number of tokens: a twentieth of the counts, a little shorter.
    assert np.abs(counts / counts.sum() - law / law.sum()).max() < 0.02
    assert counts[0] > 0


def test_bart_permutes_sentences_uniformly_and_loses_nothing() -> None:
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
    objective = Bart(infill_rate=0.0, permute_sentences=False, rotate_document=True)
    inputs = noisy(numbered(rows, length), objective).inputs_NxI[:, :length]
    offsets = inputs[:, 0] - NUM_SPECIAL
    assert np.array_equal(inputs - NUM_SPECIAL, (np.arange(length) + offsets[:, None]) % length)
    assert agree(np.bincount(offsets, minlength=length), np.full(length, 1 / length))


def test_bart_deletes_and_masks_uniformly() -> None:
    rows, length = 8000, 20
    for objective in (
        Bart(infill_rate=0.0, delete_rate=0.25, permute_sentences=False),
        Bart(infill_rate=0.0, mask_rate=0.25, permute_sentences=False),
    ):
        examples = noisy(numbered(rows, length), objective)
        assert (examples.input_lengths_N == (16 if objective.delete_rate else 21)).all()
        present = np.stack(
            [(examples.inputs_NxI == NUM_SPECIAL + place).any(axis=1) for place in range(length)], axis=1
        )
        assert np.abs(present.mean(axis=0) - 0.75).max() < 4.5 * math.sqrt(0.25 * 0.75 / rows)


# GLM.


@settings(max_examples=100, deadline=None)
@given(objective=blanks, length=st.integers(2, 300), seed=st.integers(0, 2**32 - 1))
def test_blanks_have_one_sentinel_each_and_are_not_visible(objective: BlankInfilling, length: int, seed: int) -> None:
    examples = noisy(numbered(3, length), objective, seed)
    assert examples.scored_NxT is not None
    for inputs, targets, scored in zip(examples.inputs_NxI, examples.targets_NxT, examples.scored_NxT, strict=True):
        in_text = inputs[(inputs >= VOCABULARY.base_size) & (inputs <= VOCABULARY.first_sentinel_id)]
        count = len(in_text)
        assert count <= max_blanks(objective, length)
        assert np.array_equal(in_text, VOCABULARY.first_sentinel_id - np.arange(count))
        heads = targets >= VOCABULARY.base_size
        assert np.array_equal(np.sort(targets[heads])[::-1], in_text)
        # Each span ends in EOS, behind which the next begins; sentinels are given, all else is predicted.
        assert np.array_equal(
            targets[: np.flatnonzero(targets)[-1]][np.flatnonzero(heads)[1:] - 1], [EOS_ID] * (count - 1)
        )
        assert np.array_equal(scored, (targets > 0) & ~heads)
        text = targets[(targets >= NUM_SPECIAL) & ~heads]
        assert len(text) == blank_count(objective, length) and not np.intersect1d(text, inputs).size


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
    count = masked_count(objective, length)
    examples = noisy(tokens, objective, seed)
    assert examples.scored_NxT is not None
    begins = TRAITS.word_starts[tokens]
    begins[:, 0] = True
    for row, chosen in enumerate(examples.scored_NxT):
        words = np.split(chosen, np.flatnonzero(begins[row])[1:])
        in_part = [word for word in words if word.any() and not word.all()]
        assert len(in_part) <= (1 if objective.unit == "word" else 2)
        if objective.unit == "span":
            assert chosen.sum() == count
        elif in_part:  # nothing fits, and the beginning of a word is taken
            assert chosen.sum() == count and sum(word.any() for word in words) == 1
            assert in_part[0][:count].all()
        else:  # no word is left out that would have fitted
            assert 1 <= chosen.sum() <= count
            assert not any(not word.any() and len(word) <= count - chosen.sum() for word in words)


def test_masked_words_are_unbiased_and_nearly_as_many_as_tokens() -> None:
    rows, length = 3000, 120
    for unit in ("word", "span"):
        objective = MaskedLM(unit=unit)
        chosen = noisy(np.random.default_rng(0).integers(NUM_SPECIAL, 2000, (rows, length)), objective).scored_NxT
        assert chosen is not None
        assert 0.9 * masked_count(objective, length) < chosen.sum(axis=1).mean() <= masked_count(objective, length)
        share = chosen.mean(axis=0)[20:-20] if unit == "word" else chosen.mean(axis=0)
        assert np.abs(share - share.mean()).max() < 4.5 * math.sqrt(share.mean() / rows)


def test_runs_of_words_have_geometric_lengths_and_one_fate() -> None:
    rows, length = 12_000, 400
    traits = TokenTraits(word_starts=np.ones(2000, np.bool_), sentence_ends=np.zeros(2000, np.bool_))
    objective = MaskedLM(unit="span", mask_rate=0.15, replace_with_mask=0.5, replace_with_random=0.0)
    examples = denoise(np.full((500, length), 7), keys(500), objective, VOCABULARY, traits)
    assert examples.scored_NxT is not None
    masked = examples.inputs_NxI == VOCABULARY.mask_id
    assert abs(masked.sum() / examples.scored_NxT.sum() - 0.5) < 0.05
    # Of two chosen tokens side by side most are of one run, and have one fate.
    both = examples.scored_NxT[:, 1:] & examples.scored_NxT[:, :-1]
    assert (masked[:, 1:] == masked[:, :-1])[both].mean() > 0.9
    runs = runs_of_words(np.tile(np.arange(50), (rows, 1)), keys(rows), objective)
    lengths = np.stack([(runs == number).sum(axis=1) for number in range(3)], axis=1)
    law = [0.0] + [0.8 ** (k - 1) / sum(0.8**j for j in range(10)) for k in range(1, 11)]
    assert sum(k * share for k, share in enumerate(law)) == pytest.approx(3.8, abs=0.01)
    assert agree(np.bincount(lengths.ravel(), minlength=11), law)


def test_traits_are_asked_for_where_they_are_needed() -> None:
    for objective in (MaskedLM(unit="word"), MaskedLM(unit="span"), Bart()):
        assert needs_traits(objective)
        with pytest.raises(ValueError, match="no traits"):
            denoise(numbered(1, 20), keys(1), objective, VOCABULARY)
    for objective in (MaskedLM(), Bart(permute_sentences=False), CausalLM()):
        assert not needs_traits(objective)
        denoise(numbered(1, 20), keys(1), objective, VOCABULARY)
    wordless = TokenTraits(np.zeros(2000, np.bool_), np.zeros(2000, np.bool_))
    with pytest.raises(DataError, match="begins a word"):
        denoise(numbered(1, 20), keys(1), MaskedLM(unit="word"), VOCABULARY, wordless)


def test_restore_refuses_what_does_not_belong_together() -> None:
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
