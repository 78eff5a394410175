"""Causal LM: every token is predicted from the tokens before it."""

from __future__ import annotations

from typing import ClassVar, Literal

from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives.base import ExampleLengths, ObjectiveConfig


@config_dataclass
class CausalLM(ObjectiveConfig):
    """Every token of the window is predicted from the tokens before it. There are no inputs."""

    has_inputs: ClassVar[bool] = False
    targets_are_text: ClassVar[bool] = True

    kind: Literal["causal_lm"] = "causal_lm"
    name: str = "causal_lm"
    rate: float = 1.0
    mode: None = None

    @property
    def description(self) -> str:
        return "causal LM"

    @property
    def min_raw_length(self) -> int:
        return 1

    def longest_example(self, raw_length: int) -> ExampleLengths:
        return ExampleLengths(0, raw_length + 1, raw_length + 1)

    def sentinels_needed(self, raw_length: int) -> int:
        return 0

    def expected_loss_tokens(self, raw_length: int) -> float:
        return raw_length + 1
