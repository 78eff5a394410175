"""Dialogues: the assistant's turns are predicted, everything else is given."""

from __future__ import annotations

from typing import ClassVar, Literal

from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives.base import ExampleLengths, ExampleSource, Mode, ObjectiveConfig


@config_dataclass
class Dialogues(ObjectiveConfig):
    """A dialogue as its chat template lays it out, with a loss on the tokens of the assistant's turns.

    The examples come from a corpus with `messages_field`. A dialogue that is longer than a row is cut at its end;
    nothing is added to it, so that a cut answer does not end in EOS. For layouts of a single stream.
    """

    has_inputs: ClassVar[bool] = False
    example_source: ClassVar[ExampleSource] = "dialogues"

    kind: Literal["dialogues"] = "dialogues"
    name: str = "dialogues"
    rate: float = 1.0
    mode: Mode | None = None

    @property
    def description(self) -> str:
        return "the assistant's turns"

    @property
    def min_raw_length(self) -> int:
        return 2

    def longest_example(self, raw_length: int) -> ExampleLengths:
        return ExampleLengths(0, raw_length, raw_length)

    def sentinels_needed(self, raw_length: int) -> int:
        return 0

    def expected_loss_tokens(self, raw_length: int) -> float:
        """Return an upper bound: how much of a dialogue the assistant wrote is known from its tokens only."""
        return raw_length
