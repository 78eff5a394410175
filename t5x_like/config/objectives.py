"""Objectives: what a window of raw tokens is turned into, and the exact arithmetic of its lengths.

The arithmetic is here, in plain Python, because a recipe is checked when it is read: how many sentinels a denoiser can
need and how many raw tokens fill a row are functions of the configuration alone.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import pydantic

from t5x_like.config.base import configuration

Mode = Literal["R", "S", "X"]
Layout = Literal["encoder_decoder", "prefix_lm", "causal_lm", "encoder"]
MODES: tuple[Mode, ...] = ("R", "S", "X")


@configuration
class SpanCorruption:
    """Spans of the window are replaced by sentinels in the inputs and spelled out in the targets (T5, UL2's R and X).

    With noise density r, mean span length m and a window of n tokens, round(n r) tokens are masked in
    max(1, round(n r / m)) spans; the masked and the clean tokens are split into spans uniformly over all compositions.
    """

    kind: Literal["span_corruption"] = "span_corruption"
    name: str
    rate: float = 1.0
    """Share of the examples, relative to the other objectives of the mixture."""
    mean_noise_span_length: float = 3.0
    noise_density: float = 0.15
    mode: Mode | None = None
    """Mode token in front of the inputs; None for none."""
    t5_exact: bool = False
    """T5's own placement: the window starts clean and ends in noise. The default rotates the mask by a uniform offset,
    so that each position is masked with the same probability; a span cut by the window's end then counts as two."""


@configuration
class PrefixLM:
    """The window is cut once: the first part is the inputs, the rest the targets (UL2's S).

    The law of the cut: the target fraction is uniform in [min_target_fraction, max_target_fraction]; at least one
    token stays on each side.
    """

    kind: Literal["prefix_lm"] = "prefix_lm"
    name: str
    rate: float = 1.0
    min_target_fraction: float = 0.0
    max_target_fraction: float = 0.5
    """UL2's table has a mean of 0.25, the listing in its appendix is uniform in [0, 1], T5Gemma 2 uses 0.75."""
    mode: Mode | None = None


@configuration
class CausalLM:
    """Every token of the window is predicted from those before it. No inputs."""

    kind: Literal["causal_lm"] = "causal_lm"
    name: str = "causal_lm"
    rate: float = 1.0
    mode: None = None


@configuration
class MaskedLM:
    """BERT's masking: a chosen token becomes the mask token, a random token, or stays, and is predicted."""

    kind: Literal["masked_lm"] = "masked_lm"
    name: str = "masked_lm"
    rate: float = 1.0
    mask_rate: float = 0.15
    replace_with_mask: float = 0.8
    replace_with_random: float = 0.1
    mode: None = None


Objective = Annotated[SpanCorruption | PrefixLM | CausalLM | MaskedLM, pydantic.Field(discriminator="kind")]


def noise_counts(objective: SpanCorruption, raw_length: int) -> tuple[int, int]:
    """Masked tokens and spans in a window of `raw_length` tokens: T5's `random_spans_noise_mask` arithmetic.

    Rounds half to even in float64 as Python does (T5's graph does so in float32, which differs at a few lengths).
    """
    length = max(raw_length, 2)
    noise = min(max(round(length * objective.noise_density), 1), length - 1)
    spans = max(round(noise / objective.mean_noise_span_length), 1)
    return noise, min(spans, noise, length - noise)


def max_spans(objective: SpanCorruption, raw_length: int) -> int:
    """The most spans, hence sentinels, that a window of `raw_length` tokens can get.

    The rotated placement can cut one span in two at the window's ends.
    """
    noise, spans = noise_counts(objective, raw_length)
    cut = 0 if objective.t5_exact or noise == spans else 1
    return spans + cut


def corrupted_lengths(objective: SpanCorruption, raw_length: int) -> tuple[int, int]:
    """Longest inputs and targets of a window of `raw_length` tokens, both with EOS, inputs with the mode token."""
    noise, _ = noise_counts(objective, raw_length)
    spans = max_spans(objective, raw_length)
    mode = 0 if objective.mode is None else 1
    return mode + raw_length - noise + spans + 1, noise + spans + 1


def raw_window_length(objective: Objective, layout: Layout, inputs_length: int, targets_length: int) -> int:
    """Raw tokens per window such that the corrupted example fills its row and never overflows it.

    For span corruption this is T5's `random_spans_helper` with the mode token and EOS inside the budget. In the
    layouts with one stream, a row has inputs_length + targets_length cells and holds inputs and targets one after
    the other; the bounds on the two parts stay the same, so that one recipe serves both.

    Returns 0 where not even two raw tokens fit.
    """
    mode = 0 if objective.mode is None else 1
    if isinstance(objective, SpanCorruption):
        length = 2
        if any(
            n > limit for n, limit in zip(corrupted_lengths(objective, 2), (inputs_length, targets_length), strict=True)
        ):
            return 0
        while all(
            n <= limit
            for n, limit in zip(corrupted_lengths(objective, length + 1), (inputs_length, targets_length), strict=True)
        ):
            length += 1
        return length
    if isinstance(objective, PrefixLM):
        # inputs: mode + prefix + EOS; targets: the rest + EOS; both at their longest must fit.
        length = inputs_length + targets_length - mode - 2
        while length >= 2:
            targets_range = prefix_target_range(objective, length)
            prefix_fits = mode + length - targets_range[0] + 1 <= inputs_length
            targets_fit = targets_range[1] + 1 <= targets_length
            if prefix_fits and targets_fit:
                return length
            length -= 1
        return 0
    row = inputs_length if layout == "encoder" else inputs_length + targets_length
    return row - 1 if isinstance(objective, CausalLM) else row


def prefix_target_range(objective: PrefixLM, raw_length: int) -> tuple[int, int]:
    """Fewest and most target tokens (without EOS) of a window of `raw_length` tokens."""
    low = min(max(math.ceil(objective.min_target_fraction * raw_length), 1), raw_length - 1)
    high = min(max(math.floor(objective.max_target_fraction * raw_length), low), raw_length - 1)
    return low, high


def sentinels_needed(objective: Objective, layout: Layout, inputs_length: int, targets_length: int) -> int:
    """Sentinels that a row of this shape can need: one per span; one, as the mask token, for masked LM."""
    if isinstance(objective, MaskedLM):
        return 1
    if not isinstance(objective, SpanCorruption):
        return 0
    window = raw_window_length(objective, layout, inputs_length, targets_length)
    return max_spans(objective, window) if window else 0


def ul2(*, uniform: bool = True, t5_exact: bool = False) -> tuple[Objective, ...]:
    """UL2's seven denoisers (Tay et al. 2022, table 1) with its mode tokens.

    Args:
      uniform: One seventh each, as in the paper's listing; otherwise R, X and S get .4, .4 and .2 of the examples.
      t5_exact: T5's own span placement.
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
    spans = tuple(
        SpanCorruption(
            name=f"{mode}_{mean:g}_{density:g}",
            rate=rate[mode],
            mean_noise_span_length=mean,
            noise_density=density,
            mode=mode,
            t5_exact=t5_exact,
        )
        for mode, mean, density in table
    )
    return (*spans, PrefixLM(name="S", rate=rate["S"], mode="S"))
