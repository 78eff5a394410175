"""Causal masking: spans move to the end of the window (CM3, InCoder)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import pydantic

from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives.base import ExampleLengths, ObjectiveConfig


@config_dataclass
class CausalMasking(ObjectiveConfig):
    """Some spans of the window move to its end, each after its sentinel (CM3, InCoder).

      text <0> text <1> text <0> first span <1> second span EOS

    The number of spans is Poisson with mean `mean_spans`, conditioned on 1 to `max_spans` (and on the maximum that
    fits). The 2k ends of k spans are a uniform subset of the n + 1 boundaries of the n tokens: no span is empty, and no
    two spans are adjacent. There are no inputs. All tokens are predicted except the sentinels inside the text, whose
    positions are random. The sentinels at the end are predicted, since each one ends the part before it.
    """

    has_inputs: ClassVar[bool] = False

    kind: Literal["causal_masking"] = "causal_masking"
    name: str = "cm3"
    rate: float = 1.0
    mode: None = None
    mean_spans: Annotated[float, pydantic.Field(gt=0, le=100)] = 1.0
    """Mean of the Poisson distribution of the number of spans, before its conditions."""
    max_spans: Annotated[int, pydantic.Field(ge=1, le=100)] = 8
    """Maximum number of spans, for which a window is sized. CM3 clips at 16 and InCoder at 256; with a mean of 1, more
    than 8 would be drawn in one window of half a million."""

    @property
    def description(self) -> str:
        return "causal masking"

    @property
    def min_raw_length(self) -> int:
        return 1

    def max_moved_spans(self, raw_length: int) -> int:
        """Return the maximum number of spans: k spans have 2k different ends among raw_length + 1 boundaries."""
        return min(self.max_spans, (raw_length + 1) // 2)

    def moved_spans_distribution(self, raw_length: int) -> tuple[float, ...]:
        """Return the probabilities of 1, 2, ... spans."""
        most = self.max_moved_spans(raw_length)
        # The factor exp(-mean) of the Poisson distribution cancels in the normalization.
        weights = [self.mean_spans**k / math.factorial(k) for k in range(1, most + 1)]
        return tuple(weight / sum(weights) for weight in weights)

    def longest_example(self, raw_length: int) -> ExampleLengths:
        # Each span has its sentinel twice, in the text and before the span.
        targets = raw_length + 2 * self.max_moved_spans(raw_length) + 1
        return ExampleLengths(0, targets, targets)

    def sentinels_needed(self, raw_length: int) -> int:
        return self.max_moved_spans(raw_length) if raw_length else 0

    def expected_loss_tokens(self, raw_length: int) -> float:
        distribution = self.moved_spans_distribution(raw_length)
        # The sentinels in the text are not scored, those before the spans are.
        return raw_length + sum(spans * share for spans, share in enumerate(distribution, start=1)) + 1
