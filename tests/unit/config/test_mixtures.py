"""Preset mixtures: the shares and noise of their papers, and valid runs with each of them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.config_examples import changed, example

from t5x_like.config import MaskedLM, Objective, PrefixLM, SpanCorruption, mixtures
from t5x_like.config.objectives import Layout
from t5x_like.config.validation import validate
from t5x_like.data.objectives.examples import Examples
from t5x_like.data.objectives.registry import denoise
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.vocabulary import NUM_SPECIAL, TokenTraits, Vocabulary

SHARES: dict[str, tuple[tuple[Objective, ...], dict[str, float]]] = {
    "ul2": (mixtures.ul2(), {"R": 2 / 7, "X": 4 / 7, "S": 1 / 7}),
    "ul2_rxs": (mixtures.ul2(uniform=False), {"R": 0.4, "X": 0.4, "S": 0.2}),
    "ul2r": (mixtures.ul2r(), {"R": 0.25, "X": 0.25, "S": 0.5}),
    "t5gemma2": (mixtures.t5gemma2(modes=True), {"R": 1 / 8, "X": 3 / 8, "S": 1 / 2}),
}
LAYOUT_OF: dict[str, Layout] = {
    "ul2": "encoder_decoder",
    "ul2r": "prefix_lm",
    "t5gemma2": "encoder_decoder",
    "t5": "encoder_decoder",
    "gpt_bert": "prefix_lm",
    "bert": "encoder",
    "roberta": "encoder",
    "span_bert": "encoder",
    "bart": "encoder_decoder",
    "glm": "prefix_lm",
    "cm3": "causal_lm",
    "fim": "causal_lm",
}


@pytest.mark.parametrize("name", SHARES)
def test_shares_by_example(name: str) -> None:
    mixture, shares = SHARES[name]
    total = sum(objective.rate for objective in mixture)
    for mode, share in shares.items():
        assert sum(o.rate for o in mixture if o.mode == mode) / total == pytest.approx(share)


def test_denoisers_of_the_tables() -> None:
    def table(mixture: tuple[Objective, ...]) -> list[tuple[float, float]]:
        return [(o.mean_noise_span_length, o.noise_density) for o in mixture if isinstance(o, SpanCorruption)]

    def fractions(mixture: tuple[Objective, ...]) -> list[tuple[float, float]]:
        return [(o.min_target_fraction, o.max_target_fraction) for o in mixture if isinstance(o, PrefixLM)]

    assert table(mixtures.ul2()) == [(3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)]
    assert table(mixtures.ul2r()) == [(3, 0.15), (32, 0.15), (3, 0.5)]
    assert table(mixtures.t5gemma2()) == [(3, 0.15), (12, 0.5), (32, 0.15), (32, 0.5)]
    assert table(mixtures.t5()) == [(3, 0.15)]
    assert fractions(mixtures.t5gemma2()) == [(0.75, 0.75)]
    assert fractions(mixtures.ul2(target_fractions=(0.0, 1.0))) == [(0.0, 1.0)]
    assert not any(objective.mode for objective in (*mixtures.t5gemma2(), *mixtures.t5()))
    assert [objective.rate for objective in mixtures.gpt_bert()] == [1, 15]


def test_shares_by_loss_token_differ_from_shares_by_example() -> None:
    """With 512 inputs and 512 targets, T5's lengths and the listing's distribution of S: 10 % R, 78 % X, 12 % S."""
    mixture = mixtures.ul2(t5_exact=True, target_fractions=(0.0, 1.0))
    raw = {o.name: next(n for n in range(1100, 1, -1) if _inputs(o, n) <= 512) for o in mixture}
    raw["S"] = 511
    tokens = {o.name: o.expected_loss_tokens(raw[o.name]) for o in mixture}
    for mode, share in {"R": 0.10, "X": 0.78, "S": 0.12}.items():
        mine = sum(tokens[o.name] for o in mixture if o.mode == mode)
        assert mine / sum(tokens.values()) == pytest.approx(share, abs=0.005)


def _inputs(objective: Objective, length: int) -> int:
    return objective.longest_example(length).inputs - 1  # T5's helper has no mode token


VOCABULARY = Vocabulary(base_size=1000, num_sentinels=100)
TRAITS = TokenTraits(word_starts=np.full(1000, True), sentence_ends=np.arange(1000) % 10 == 0)
"""Every piece is a word; a sentence has 10 of the ascending tokens of `sampled`."""
LENGTH = 200


def sampled(mixture: tuple[Objective, ...], seed: int = 0, rows: int = 1000) -> tuple[np.ndarray, Examples]:
    """Return windows of ascending tokens, and their examples under the only objective of a mixture."""
    (objective,) = mixture
    tokens = np.tile(np.arange(10, 10 + LENGTH), (rows, 1))
    return tokens, denoise(tokens, rng.fold_in(seed, np.arange(rows)), objective, VOCABULARY, TRAITS)


def runs(mask: np.ndarray) -> int:
    """Return the number of runs of True in all rows."""
    return int(mask[:, 0].sum() + (mask[:, 1:] & ~mask[:, :-1]).sum())


def test_roberta_masks_15_percent_anew_in_each_epoch() -> None:
    """Liu et al. 2019: BERT's 15 %, of which 80 % are masked, 10 % replaced and 10 % kept, by another key each time."""
    assert mixtures.roberta() == mixtures.bert() == (MaskedLM(masking_unit="token"),)
    tokens, examples = sampled(mixtures.roberta())
    assert examples.scored_NxT is not None
    assert (examples.scored_NxT.sum(axis=1) == 30).all()
    chosen = examples.inputs_NxI[examples.scored_NxT]
    assert (chosen == VOCABULARY.mask_id).mean() == pytest.approx(0.8, abs=0.01)
    assert (chosen == tokens[examples.scored_NxT]).mean() == pytest.approx(0.1, abs=0.01)
    _, again = sampled(mixtures.roberta(), seed=1)
    assert (examples.scored_NxT & again.scored_NxT).mean() == pytest.approx(0.15**2, abs=0.002)


