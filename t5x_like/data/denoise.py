"""Objectives as pure functions of (tokens, keys): a window of raw tokens becomes inputs and targets.

All functions work on N rows of one objective and one length at once. A row's result depends on its tokens and its key
only, never on the rows beside it. Each family of objectives is a module of `data.denoising`; this is their one door.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import (
    Bart,
    BlankInfilling,
    CausalLM,
    CausalMasking,
    FillInTheMiddle,
    MaskedLM,
    Objective,
    PrefixLM,
    SpanCorruption,
)
from t5x_like.data import keys as rng
from t5x_like.data.denoising.bart import add_noise
from t5x_like.data.denoising.examples import Examples, Mask, Tokens
from t5x_like.data.denoising.infilling import (
    fill_blanks,
    fill_in_the_middle,
    mask_causally,
    restore_blanks,
    restore_causal,
    restore_middle,
)
from t5x_like.data.denoising.masking import mask_tokens
from t5x_like.data.denoising.prefix import predict_all, split_at, split_prefix
from t5x_like.data.denoising.spans import corrupt_spans, random_cuts, restore_spans, span_mask
from t5x_like.data.vocabulary import TokenTraits, Vocabulary

__all__ = [
    "Examples",
    "Mask",
    "Tokens",
    "denoise",
    "needs_traits",
    "random_cuts",
    "restore",
    "span_mask",
    "split_at",
]

_DENOISERS: dict[type, Callable[..., Examples]] = {
    SpanCorruption: corrupt_spans,
    PrefixLM: split_prefix,
    CausalLM: predict_all,
    FillInTheMiddle: fill_in_the_middle,
    CausalMasking: mask_causally,
    BlankInfilling: fill_blanks,
}
_DENOISERS_WITH_TRAITS: dict[type, Callable[..., Examples]] = {MaskedLM: mask_tokens, Bart: add_noise}


def needs_traits(objective: Objective) -> bool:
    """Whether `denoise` has to know which pieces begin words and end sentences."""
    if isinstance(objective, MaskedLM):
        return objective.unit != "token"
    return isinstance(objective, Bart) and objective.permute_sentences


def denoise(
    tokens_NxL: npt.NDArray[Any],
    keys_N: rng.Keys,
    objective: Objective,
    vocabulary: Vocabulary,
    traits: TokenTraits | None = None,
) -> Examples:
    """Turns windows of raw tokens into examples of `objective`.

    Args:
      tokens_NxL: Raw ids of text, at least `config.lengths.min_raw_length` per window; none may be the pad id. Where a
        row holds W windows (`config.lengths.windows_per_row`), they stand one after the other, and the examples of row
        n are W n, W n + 1, ... of the N W that are returned.
      keys_N: One key per row.
      objective: The denoiser.
      vocabulary: Ids of sentinels and mode tokens.
      traits: Which pieces begin words and end sentences, for the objectives that need it (`needs_traits`): the
        tokenizer's `traits`.

    Raises:
      IndexError: the window can need more sentinels than the vocabulary has.
      ValueError: rows of several windows that do not have one length, or traits that are needed and missing.
      DataError: whole words are to be masked, and no piece of the vocabulary begins one.
    """
    if traits is None and needs_traits(objective):
        raise ValueError(f"{objective.name}: found no traits of the vocabulary's pieces, expected Tokenizer.traits")
    tokens_NxL = tokens_NxL.astype(np.int32, copy=False)
    if with_traits := _DENOISERS_WITH_TRAITS.get(type(objective)):
        return with_traits(tokens_NxL, keys_N, objective, vocabulary, traits)
    return _DENOISERS[type(objective)](tokens_NxL, keys_N, objective, vocabulary)


def restore(
    inputs: npt.NDArray[Any], targets: npt.NDArray[Any], objective: Objective, vocabulary: Vocabulary
) -> Tokens:
    """The raw window of one example [I], [T]: the inverse of `denoise`, and the definition of its correctness.

    Masked LM and BART have the raw window as targets; of the others, no token is lost between inputs and targets.

    Raises:
      ValueError: inputs and targets do not belong together (a sentinel missing, repeated or out of order).
    """
    if isinstance(objective, MaskedLM):
        return np.trim_zeros(targets, "b").astype(np.int32)
    given = [int(token) for token in np.trim_zeros(inputs, "b")][0 if objective.mode is None else 1 : -1]
    wanted = [int(token) for token in np.trim_zeros(targets, "b")][:-1]
    match objective:
        case SpanCorruption():
            tokens = restore_spans(given, wanted, vocabulary)
        case FillInTheMiddle():
            tokens = restore_middle(wanted, vocabulary)
        case CausalMasking():
            tokens = restore_causal(wanted, vocabulary)
        case BlankInfilling():
            tokens = restore_blanks(given, wanted, vocabulary)
        case Bart():
            tokens = wanted
        case _:
            tokens = given + wanted
    return np.array(tokens, np.int32)
