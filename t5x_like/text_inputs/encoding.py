"""Texts as rows of ids, laid out as the model was trained or published."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from t5x_like.config import ModelConfig
from t5x_like.config.layouts import StackName
from t5x_like.data.stream.labeled_rows import text_prefix
from t5x_like.model_loading import LoadedModel

Encode = Callable[[Sequence[str], int], list[list[int]]]
"""(texts, maximal length) -> ids of each text with the special tokens around it, truncated to the maximal length."""
LONGEST = 512
"""Tokens to which texts are truncated if neither training nor the model states a number."""


def encode_function(loaded: LoadedModel) -> Encode:
    """Return the function that lays texts out as the model was trained on them: as labelled examples for a run, with
    the tokenizer's own special tokens for a published model."""
    tokenizer, data = loaded.tokenizer, loaded.trained_on
    if data is None:
        return tokenizer.encode_with_special_tokens
    stack: StackName = "decoder" if loaded.model.encoder is None else "encoder"
    mode = None if data.labelled is None else data.labelled.mode
    prefix = text_prefix(tokenizer.vocabulary, stack, mode)

    def encode(texts: Sequence[str], max_length: int) -> list[list[int]]:
        longest = max(max_length - len(prefix) - 1, 0)
        rows = [ids[:longest].tolist() for ids in tokenizer.encode_batch(texts)]
        return [[*prefix, *ids, tokenizer.eos_id][:max_length] for ids in rows]

    return encode


def max_positions(model: ModelConfig) -> int | None:
    """Return the number of learned positions of the stack that reads texts; None if it has no such limit."""
    stack = model.encoder or model.decoder
    return stack.max_positions if stack is not None and stack.positions == "learned" else None
