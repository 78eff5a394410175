"""Prefix LM: the window is cut once, into inputs and targets (UL2's S denoiser)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

import pydantic

from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives.base import ExampleLengths, Mode, ObjectiveConfig
from t5x_like.errors import ConfigProblem


@config_dataclass
class PrefixLM(ObjectiveConfig):
    """The window is cut once: the first part is the inputs, the rest the targets (UL2's S).

    The target fraction is uniform in [min_target_fraction, max_target_fraction]; at least one token stays on each side.
    """

    has_inputs: ClassVar[bool] = True

    kind: Literal["prefix_lm"] = "prefix_lm"
    name: str
    rate: float = 1.0
    mode: Mode | None = None
    min_target_fraction: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    """Smallest fraction of the window that is the targets."""
    max_target_fraction: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.5
    """UL2's table has a mean of 0.25, the listing in its appendix is uniform in [0, 1], T5Gemma 2 uses 0.75."""
    complementary_pairs: bool = False
    """Two windows share a row and are cut at complementary positions: where one has t target tokens, the other has
    min + max - t, where min and max bound the number of targets. So inputs and targets of a row have the same total
    lengths whatever the cut, and each window's cut keeps its distribution (the packing of Wang et al. 2022)."""

    @property
    def description(self) -> str:
        return f"prefix LM, {100 * self.min_target_fraction:.0f}–{100 * self.max_target_fraction:.0f} %"

    @property
    def min_raw_length(self) -> int:
        return 2

    @property
    def windows_per_row(self) -> int:
        return 2 if self.complementary_pairs else 1

    def single_window(self) -> Self:
        return dataclasses.replace(self, complementary_pairs=False)

    def target_range(self, raw_length: int) -> tuple[int, int]:
        """Return the minimum and maximum number of target tokens (without EOS) of a window of `raw_length` tokens."""
        # Rounded inwards, so that the fraction of targets never leaves its range.
        low = min(max(math.ceil(self.min_target_fraction * raw_length), 1), raw_length - 1)
        high = min(max(math.floor(self.max_target_fraction * raw_length), low), raw_length - 1)
        return low, high

    def longest_example(self, raw_length: int) -> ExampleLengths:
        fewest, most = self.target_range(raw_length)
        inputs, targets = self.mode_tokens + raw_length - fewest + 1, most + 1
        # The total does not depend on the cut: all tokens, and an EOS for each part.
        return ExampleLengths(inputs, targets, self.mode_tokens + raw_length + 2)

    def row_lengths(self, raw_length: int) -> ExampleLengths:
        """Return the maximum lengths of a row.

        A pair of windows always has exactly these lengths, whatever the cut. They are less than twice those of the
        longest example.
        """
        if not self.complementary_pairs:
            return self.longest_example(raw_length)
        # t and min + max - t: the sum over the pair is constant.
        targets_without_eos = sum(self.target_range(raw_length))
        inputs = 2 * (self.mode_tokens + raw_length + 1) - targets_without_eos
        targets = targets_without_eos + 2
        return ExampleLengths(inputs, targets, inputs + targets)

    def sentinels_needed(self, raw_length: int) -> int:
        return 0

    def prefix_lengths(self, raw_length: int) -> tuple[tuple[int, float], ...]:
        fewest, most = self.target_range(raw_length)
        # The mode token, the text before the cut, EOS, and the position that reads it.
        longest = self.mode_tokens + raw_length + 2
        return tuple((longest - targets, 1 / (most - fewest + 1)) for targets in range(fewest, most + 1))

    def expected_loss_tokens(self, raw_length: int) -> float:
        # The mean of a uniform integer, and EOS.
        return sum(self.target_range(raw_length)) / 2 + 1

    def problems(self, where: str) -> Iterator[ConfigProblem]:
        low, high = self.min_target_fraction, self.max_target_fraction
        if 0 <= low <= 1 and 0 <= high <= 1 and high < low:
            yield ConfigProblem(f"{where}.max_target_fraction", f"{high:g}", f"a number in [{low:g}, 1]")
