"""Block diffusion in an encoder-decoder: the encoder reads a text, and the decoder unmasks the next block of it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import pydantic

from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives.base import ExampleLengths, ObjectiveConfig


@config_dataclass
class BlockDiffusion(ObjectiveConfig):
    """Masked diffusion of one block after another (BD3-LM, Arriola et al. 2025a; in an encoder-decoder E2D2, 2025b).

    Of a window of n tokens, one position is drawn uniformly. The encoder reads the tokens before it and EOS. The
    decoder reads its start token and the block of the next `block_length` tokens (fewer at the end of the window) with
    k of its b tokens masked, k uniform on 1..b, uniformly over all sets of that size. It attends to all of them in both
    directions, and predicts the masked tokens at their own positions, each with the loss weight b / k. The text after
    the block is not used: a row has the loss of one block, given all of the text before it without noise.

    Without the start token, no relative positions could tell the tokens of a block apart that is masked as a whole.

    The loss per weight has an expectation of at least -log p(block | text before it) / b, where p is the mean over all
    orders in which the tokens of the block can be generated one by one (see `MaskedDiffusion`). Summed over the blocks
    of a text it bounds -log p(text), since a text is generated block by block.

    E2D2 trains all blocks of a window in one pass, with masks of blocks in both stacks. Here a row has one block, so
    that no attention needs another mask than that of a bidirectional prefix, and a generated text is read as in
    training.
    """

    has_inputs: ClassVar[bool] = True
    predicts_in_place: ClassVar[bool] = True
    reads_masked_targets: ClassVar[bool] = True
    fractional_loss_weights: ClassVar[bool] = True

    kind: Literal["block_diffusion"] = "block_diffusion"
    name: str = "block_diffusion"
    rate: float = 1.0
    mode: None = None
    block_length: Annotated[int, pydantic.Field(ge=1)] = 32
    """Number of tokens that the decoder unmasks together."""

    @property
    def description(self) -> str:
        return f"block diffusion, {self.block_length} tokens"

    @property
    def min_raw_length(self) -> int:
        return 1

    def longest_example(self, raw_length: int) -> ExampleLengths:
        # All tokens but the last one, and EOS; the start token and the block.
        return ExampleLengths(raw_length, self.block_length + 1, raw_length + self.block_length + 1)

    def sentinels_needed(self, raw_length: int) -> int:
        return 1

    def in_whole_blocks(self, count: int) -> int:
        """Return the number of tokens that are generated for `count` wanted ones: those of whole blocks.

        Training has shorter blocks at the end of a window only.
        """
        return -(-count // self.block_length) * self.block_length

    def block_lengths(self, raw_length: int) -> tuple[tuple[int, float], ...]:
        """Return the lengths of the block of a window, and how likely each of them is."""
        longest = min(self.block_length, raw_length)
        return (*((length, 1 / raw_length) for length in range(1, longest)), (longest, 1 - (longest - 1) / raw_length))

    def prefix_lengths(self, raw_length: int) -> tuple[tuple[int, float], ...]:
        return tuple((length + 1, likely) for length, likely in self.block_lengths(raw_length))

    def expected_loss_tokens(self, raw_length: int) -> float:
        """Return the mean number of masked tokens. Their loss weights sum to the length of the block."""
        return sum(likely * (length + 1) / 2 for length, likely in self.block_lengths(raw_length))
