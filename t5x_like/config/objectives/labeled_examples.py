"""Labelled examples: texts with the labels that a task head predicts."""

from __future__ import annotations

from typing import ClassVar, assert_never

from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.model import HeadKind
from t5x_like.config.objectives.base import ExampleLengths, ExampleSource, Mode, ObjectiveConfig


@config_dataclass
class LabeledExamples(ObjectiveConfig):
    """A text and the output that a task head learns for it (`ModelConfig.task_head`, of the same kind).

    The examples are pairs, one per row. The inputs are the text, cut where it is longer than a row and ended by EOS.
    The targets are a label, labels of the words, a number, or for `embedding` the text that belongs to it.
    """

    has_inputs: ClassVar[bool] = True
    example_source: ClassVar[ExampleSource] = "labelled"

    kind: HeadKind
    name: str = "head"
    rate: float = 1.0
    mode: Mode | None = None
    """Token at the start of the text: the one that pooling `cls` reads, for a vocabulary without a token for that."""

    @property
    def description(self) -> str:
        return self.kind.replace("_", " ")

    @property
    def min_raw_length(self) -> int:
        return 2

    def longest_example(self, raw_length: int) -> ExampleLengths:
        length = self.mode_tokens + raw_length + 1
        return ExampleLengths(length, length, length)

    def sentinels_needed(self, raw_length: int) -> int:
        return 0

    def expected_loss_tokens(self, raw_length: int) -> float:
        """Return the number of scored outputs: one per text, or for token classification at most one per token."""
        match self.kind:
            case "token_classification":
                return raw_length
            case "classification" | "regression" | "embedding":
                return 1
            case unknown:
                assert_never(unknown)
