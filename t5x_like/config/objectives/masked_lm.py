"""Masked LM: tokens are masked, replaced or kept, and predicted at their own positions (BERT)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

import pydantic

from t5x_like.config.bounds import NonNegativeInt, UnitFloatAboveZero
from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives.base import ExampleLengths, ObjectiveConfig
from t5x_like.errors import ConfigProblem


@config_dataclass
class MaskedLM(ObjectiveConfig):
    """BERT's masking: a chosen token becomes the mask token or a random token, or stays, and is predicted.

    With mask rate r and a window of n tokens, max(1, round(n r)) tokens are chosen, uniformly over all sets of that
    size. The masking is a function of the row, so that each epoch masks anew, and rows are full (RoBERTa). An encoder
    predicts each chosen token at its own position. A decoder with a bidirectional prefix predicts it one position
    earlier, as the next token (GPT-BERT), so that one output head serves this objective and causal LM.
    """

    has_inputs: ClassVar[bool] = True
    predicts_in_place: ClassVar[bool] = True
    targets_are_text: ClassVar[bool] = True

    kind: Literal["masked_lm"] = "masked_lm"
    name: str = "masked_lm"
    rate: float = 1.0
    mode: None = None
    mask_rate: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.15
    """Fraction of the window's tokens that is chosen for prediction."""
    mask_rate_schedule: tuple[tuple[NonNegativeInt, UnitFloatAboveZero], ...] = ()
    """Mask rate of training rows by step, as (step, rate) points: linear between two points, constant after the last
    one, and `mask_rate` before the first. Two points at one step are a jump. Held-out rows always have `mask_rate`, and
    so have plans."""
    replace_with_mask: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.8
    """Probability that a chosen token becomes the mask token."""
    replace_with_random: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.1
    """Probability that a chosen token becomes a random token. The rest stay as they are."""
    masking_unit: Literal["token", "word", "span"] = "token"
    """token: tokens are chosen one by one. word: all tokens of a word are chosen or none. Words are taken in random
    order, and one that would exceed the count is skipped (BERT's whole-word masking): slightly fewer tokens can be
    chosen, and short words, such as those that the ends of the window cut, are chosen more often than long ones.
    span: the text is cut into runs of words of geometric lengths, which are taken in random order, the last one only in
    part (SpanBERT); a run as a whole is masked, replaced or kept."""
    span_end_probability: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.2
    """span: parameter of the geometric distribution of a run's length in words."""
    max_span_words: Annotated[int, pydantic.Field(ge=1, le=1000)] = 10
    """span: maximum length; the geometric distribution is conditioned on it. With both defaults, the mean is 3.8
    words."""

    @property
    def description(self) -> str:
        rates = [self.mask_rate, *(rate for _, rate in self.mask_rate_schedule)]
        several = f"–{100 * max(rates):.0f}" if max(rates) > min(rates) else ""
        return f"masked LM, {100 * min(rates):.0f}{several} %"

    @property
    def min_raw_length(self) -> int:
        return 1

    @property
    def needs_token_traits(self) -> bool:
        return self.masking_unit != "token"

    @property
    def changes_with_steps(self) -> bool:
        return bool(self.mask_rate_schedule)

    def at_step(self, step: int) -> Self:
        return dataclasses.replace(self, mask_rate=self._rate_at(step), mask_rate_schedule=())

    def _rate_at(self, step: int) -> float:
        points = self.mask_rate_schedule
        # Of several points at one step, the last one holds from it on.
        number = sum(first <= step for first, _ in points)
        if not number:
            return self.mask_rate
        first, rate = points[number - 1]
        if number == len(points):
            return rate
        last, next_rate = points[number]
        return rate + (next_rate - rate) * (step - first) / (last - first)

    def masked_count(self, raw_length: int) -> int:
        """Return the number of chosen tokens: BERT's max(1, round(length * mask_rate)). For whole words, a bound."""
        return min(max(round(raw_length * self.mask_rate), 1), raw_length)

    def longest_example(self, raw_length: int) -> ExampleLengths:
        return ExampleLengths(raw_length, raw_length, raw_length)

    def sentinels_needed(self, raw_length: int) -> int:
        return 1

    def expected_loss_tokens(self, raw_length: int) -> float:
        """Return the number of chosen tokens. For whole words it is the maximum, since the mean depends on the text."""
        return self.masked_count(raw_length)

    def problems(self, where: str) -> Iterator[ConfigProblem]:
        steps = [step for step, _ in self.mask_rate_schedule]
        if steps != sorted(steps):
            yield ConfigProblem(f"{where}.mask_rate_schedule", f"the steps {steps}", "steps in ascending order")
        left = 1 - min(max(self.replace_with_mask, 0), 1)
        if 0 <= self.replace_with_random <= 1 and self.replace_with_random > left + 1e-9:
            yield ConfigProblem(
                f"{where}.replace_with_random",
                f"{self.replace_with_random:g}",
                f"a number in [0, {left:g}], the share that replace_with_mask {self.replace_with_mask:g} leaves",
            )
