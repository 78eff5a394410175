"""A complete objective outside of the package, in one file: the targets are a span of the text in reverse order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import pydantic

from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives import ExampleLengths, Layout, ObjectiveConfig, register_objective
from t5x_like.data.inspection.goodness_of_fit import Fit, multinomial
from t5x_like.data.inspection.noise_distributions import ObservedNoise
from t5x_like.data.objectives import random_ops
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Tokens
from t5x_like.data.objectives.prompts import PromptFormat, SentinelSpans
from t5x_like.data.stream import rng
from t5x_like.data.stream.unpack import UnpackedExample
from t5x_like.data.tokenizers.vocabulary import EOS_ID, TokenTraits, Vocabulary


@config_dataclass
class ReversedSpan(ObjectiveConfig):
    """One span, at a uniform position, is replaced by a sentinel and predicted in reverse order."""

    has_inputs: ClassVar[bool] = True

    kind: Literal["reversed_span"] = "reversed_span"
    name: str = "reversed_span"
    span_fraction: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.25

    @property
    def description(self) -> str:
        return f"reversed span, {100 * self.span_fraction:.0f} %"

    @property
    def min_raw_length(self) -> int:
        return 2

    def span_length(self, raw_length: int) -> int:
        return min(max(round(raw_length * self.span_fraction), 1), raw_length - 1)

    def longest_example(self, raw_length: int) -> ExampleLengths:
        span = self.span_length(raw_length)
        inputs, targets = self.mode_tokens + raw_length - span + 2, span + 2
        return ExampleLengths(inputs, targets, inputs + targets)

    def sentinels_needed(self, raw_length: int) -> int:
        return 1

    def expected_loss_tokens(self, raw_length: int) -> float:
        return self.span_length(raw_length) + 2


class ReversedInfill(SentinelSpans):
    """Gaps as T5 has them, with the spans in reverse order."""

    def spans(
        self, answers: Sequence[Sequence[int]], numbers: Sequence[int], vocabulary: Vocabulary
    ) -> list[list[int]]:
        return [span[::-1] for span in super().spans(answers, numbers, vocabulary)]


class ReversedSpanDenoiser(ObjectiveImplementation[ReversedSpan]):
    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        rows, length = tokens_NxL.shape
        span = self.config.span_length(length)
        start_N = rng.below(rng.bits(keys_N, random_ops.CUT, 1)[:, 0], length - span + 1)
        in_span_NxL = (np.arange(length) >= start_N[:, None]) & (np.arange(length) < start_N[:, None] + span)
        clean_NxC = tokens_NxL[~in_span_NxL].reshape(rows, -1)
        sentinel = vocabulary.sentinel_id(0)
        inputs = [np.insert(clean, start, sentinel) for clean, start in zip(clean_NxC, start_N, strict=True)]
        mode = [] if self.config.mode is None else [vocabulary.mode_id(self.config.mode)]
        inputs_NxI = np.array([[*mode, *row, EOS_ID] for row in inputs], np.int32)
        spans_NxS = tokens_NxL[in_span_NxL].reshape(rows, span)[:, ::-1]
        targets_NxT = np.array([[sentinel, *row, EOS_ID] for row in spans_NxS], np.int32)
        return Examples(
            inputs_NxI, targets_NxT, np.full(rows, inputs_NxI.shape[1]), np.full(rows, targets_NxT.shape[1])
        )

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        given, predicted = self._text_ids(inputs, targets)
        gap = given.index(vocabulary.sentinel_id(0))
        return given[:gap] + predicted[:0:-1] + given[gap + 1 :]

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return self._default_prompt_format(layout, sentinels=True, infill=ReversedInfill())

    def observe(
        self, example: UnpackedExample, raw_length: int, vocabulary: Vocabulary, *, first: bool
    ) -> ObservedNoise:
        start = int(np.flatnonzero(vocabulary.is_sentinel(example.inputs))[0]) - self.config.mode_tokens
        return ObservedNoise(raw_length, self.config.span_length(raw_length), outcome=(start,))

    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        length = observed[0].raw_length
        outcomes = length - self.config.span_length(length) + 1
        measured = np.bincount([one.outcome[0] for one in observed], minlength=outcomes).astype(np.float64)
        labels = tuple(map(str, range(outcomes)))
        return [multinomial("start of the span", labels, measured, np.full(outcomes, 1 / outcomes))]


register_objective(ReversedSpan, ReversedSpanDenoiser)
