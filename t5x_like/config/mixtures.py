"""Presets: the mixtures of objectives of published models."""

from __future__ import annotations

from t5x_like.config.objectives import (
    BartDenoising,
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


def _prefix(rate: float, fractions: Fractions, complementary_pairs: bool, modes: bool = True) -> PrefixLM:
    low, high = fractions
    return PrefixLM(
        name="S",
        rate=rate,
        min_target_fraction=low,
        max_target_fraction=high,
        mode="S" if modes else None,
        complementary_pairs=complementary_pairs,
    )


def ul2(
    *,
    uniform: bool = True,
    t5_exact: bool = False,
    target_fractions: Fractions = (0.0, 0.5),
    complementary_pairs: bool = False,
) -> Mixture:
    """Return UL2's seven denoisers (Tay et al. 2022, table 1) with its mode tokens.

    Args:
      uniform: One seventh for each denoiser, as in the paper's listing; otherwise R, X and S get .4, .4 and .2 of the
        examples.
      t5_exact: Use T5's own span placement.
      target_fractions: Bounds of the uniform distribution of S's targets as a share of the window. The default has the
        mean of .25 of the paper's table; the paper's listing has (0, 1).
      complementary_pairs: Put two windows of S into a row.
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
    return (*spans, _prefix(rate["S"], target_fractions, complementary_pairs))


def ul2r(*, target_fractions: Fractions = (0.0, 0.5), complementary_pairs: bool = False) -> Mixture:
    """Return UL2R, the continued training of PaLM (Tay et al. 2022, "Transcending Scaling Laws with 0.1% Extra
    Compute"): one half S, a quarter each R and X."""
    return (
        _spans("R", 3.0, 0.15, 0.25, False),
        _spans("X", 32.0, 0.15, 0.125, False),
        _spans("X", 3.0, 0.5, 0.125, False),
        _prefix(0.5, target_fractions, complementary_pairs),
    )


def t5gemma2(*, modes: bool = False) -> Mixture:
    """Return T5Gemma 2's five tasks, 1:1:1:1:4; S has three quarters of the window as targets.

    Args:
      modes: Use UL2's mode tokens, which the report does not mention.
    """
    return (
        _spans("R", 3.0, 0.15, 1.0, False, modes),
        _spans("X", 12.0, 0.5, 1.0, False, modes),
        _spans("X", 32.0, 0.15, 1.0, False, modes),
        _spans("X", 32.0, 0.5, 1.0, False, modes),
        _prefix(4.0, (0.75, 0.75), False, modes),
    )


def t5() -> Mixture:
    """Return T5's span corruption: 15 % in spans of 3, with T5's placement and without a mode token."""
    return (SpanCorruption(name="span_corruption", t5_exact=True),)


def gpt_bert(*, causal: float = 1.0, masked: float = 15.0, mask_rate: float = 0.15) -> Mixture:
    """Return GPT-BERT (Charpentier and Samuel 2024): causal and masked LM in one decoder, 1:15. For layout prefix_lm.

    The paper's mask rate decreases from .3 to .15 during training; here it is constant.
    """
    return CausalLM(rate=causal), MaskedLM(rate=masked, mask_rate=mask_rate)


def bert(*, whole_words: bool = False) -> Mixture:
    """Return BERT's masked LM, without next-sentence prediction."""
    return (MaskedLM(masking_unit="word" if whole_words else "token"),)


def roberta() -> Mixture:
    """Return RoBERTa's masked LM: BERT's masking, different in each epoch, on full rows. `bert` is the same here."""
    return bert()


def span_bert() -> Mixture:
    """Return SpanBERT's masking of runs of words, geometric with p = .2 up to 10 words, without its span-boundary
    objective."""
    return (MaskedLM(masking_unit="span"),)


def bart() -> Mixture:
    """Return BART's final choice: infilling of 30 % of the tokens, all sentences permuted."""
    return (BartDenoising(),)


def glm() -> Mixture:
    """Return GLM's token-level objective, 15 % in blanks. For layout prefix_lm."""
    return (BlankInfilling(),)


def cm3(*, mean_spans: float = 1.0) -> Mixture:
    """Return CM3's and InCoder's causal masking. For layout causal_lm."""
    return (CausalMasking(mean_spans=mean_spans),)


def fim(*, fim_rate: float = 0.5, spm_rate: float = 0.5) -> Mixture:
    """Return fill-in-the-middle: by default on half of the windows, half of these in SPM. For layout causal_lm."""
    return (FillInTheMiddle(fim_rate=fim_rate, spm_rate=spm_rate),)
