"""Supervised pairs: the inputs are given, the targets are predicted."""

from __future__ import annotations

from typing import ClassVar, Literal

from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives.base import ExampleLengths, ExampleSource, Mode, ObjectiveConfig


@config_dataclass
class PairObjective(ObjectiveConfig):
    """Base of the objectives whose rows hold inputs and the targets that follow them, without noise."""

    has_inputs: ClassVar[bool] = True

    @property
    def min_raw_length(self) -> int:
        return 2

    def longest_example(self, raw_length: int) -> ExampleLengths:
        inputs, targets = self.mode_tokens + raw_length + 1, raw_length + 1
        return ExampleLengths(inputs, targets, inputs + targets)

    def sentinels_needed(self, raw_length: int) -> int:
        return 0


@config_dataclass
class Supervised(PairObjective):
    """A supervised pair without noise: the inputs are given, the targets are predicted."""

    example_source: ClassVar[ExampleSource] = "pairs"

    kind: Literal["supervised"] = "supervised"
    name: str = "supervised"
    rate: float = 1.0
    mode: Mode | None = None

    @property
    def description(self) -> str:
        return ""

    def expected_loss_tokens(self, raw_length: int) -> float:
        return raw_length + 1
