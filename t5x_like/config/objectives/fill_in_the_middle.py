"""Fill-in-the-middle: the middle of the window moves to its end."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import pydantic

from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives.base import ExampleLengths, ObjectiveConfig

INFILLING_MARKERS = 3
"""Number of sentinels that serve as markers: for prefix, suffix and middle."""


@config_dataclass
class FillInTheMiddle(ObjectiveConfig):
    """The window is cut into prefix, middle and suffix, and the middle moves to the end (Bavarian et al. 2022).

    With probability `fim_rate` a window is rearranged; otherwise it is left unchanged. The two cuts are independent and
    uniform over the n + 1 boundaries of the n tokens, so that any part can be empty. There are no inputs: all tokens
    are predicted, including those of prefix and suffix and the three markers.

      PSM: <PRE> prefix <SUF> suffix <MID> middle EOS
      SPM: <PRE> <SUF> suffix <MID> prefix middle EOS (the paper's second variant, a PSM whose prefix is empty)

    The markers <PRE>, <SUF>, <MID> are the last three sentinels of the vocabulary, so that they differ from the
    sentinels of spans in the same mixture, which must leave them free (`Vocabulary.infilling_ids`).
    """

    has_inputs: ClassVar[bool] = False

    kind: Literal["fill_in_the_middle"] = "fill_in_the_middle"
    name: str = "fim"
    rate: float = 1.0
    mode: None = None
    fim_rate: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.5
    """Probability that a window is rearranged."""
    spm_rate: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.5
    """Share of SPM among the rearranged windows."""

    @property
    def description(self) -> str:
        return f"fill in the middle, {100 * self.fim_rate:.0f} %"

    @property
    def min_raw_length(self) -> int:
        return 1

    @property
    def reserved_sentinels(self) -> int:
        return INFILLING_MARKERS if self.fim_rate > 0 else 0

    def longest_example(self, raw_length: int) -> ExampleLengths:
        targets = raw_length + self.reserved_sentinels + 1
        return ExampleLengths(0, targets, targets)

    def sentinels_needed(self, raw_length: int) -> int:
        return self.reserved_sentinels

    def expected_loss_tokens(self, raw_length: int) -> float:
        # Windows that are left unchanged have no markers.
        return raw_length + INFILLING_MARKERS * self.fim_rate + 1