def test_span_bert_masks_runs_of_3_8_words() -> None:
    """Joshi et al. 2020: lengths geometric with p = 0.2, at most 10 words: 3.8 in the mean. Adjacent runs count as one
    here, and the last run of a row is cut, so that the bounds are wide; token masking has runs of 1.18."""
    _, examples = sampled(mixtures.span_bert())
    assert examples.scored_NxT is not None
    assert (examples.scored_NxT.sum(axis=1) == 30).all()
    mean = sum(k * 0.8 ** (k - 1) for k in range(1, 11)) / sum(0.8 ** (k - 1) for k in range(1, 11))
    assert mean == pytest.approx(3.8, abs=0.01)
    assert examples.scored_NxT.sum() / runs(examples.scored_NxT) == pytest.approx(mean, abs=0.6)
    # A run has one fate: masked, replaced or kept as a whole.
    masked = examples.inputs_NxI == VOCABULARY.mask_id
    assert masked.sum() / runs(masked) > 3


def test_bart_infills_30_percent_and_permutes_all_sentences() -> None:
    """Lewis et al. 2020: spans of Poisson(3) tokens, 30 % in all, each one mask token; the targets are the text."""
    tokens, examples = sampled(mixtures.bart())
    assert np.array_equal(examples.targets_NxT[:, :-1], tokens)
    text = examples.inputs_NxI < VOCABULARY.base_size
    kept = [row[(row >= NUM_SPECIAL) & is_text] for row, is_text in zip(examples.inputs_NxI, text, strict=True)]
    assert {len(row) for row in kept} == {LENGTH - 60}
    infills = (examples.inputs_NxI == VOCABULARY.mask_id).sum(axis=1)
    assert infills.mean() == pytest.approx(60 / 3, rel=0.1)
    # Of two neighbouring sentences, the first comes first in half of the rows; within a sentence the order is kept.
    first, second = (np.array([np.mean(np.flatnonzero((row > a) & (row <= a + 10))) for row in kept]) for a in (50, 60))
    assert (first < second).mean() == pytest.approx(0.5, abs=0.05)
    within = np.concatenate([np.diff(row[(row > 50) & (row <= 60)]) for row in kept])
    assert (within > 0).all()


def test_glm_blanks_15_percent_in_spans_of_3() -> None:
    """Du et al. 2022: spans of Poisson(3) tokens, here without empty ones (3.16 in the mean); sentinels are given."""
    _, examples = sampled(mixtures.glm())
    assert examples.scored_NxT is not None
    blanks = VOCABULARY.is_sentinel(examples.targets_NxT)
    words = (examples.targets_NxT >= NUM_SPECIAL) & ~blanks
    assert (words.sum(axis=1) == 30).all()
    assert words.sum() / blanks.sum() == pytest.approx(3.16, rel=0.1)
    assert not examples.scored_NxT[blanks].any() and examples.scored_NxT[words].all()


def test_cm3_moves_one_span_on_average_before_the_condition() -> None:
    """Aghajanyan et al. 2022: Poisson with mean 1, of which at least one span is taken: 1 / (1 - 1 / e) = 1.58."""
    _, examples = sampled(mixtures.cm3())
    spans = VOCABULARY.is_sentinel(examples.targets_NxT).sum(axis=1) / 2
    assert spans.min() == 1 and spans.max() <= 8
    assert spans.mean() == pytest.approx(1 / (1 - np.exp(-1)), abs=0.08)
    assert not examples.inputs_NxI.size


@pytest.mark.parametrize("name", LAYOUT_OF)
def test_presets_are_valid(name: str) -> None:
    run = example(LAYOUT_OF[name])
    mixture = getattr(mixtures, name)()
    assert not validate(changed(run, "data.mixture", mixture))
    assert all(objective.rate > 0 for objective in mixture)
    assert len({objective.name for objective in mixture}) == len(mixture)


def test_every_preset_is_listed() -> None:
    public = {
        name for name, value in vars(mixtures).items() if callable(value) and value.__module__ == mixtures.__name__
    }
    assert {name for name in public if not name.startswith("_")} == LAYOUT_OF.keys()
