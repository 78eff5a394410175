"""Blank infilling: spans are blanked out and written in random order (GLM)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import pydantic

from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives.base import ExampleLengths, Mode, ObjectiveConfig
from t5x_like.config.objectives.span_lengths import expected_cuts, expected_draws, max_draws, poisson


@config_dataclass
class BlankInfilling(ObjectiveConfig):
    """GLM's blank infilling: spans are blanked out and written in random order (Du et al. 2022).

    The inputs are the text with a sentinel in place of each span (Part A). The targets are the spans (Part B), each
    preceded by its sentinel and ended by EOS.

    With rate r and a window of n tokens, round(n r) tokens (at least 1, at most n / 2) are masked. Span lengths are
    Poisson(`mean_span_length`) conditioned on 1 or more, drawn until the tokens are used up, the last one cut. Spans
    have clean tokens between them and are placed uniformly around a circle, so that each token is masked with the same
    probability; one that the end of the window cuts counts as two. The order of Part B is a uniform permutation. The
    tokens of the spans and their EOS are predicted. The sentinels, whose order is random, are given.
    """

    has_inputs: ClassVar[bool] = True
    unscored_first_targets: ClassVar[int] = 1

    kind: Literal["blank_infilling"] = "blank_infilling"
    name: str = "glm"
    rate: float = 1.0
    mode: Mode | None = None
    mask_rate: Annotated[float, pydantic.Field(gt=0, le=0.5)] = 0.15
    """Fraction of the window's tokens that is blanked out."""
    mean_span_length: Annotated[float, pydantic.Field(gt=0, le=1000)] = 3.0
    """Mean of the Poisson distribution before the condition: a value of 3 gives spans of 3.16 tokens on average."""

    @property
    def description(self) -> str:
        return f"blank infilling, {100 * self.mask_rate:.0f} %"

    @property
    def min_raw_length(self) -> int:
        return 2

    def blank_count(self, raw_length: int) -> int:
        """Return the number of blanked tokens: at most half of the window, so that each can be a span of its own."""
        return max(min(round(self.mask_rate * raw_length), raw_length // 2), 1)

    def max_blank_draws(self, raw_length: int) -> int:
        """Return the maximum number of span lengths that are drawn."""
        blank = self.blank_count(raw_length)
        return min(max_draws(poisson(self.mean_span_length, at_least=1), blank), blank)

    def max_blanks(self, raw_length: int) -> int:
        """Return the maximum number of spans, hence of sentinels.

        The ends of the window can cut one span of two tokens or more in two.
        """
        return min(self.max_blank_draws(raw_length) + 1, self.blank_count(raw_length))

    def longest_example(self, raw_length: int) -> ExampleLengths:
        blank, spans = self.blank_count(raw_length), self.max_blanks(raw_length)
        # Part A: a sentinel per span and EOS. Part B: a sentinel and an EOS per span.
        inputs, targets = self.mode_tokens + raw_length - blank + spans + 1, blank + 2 * spans
        return ExampleLengths(inputs, targets, inputs + targets)

    def sentinels_needed(self, raw_length: int) -> int:
        return self.max_blanks(raw_length) if raw_length else 0

    def expected_loss_tokens(self, raw_length: int) -> float:
        blank = self.blank_count(raw_length)
        draws = expected_draws(poisson(self.mean_span_length, at_least=1), blank)
        # One EOS is scored per span. The mean number of spans counts the drawn ones and the second halves of spans
        # that are cut in two.
        return blank + draws + expected_cuts(blank, draws, raw_length)
