"""Objectives: what a window of raw tokens is turned into. `config.lengths` has the arithmetic of their lengths."""

from __future__ import annotations

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
    paired: bool = False
    """Two windows share a row and are cut at complementary places: where one has t target tokens, the other has
    fewest + most - t of the law's range. So a row's inputs and targets take the same cells whatever the cut, and each
    window's cut keeps its law (the packing of Wang et al. 2022)."""


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


@configuration
class Supervised:
    """A supervised pair as it is: the inputs are given, the targets are predicted."""

    kind: Literal["supervised"] = "supervised"
    name: str = "supervised"
    rate: float = 1.0
    mode: Mode | None = None


Objective = Annotated[
    SpanCorruption | PrefixLM | CausalLM | MaskedLM | Supervised, pydantic.Field(discriminator="kind")
]
