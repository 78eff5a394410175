"""Block diffusion: the tokens before a random position are inputs, and masked tokens after it are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import BlockDiffusion, Layout
from t5x_like.data.inspection.goodness_of_fit import Fit
from t5x_like.data.inspection.noise_distributions import ObservedNoise
from t5x_like.data.objectives import random_ops
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Mask, Tokens
from t5x_like.data.objectives.masked_diffusion import fit_of_masked_counts, masked_counts
from t5x_like.data.objectives.prompts import PromptFormat, masked_text_format
from t5x_like.data.stream import rng
from t5x_like.data.stream.unpack import UnpackedExample
from t5x_like.data.tokenizers.vocabulary import PAD_ID, TokenTraits, Vocabulary
from t5x_like.utils.type_aliases import FloatArray, IntArray


class BlockDiffusionDenoiser(ObjectiveImplementation[BlockDiffusion]):
    """NumPy half of `BlockDiffusion`. The number of masked tokens is stratified over the rows."""

    stratified = True

    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        words_N = rng.bits(keys_N, random_ops.COUNT, 1)[:, 0]
        return self.denoise_stratified(tokens_NxL, keys_N, words_N, vocabulary, traits)

    def denoise_stratified(
        self,
        tokens_NxL: Tokens,
        keys_N: rng.Keys,
        words_N: rng.Keys,
        vocabulary: Vocabulary,
        traits: TokenTraits | None,
    ) -> Examples:
        length, block = tokens_NxL.shape[1], self.config.block_length
        start_N = rng.below(rng.bits(keys_N, random_ops.CUT, 1)[:, 0], length)
        size_N = np.minimum(block, length - start_N)
        masked_NxB = masks_in_blocks(keys_N, masked_counts(words_N, size_N), size_N, block)
        return mask_blocks(tokens_NxL, start_N, masked_NxB, vocabulary)

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        """Return the window up to the end of the block; the tokens after it are not part of the example."""
        return [*inputs[:-1].tolist(), *targets[1:].tolist()]

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return masked_text_format()

    def observe(
        self, example: UnpackedExample, raw_length: int, vocabulary: Vocabulary, *, first: bool
    ) -> ObservedNoise:
        return ObservedNoise(len(example.targets) - 1, int(example.scored.sum()))

    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        """Compare the number of masked tokens with its uniform distribution on 1..b, b the length of the block."""
        return [fit_of_masked_counts("masked share of the block", observed)]


def masks_in_blocks(keys_N: rng.Keys, counts_N: IntArray, size_N: IntArray, width: int) -> Mask:
    """Return [N, width]: True at a uniform set of `counts_N` of the first `size_N` positions of each row."""
    order_NxB = random_ops.random_order(keys_N, random_ops.CHOICE, size_N, width)
    mask_NxB = np.zeros(order_NxB.shape, np.bool_)
    np.put_along_axis(mask_NxB, order_NxB, np.arange(width) < counts_N[:, None], axis=1)
    return mask_NxB


def mask_blocks(
    tokens_NxL: Tokens,
    start_N: IntArray,
    masked_NxB: Mask,
    vocabulary: Vocabulary,
    total_N: FloatArray | None = None,
) -> Examples:
    """Return examples that predict the masked tokens of a block, given the text before it.

    Args:
      tokens_NxL: The text.
      start_N: Position of the first token of the block, which has at most B tokens and ends with the text.
      masked_NxB: True at the tokens of the block that are masked, at least one in each row, and none beyond the text.
      vocabulary: Vocabulary with the mask token.
      total_N: Sum of the loss weights of each row; None: the number of tokens of its block.

    Raises:
      IndexError: the vocabulary has neither a mask token nor a sentinel, which serves as one.
    """
    rows, length = tokens_NxL.shape
    inputs_NxI = np.full((rows, int(start_N.max()) + 1), PAD_ID, np.int32)
    position_I = np.arange(inputs_NxI.shape[1])
    before_NxI = position_I < start_N[:, None]
    inputs_NxI[before_NxI] = tokens_NxL[:, : len(position_I)][before_NxI]
    # EOS marks the end of the inputs, as in every objective with inputs, so that no row of the encoder is empty.
    inputs_NxI[np.arange(rows), start_N] = vocabulary.eos_id
    at_NxB = start_N[:, None] + np.arange(masked_NxB.shape[1])
    block_NxB = np.take_along_axis(tokens_NxL, np.minimum(at_NxB, length - 1), axis=1)
    block_NxB = np.where(at_NxB < length, block_NxB, PAD_ID).astype(np.int32)
    size_N = np.minimum(masked_NxB.shape[1], length - start_N)

    def after_start(values_NxB: npt.NDArray[Any], value: int) -> npt.NDArray[Any]:
        return np.pad(values_NxB, ((0, 0), (1, 0)), constant_values=value)

    return Examples(
        inputs_NxI,
        # Nothing is predicted where the start token is read.
        after_start(block_NxB, vocabulary.pad_id),
        start_N + 1,
        size_N + 1,
        after_start(masked_NxB, False),
        scored_weight_N=(size_N if total_N is None else total_N) / masked_NxB.sum(axis=1),
        masked_targets_NxT=after_start(np.where(masked_NxB, np.int32(vocabulary.mask_id), block_NxB), PAD_ID),
    )
