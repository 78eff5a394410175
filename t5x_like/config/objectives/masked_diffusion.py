"""Masked diffusion: a uniformly drawn number of tokens is masked, and the loss bounds the likelihood of the text."""

from __future__ import annotations

from typing import ClassVar, Literal

from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.objectives.base import ExampleLengths, ObjectiveConfig


@config_dataclass
class MaskedDiffusion(ObjectiveConfig):
    """Masked (absorbing) diffusion language model, in the form with an exact number of masked tokens.

    Of a window of n tokens, k become the mask token, k uniform on 1..n, uniformly over all sets of that size. The
    masked tokens are predicted, each with the loss weight n / k. The weights of a window sum to n, so that the mean
    loss per weight is the mean cross-entropy of the masked tokens. Its expectation is at least -log p(window) / n,
    where p is the mean over all orders of the model that generates one token after the other in that order (Uria et al.
    2014, Hoogeboom et al. 2022): the loss is an upper bound of the negative log-likelihood per token.

    An encoder predicts each masked token at its own position (MDLM, LLaDA). A decoder with a bidirectional prefix
    predicts it one position earlier, as the next token (Dream), so that a causal LM can be continued with this
    objective.

    In windows of one objective, k is stratified over the rows of the stream (`data.stream.rng.stratified`): of each
    2^m rows whose index begins at a multiple of 2^m, one draws k from each of 2^m equal parts of the range. Rows of
    packed documents, and rows that share their index with other objectives, draw it independently or nearly so.
    """

    has_inputs: ClassVar[bool] = True
    predicts_in_place: ClassVar[bool] = True
    targets_are_text: ClassVar[bool] = True
    fractional_loss_weights: ClassVar[bool] = True

    kind: Literal["masked_diffusion"] = "masked_diffusion"
    name: str = "masked_diffusion"
    rate: float = 1.0
    mode: None = None

    @property
    def description(self) -> str:
        return "masked diffusion"

    @property
    def min_raw_length(self) -> int:
        return 1

    def longest_example(self, raw_length: int) -> ExampleLengths:
        return ExampleLengths(raw_length, raw_length, raw_length)

    def sentinels_needed(self, raw_length: int) -> int:
        return 1

    def expected_loss_tokens(self, raw_length: int) -> float:
        """Return the mean number of masked tokens. Their loss weights sum to `raw_length`, however many they are."""
        return (raw_length + 1) / 2
