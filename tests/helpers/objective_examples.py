"""Strategies of objectives, rows of distinct tokens, and a chi-square test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from t5x_like.config import (
    BartDenoising,
    BlankInfilling,
    CausalLM,
    CausalMasking,
    FillInTheMiddle,
    MaskedDiffusion,
    MaskedLM,
    Objective,
    PrefixLM,
    SpanCorruption,
)
from t5x_like.data.objectives.examples import Examples
from t5x_like.data.objectives.registry import denoise
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.vocabulary import NUM_SPECIAL, TokenTraits, Vocabulary

VOCABULARY = Vocabulary(base_size=2000, num_sentinels=400)
TRAITS = TokenTraits(word_starts=np.arange(2000) % 4 == 0, sentence_ends=np.arange(2000) % 17 == 0)
MODE = st.sampled_from([None, "R", "S", "X"])


def keys(rows: int, seed: int = 0) -> rng.Keys:
    return rng.fold_in(seed, np.arange(rows))


def numbered(rows: int, length: int) -> np.ndarray:
    """Return rows of distinct tokens, so that the position of a token follows from its id."""
    return np.tile(np.arange(NUM_SPECIAL, NUM_SPECIAL + length), (rows, 1))


def noisy(tokens: np.ndarray, objective: Objective, seed: int = 0) -> Examples:
    return denoise(tokens, keys(len(tokens), seed), objective, VOCABULARY, TRAITS)


def agree(counts: Sequence[int] | np.ndarray, probabilities: Sequence[float] | np.ndarray) -> bool:
    """Return the result of a chi-square test at about 0.999.

    The quantile with k degrees of freedom is below k + 3.1 sqrt(2 k) + 6. Outcomes with an expected count below ten
    are merged into one.
    """
    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities, float)
    assert len(counts) == len(probabilities) and math.isclose(probabilities.sum(), 1, abs_tol=1e-9)
    expected = probabilities * counts.sum()
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
    lambda rates, **fields: BartDenoising(infill_rate=rates[0], delete_rate=rates[1], mask_rate=rates[2], **fields),
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
    masking_unit=st.sampled_from(["word", "span"]),
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
diffusion = st.just(MaskedDiffusion())
moving = st.one_of(fim, causal_maskings, barts, blanks)
everything = st.one_of(
    spans,
    prefixes,
    st.just(CausalLM()),
    st.builds(MaskedLM, mask_rate=st.floats(0.01, 1)),
    diffusion,
    whole_words,
    moving,
)
