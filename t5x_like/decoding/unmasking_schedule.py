"""Schedule in which the masked positions of a text are filled: their order, and how many of them in each pass."""

from __future__ import annotations

import dataclasses
from typing import Literal

from t5x_like.errors import ConfigError, ConfigProblem

Order = Literal["confidence", "random"]


@dataclasses.dataclass(frozen=True)
class DiffusionSampling:
    """Order and number of the passes in which masked positions are filled.

    Attributes:
      order: Which positions of a block are unmasked first: those whose most likely token is the most probable one
        (confidence), or a uniformly random order.
      steps: Number of passes for all masked positions of a text; each block has its share, rounded up. None: one pass
        for each position.
      block_length: Number of masked positions that are filled before the next ones, from left to right; 1 is the order
        of the text. None: all of them are one block.
      gap_tokens: Number of tokens that fill a gap `<mask>`.

    Raises:
      ConfigError: a number below 1.
    """

    order: Order = "confidence"
    steps: int | None = None
    block_length: int | None = None
    gap_tokens: int = 1

    def __post_init__(self) -> None:
        numbers = {"num_steps": self.steps, "block_length": self.block_length, "gap_tokens": self.gap_tokens}
        problems = [
            ConfigProblem(name, str(value), "1 or more")
            for name, value in numbers.items()
            if value is not None and value < 1
        ]
        if problems:
            raise ConfigError(problems)

    def passes(self, count: int) -> list[list[int]]:
        """Return for each block of a text with `count` masked positions the number of them that each pass unmasks."""
        size = min(self.block_length or count, count)
        blocks = [min(size, count - first) for first in range(0, count, size or 1)]
        return [self._passes_of_block(block, count) for block in blocks]

    def _passes_of_block(self, block: int, count: int) -> list[int]:
        number = block if self.steps is None else min(max(-(-block * self.steps // count), 1), block)
        # As equal as whole numbers can be: none of them is 0.
        return [block * (index + 1) // number - block * index // number for index in range(number)]
