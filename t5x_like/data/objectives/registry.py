"""Denoising and its inverse, as pure functions of (tokens, keys, objective).

All functions process N rows of one objective and one length at once. The result of a row depends on its tokens and its
key only, never on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import Objective
from t5x_like.config.objectives.registry import implementation_class
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Tokens
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary
from t5x_like.utils.type_aliases import IntArray


def implementation(objective: Objective) -> ObjectiveImplementation[Any]:
    """Return the NumPy half of an objective.

    Raises:
      ConfigError: the objective is not registered, or its implementation lacks a part.
    """
    return implementation_class(objective.kind)(objective)


def denoise(
    tokens_NxL: npt.NDArray[Any],
    keys_N: rng.Keys,
    objective: Objective,
    vocabulary: Vocabulary,
    traits: TokenTraits | None = None,
    words_N: rng.Keys | None = None,
) -> Examples:
    """Turn windows of raw tokens into examples of `objective`.

    Args:
      tokens_NxL: Raw token ids of text, at least `objective.min_raw_length` per window; none may be the pad id. If a
        row holds W windows (`objective.windows_per_row`), they follow each other, and the examples of row n are W n,
        W n + 1, ... of the N W examples that are returned.
      keys_N: One key per row.
      objective: The denoiser.
      vocabulary: Ids of sentinels and mode tokens.
      traits: Pieces that begin words and end sentences (`Tokenizer.traits`), for objectives with `needs_token_traits`.
      words_N: A word of `rng.stratified` per row, for objectives whose noise is stratified over rows; None: the noise
        of each row is drawn from its key alone.

    Raises:
      IndexError: the window can need more sentinels than the vocabulary has.
      ValueError: windows that are shorter than `objective.min_raw_length`, or several windows per row that do not have
        one length; missing traits that the objective needs; an objective whose examples are not made from text; or
        loss weights of an objective without `fractional_loss_weights`.
      DataError: whole words are to be masked, and no piece of the vocabulary begins one.
    """
    if traits is None and objective.needs_token_traits:
        raise ValueError(f"{objective.name}: found no traits of the vocabulary's pieces, expected Tokenizer.traits")
    # Checked here once, so that no implementation has to handle windows too short for its noise.
    length = tokens_NxL.shape[1] // objective.windows_per_row
    if length < objective.min_raw_length:
        expected = f"expected {objective.min_raw_length} or more"
        raise ValueError(f"{objective.name}: found windows of {length} tokens, {expected}")
    tokens_NxL = tokens_NxL.astype(np.int32, copy=False)
    made = implementation(objective)
    if words_N is not None and made.stratified:
        examples = made.denoise_stratified(tokens_NxL, keys_N, words_N, vocabulary, traits)
    else:
        examples = made.denoise(tokens_NxL, keys_N, vocabulary, traits)
    if examples.scored_weight_N is not None and not objective.fractional_loss_weights:
        # Rows would have loss weights of type int32, which cut fractions off.
        raise ValueError(
            f"{objective.name}: found loss weights in the examples, expected none; "
            f"set fractional_loss_weights = True in {type(objective).__name__}"
        )
    return examples


def by_step(objective: Objective, index_n: IntArray, step_N: IntArray) -> Iterator[tuple[Objective, IntArray]]:
    """Yield groups of the rows `index_n` with the objective whose noise they have, by the step that reads them.

    There is one group unless the objective `changes_with_steps`, and none without rows.
    """
    if not objective.changes_with_steps:
        if index_n.size:
            yield objective, index_n
        return
    step_n = step_N[index_n]
    for step in np.unique(step_n).tolist():
        yield objective.at_step(step), index_n[step_n == step]


def restore(
    inputs: npt.NDArray[Any], targets: npt.NDArray[Any], objective: Objective, vocabulary: Vocabulary
) -> Tokens:
    """Return the raw window of one example: the inverse of `denoise`, and the definition of its correctness.

    Masked LM and BART have the raw window as targets. In the other objectives, every token of the window is in the
    inputs or in the targets.

    Args:
      inputs, targets: The example without padding, [I] and [T]. Padding is not removed here, because its id can be that
        of a token of the text or of EOS.
      objective, vocabulary: See `denoise`.

    Raises:
      ValueError: inputs and targets do not belong together (a sentinel missing, repeated or out of order).
    """
    inputs, targets = inputs.astype(np.int32, copy=False), targets.astype(np.int32, copy=False)
    return np.array(implementation(objective).restore(inputs, targets, vocabulary), np.int32)
