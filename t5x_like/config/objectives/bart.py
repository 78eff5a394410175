"""BART's denoising: infilling, deletion, masking, sentence permutation and rotation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import pydantic

from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives.base import ExampleLengths, Mode, ObjectiveConfig
from t5x_like.config.objectives.span_lengths import max_draws, poisson
from t5x_like.errors import ConfigProblem


@config_dataclass
class BartDenoising(ObjectiveConfig):
    """BART's noise: the targets are the raw window, the inputs are the window after the chosen noises (Lewis et al.
    2020).

    The noises are applied in this order, for a window of n tokens:
      permute_sentences: the sentences (stretches that end in `TokenTraits.sentence_ends`) in uniformly random order.
      rotate_document: the window begins at a uniformly random token; the part before that token follows the end.
      infill_rate: round(n r) tokens (at least 1, at most n - 1) in spans, each of which becomes one mask token. Lengths
        are Poisson(`mean_span_length`), drawn until the tokens are used up, the last one cut; a span of length 0
        inserts a mask token. Spans have clean tokens between them and are placed uniformly around a circle, so that
        each token is masked with the same probability; one that the end of the window cuts counts as two.
      delete_rate, mask_rate: of the tokens that no span covers, about n times the rate are deleted and masked one by
        one, chosen uniformly.
    The defaults are BART's final choice: infilling of 30 % and all sentences permuted.
    """

    has_inputs: ClassVar[bool] = True

    kind: Literal["bart"] = "bart"
    name: str = "bart"
    rate: float = 1.0
    mode: Mode | None = None
    infill_rate: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.3
    """Fraction of the window's tokens in spans that each become one mask token; 0: no infilling."""
    mean_span_length: Annotated[float, pydantic.Field(ge=1, le=1000)] = 3.0
    """Mean of the Poisson distribution of the lengths of these spans, in tokens."""
    delete_rate: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    """Fraction of the window's tokens that is deleted; with infill_rate at most 1."""
    mask_rate: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    """Fraction of the window's tokens that is masked one by one; with infill_rate and delete_rate at most 1."""
    permute_sentences: bool = True
    """Put the sentences in random order."""
    rotate_document: bool = False
    """Begin the window at a random token."""

    @property
    def description(self) -> str:
        return f"BART, infilling {100 * self.infill_rate:.0f} %"

    @property
    def min_raw_length(self) -> int:
        return 2

    @property
    def needs_token_traits(self) -> bool:
        return self.permute_sentences

    def noise_counts(self, raw_length: int) -> tuple[int, int, int]:
        """Return the numbers of tokens that are infilled, deleted, and masked one by one.

        The infilled and deleted tokens are rounded together, so that a longer window never has shorter inputs.
        """
        # At least one token is masked, and one stays, before which a span can be placed.
        infilled = min(max(round(self.infill_rate * raw_length), 1), raw_length - 1) if self.infill_rate else 0
        gone = min(max(round((self.infill_rate + self.delete_rate) * raw_length), infilled), raw_length - 1)
        return infilled, gone - infilled, min(round(self.mask_rate * raw_length), raw_length - gone)

    def max_infill_draws(self, raw_length: int) -> int:
        """Return the maximum number of span lengths that are drawn, including those of length 0.

        Spans have a clean token between them.
        """
        infilled, _, _ = self.noise_counts(raw_length)
        return min(max_draws(poisson(self.mean_span_length), infilled), raw_length - infilled) if infilled else 0

    def max_infills(self, raw_length: int) -> int:
        """Return the maximum number of mask tokens of infilling: the ends of the window can cut one span in two."""
        infilled, _, _ = self.noise_counts(raw_length)
        # A single masked token cannot be cut.
        return self.max_infill_draws(raw_length) + (1 if infilled > 1 else 0)

    def longest_example(self, raw_length: int) -> ExampleLengths:
        infilled, deleted, _ = self.noise_counts(raw_length)
        # Removed tokens are exact; the number of mask tokens in place of spans is bounded. 1 is EOS.
        inputs = self.mode_tokens + raw_length - infilled - deleted + self.max_infills(raw_length) + 1
        targets = raw_length + 1
        return ExampleLengths(inputs, targets, inputs + targets)

    def sentinels_needed(self, raw_length: int) -> int:
        return 1 if self.infill_rate > 0 or self.mask_rate > 0 else 0

    def expected_loss_tokens(self, raw_length: int) -> float:
        return raw_length + 1

    def problems(self, where: str) -> Iterator[ConfigProblem]:
        left = max(1 - self.infill_rate, 0)
        if 0 <= self.delete_rate <= 1 and self.delete_rate > left:
            yield ConfigProblem(f"{where}.delete_rate", f"{self.delete_rate:g}", f"a number in [0, {left:g}]")
        left = max(left - self.delete_rate, 0)
        if 0 <= self.mask_rate <= 1 and self.mask_rate > left + 1e-9:
            yield ConfigProblem(f"{where}.mask_rate", f"{self.mask_rate:g}", f"a number in [0, {left:g}]")
