"""Mixtures of objectives that are in use, as presets."""

from __future__ import annotations

from t5x_like.config.objectives import (
    Bart,
    BlankInfilling,
    CausalLM,
    CausalMasking,
    FillInTheMiddle,
    MaskedLM,
    Mode,
    Objective,
    PrefixLM,
    SpanCorruption,
)

Mixture = tuple[Objective, ...]
Fractions = tuple[float, float]


def _spans(mode: Mode, mean: float, density: float, rate: float, t5_exact: bool, modes: bool = True) -> SpanCorruption:
    return SpanCorruption(
        name=f"{mode}_{mean:g}_{density:g}",
        rate=rate,
        mean_noise_span_length=mean,
        noise_density=density,
        mode=mode if modes else None,
        t5_exact=t5_exact,
    )


def _prefix(rate: float, fractions: Fractions, paired: bool, modes: bool = True) -> PrefixLM:
    low, high = fractions
    return PrefixLM(
        name="S",
        rate=rate,
        min_target_fraction=low,
        max_target_fraction=high,
        mode="S" if modes else None,
        paired=paired,
    )


def ul2(
    *,
    uniform: bool = True,
    t5_exact: bool = False,
    target_fractions: Fractions = (0.0, 0.5),
    paired: bool = False,
) -> Mixture:
    """UL2's seven denoisers (Tay et al. 2022, table 1) with its mode tokens.

    Args:
      uniform: One seventh each, as in the paper's listing; otherwise R, X and S get .4, .4 and .2 of the examples.
      t5_exact: T5's own span placement.
      target_fractions: S: its targets' share of the window is uniform between these. The table's mean of .25 is the
        default; the paper's listing has (0, 1).
      paired: S: two windows to a row.
    """
    table: tuple[tuple[Mode, float, float], ...] = (
        ("R", 3.0, 0.15),
        ("R", 8.0, 0.15),
        ("X", 3.0, 0.5),
        ("X", 8.0, 0.5),
        ("X", 64.0, 0.15),
        ("X", 64.0, 0.5),
    )
    rate = {"R": 1.0, "X": 1.0, "S": 1.0} if uniform else {"R": 0.2, "X": 0.1, "S": 0.2}
    spans = tuple(_spans(mode, mean, density, rate[mode], t5_exact) for mode, mean, density in table)
    return (*spans, _prefix(rate["S"], target_fractions, paired))


def ul2r(*, target_fractions: Fractions = (0.0, 0.5), paired: bool = False) -> Mixture:
    """UL2R, which went on with PaLM (Tay et al. 2022, "Transcending Scaling Laws"): half S, a quarter each R and X."""
    return (
        _spans("R", 3.0, 0.15, 0.25, False),
        _spans("X", 32.0, 0.15, 0.125, False),
        _spans("X", 3.0, 0.5, 0.125, False),
        _prefix(0.5, target_fractions, paired),
    )


def t5gemma2(*, modes: bool = False) -> Mixture:
    """T5Gemma 2's five tasks, 1:1:1:1:4; S has three quarters of the window as targets.

    Args:
      modes: With UL2's mode tokens; the report speaks of none.
    """
    return (
        _spans("R", 3.0, 0.15, 1.0, False, modes),
        _spans("X", 12.0, 0.5, 1.0, False, modes),
        _spans("X", 32.0, 0.15, 1.0, False, modes),
        _spans("X", 32.0, 0.5, 1.0, False, modes),
        _prefix(4.0, (0.75, 0.75), False, modes),
    )


def t5() -> Mixture:
    """T5's span corruption: 15 % in spans of 3, placed as T5 places them, no mode token."""
    return (SpanCorruption(name="span_corruption", t5_exact=True),)


def gpt_bert(*, causal: float = 1.0, masked: float = 15.0, mask_rate: float = 0.15) -> Mixture:
    """GPT-BERT (Charpentier and Samuel 2024): causal and masked LM in one decoder, 1:15. For layout prefix_lm.

    The paper's mask rate falls from .3 to .15 in the course of training; here it is constant.
    """
    return CausalLM(rate=causal), MaskedLM(rate=masked, mask_rate=mask_rate)


def bert(*, whole_words: bool = False) -> Mixture:
    """BERT's masked LM, without next-sentence prediction."""
    return (MaskedLM(unit="word" if whole_words else "token"),)


def roberta() -> Mixture:
    """RoBERTa's: BERT's masking, another one in each epoch, on full rows. Here BERT's is no other."""
    return bert()


def span_bert() -> Mixture:
    """SpanBERT's masking of runs of words, geometric with .2 up to 10. Without its span-boundary objective."""
    return (MaskedLM(unit="span"),)


def bart() -> Mixture:
    """BART's final choice: infilling of 30 % of the tokens, all sentences permuted."""
    return (Bart(),)


def glm() -> Mixture:
    """GLM's token-level objective, 15 % in blanks. For layout prefix_lm."""
    return (BlankInfilling(),)


def cm3(*, mean_spans: float = 1.0) -> Mixture:
    """CM3's and InCoder's causal masking. For layout causal_lm."""
    return (CausalMasking(mean_spans=mean_spans),)


def fim(*, fim_rate: float = 0.5, spm_rate: float = 0.5) -> Mixture:
    """Fill-in-the-middle on half of the windows, half of these in SPM. For layout causal_lm."""
    return (FillInTheMiddle(fim_rate=fim_rate, spm_rate=spm_rate),)
