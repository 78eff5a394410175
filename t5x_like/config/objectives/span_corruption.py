"""Span corruption: T5's objective, and UL2's R and X denoisers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import pydantic

from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives.base import ExampleLengths, Mode, ObjectiveConfig
from t5x_like.config.objectives.span_lengths import expected_cuts


@config_dataclass
class SpanCorruption(ObjectiveConfig):
    """Spans of the window are replaced by sentinels in the inputs and given in the targets (T5, UL2's R and X).

    With noise density r, mean span length m and a window of n tokens, round(n r) tokens are masked in
    max(1, round(n r / m)) spans. The masked and the clean tokens are split into spans uniformly over all compositions.
    """

    has_inputs: ClassVar[bool] = True

    kind: Literal["span_corruption"] = "span_corruption"
    name: str
    rate: float = 1.0
    """Share of the examples, relative to the other objectives of the mixture."""
    mode: Mode | None = None
    """Mode token at the start of the inputs; None: no mode token."""
    mean_noise_span_length: Annotated[float, pydantic.Field(ge=1, allow_inf_nan=False)] = 3.0
    """Mean number of tokens of a span."""
    noise_density: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.15
    """Fraction of the window's tokens that is masked."""
    t5_exact: bool = False
    """T5's own placement: the window starts with clean tokens and ends with masked ones. The default rotates the mask
    by a uniform offset, so that each position is masked with the same probability; a span that the end of the window
    cuts then counts as two."""

    @property
    def description(self) -> str:
        return f"spans of {self.mean_noise_span_length:g}, {100 * self.noise_density:.0f} %"

    @property
    def min_raw_length(self) -> int:
        return 2

    def noise_counts(self, raw_length: int) -> tuple[int, int]:
        """Return the number of masked tokens and of spans: the arithmetic of T5's `random_spans_noise_mask`.

        Rounds half to even in float64 as Python does. T5's graph rounds in float32, which differs at a few lengths.
        """
        length = max(raw_length, 2)
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        spans = max(round(noise / self.mean_noise_span_length), 1)
        # Each span has a masked token, and a clean token between it and the next.
        return noise, min(spans, noise, length - noise)

    def max_spans(self, raw_length: int) -> int:
        """Return the maximum number of spans of a window: the rotation can cut one span in two."""
        noise, spans = self.noise_counts(raw_length)
        # Spans of a single token, noise == spans, cannot be cut.
        return spans + (0 if self.t5_exact or noise == spans else 1)

    def longest_example(self, raw_length: int) -> ExampleLengths:
        noise, _ = self.noise_counts(raw_length)
        spans = self.max_spans(raw_length)
        # One sentinel per span in either part, and EOS.
        inputs, targets = self.mode_tokens + raw_length - noise + spans + 1, noise + spans + 1
        return ExampleLengths(inputs, targets, inputs + targets)

    def prefix_lengths(self, raw_length: int) -> tuple[tuple[int, float], ...]:
        noise, spans = self.noise_counts(raw_length)
        cut = 0.0 if self.t5_exact else expected_cuts(noise, spans, raw_length)
        uncut = self.mode_tokens + raw_length - noise + spans + 2
        return ((uncut, 1 - cut), (uncut + 1, cut))

    def sentinels_needed(self, raw_length: int) -> int:
        return self.max_spans(raw_length) if raw_length else 0

    def expected_loss_tokens(self, raw_length: int) -> float:
        noise, spans = self.noise_counts(raw_length)
        return noise + spans + (0.0 if self.t5_exact else expected_cuts(noise, spans, raw_length)) + 1
