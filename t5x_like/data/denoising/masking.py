"""Masked LM: tokens are masked where they stand, and predicted there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from t5x_like.config.errors import DataError
from t5x_like.config.lengths import masked_count
from t5x_like.config.objectives import MaskedLM
from t5x_like.data import keys as rng
from t5x_like.data.denoising import draws
from t5x_like.data.denoising.examples import Examples, Mask, Tokens
from t5x_like.data.vocabulary import EOS_ID, NUM_SPECIAL, TokenTraits, Vocabulary

Integers = npt.NDArray[np.int64]


def mask_tokens(
    tokens_NxL: Tokens, keys_N: rng.Keys, objective: MaskedLM, vocabulary: Vocabulary, traits: TokenTraits | None
) -> Examples:
    """BERT's masking: of the chosen tokens 80 % become the mask token, 10 % a random piece of text, 10 % stay. See
    `MaskedLM` for which are chosen."""
    vocabulary.sentinel_id(0)
    rows, length = tokens_NxL.shape
    count = masked_count(objective, length)
    fate_NxL: Integers | None = None
    if objective.unit == "token":
        chosen_NxL = np.zeros((rows, length), np.bool_)
        np.put_along_axis(chosen_NxL, rng.choose(keys_N, draws.CHOICE, length, count), True, axis=1)
    else:
        assert traits is not None  # `denoise` has seen to it
        word_NxL = _words(tokens_NxL, traits, objective.name)
        if objective.unit == "span":
            chosen_NxL, fate_NxL = _choose_runs(word_NxL, keys_N, objective, count)
        else:
            chosen_NxL = _choose_units(word_NxL, keys_N, count, cut=False)
    inputs_NxL = _replace(tokens_NxL, chosen_NxL, fate_NxL, keys_N, objective, vocabulary)
    lengths_N = np.full(rows, length, np.int64)
    return Examples(inputs_NxL, tokens_NxL, lengths_N, lengths_N, chosen_NxL, aligned=True)


def _replace(
    tokens_NxL: Tokens,
    chosen_NxL: Mask,
    fate_NxL: Integers | None,
    keys_N: rng.Keys,
    objective: MaskedLM,
    vocabulary: Vocabulary,
) -> Tokens:
    """The text with mask tokens and random pieces. Tokens of a row with the same number in `fate_NxL` are masked,
    replaced or kept together; None: each for itself. Random words are made for chosen tokens only."""
    row_R, place_R = np.nonzero(chosen_NxL)
    number_R = place_R if fate_NxL is None else fate_NxL[row_R, place_R]
    fate_R = draws.as_fraction(rng.bits_at(keys_N[row_R], draws.REPLACEMENT, number_R))
    to_mask, to_random = objective.replace_with_mask, objective.replace_with_mask + objective.replace_with_random
    inputs_NxL = tokens_NxL.copy()
    masked_R = np.flatnonzero(fate_R < to_mask)
    inputs_NxL[row_R[masked_R], place_R[masked_R]] = vocabulary.mask_id
    random_R = np.flatnonzero((fate_R >= to_mask) & (fate_R < to_random))
    row_R, place_R = row_R[random_R], place_R[random_R]
    words_R = rng.bits_at(keys_N[row_R], draws.RANDOM_TOKEN, place_R)
    inputs_NxL[row_R, place_R] = rng.below(words_R, vocabulary.base_size - NUM_SPECIAL) + NUM_SPECIAL
    return inputs_NxL


def _words(tokens_NxL: Tokens, traits: TokenTraits, name: str) -> Integers:
    """[N, L]: the number of each token's word in its row. The row's first token begins one, whatever it is."""
    if not traits.word_starts[NUM_SPECIAL:].any():
        raise DataError(
            f"{name}: found no piece of {len(traits.word_starts)} that begins a word, expected a tokenizer whose "
            'pieces keep the space before a word; use unit="token" with this one'
        )
    first_NxL = traits.word_starts[tokens_NxL]
    first_NxL[:, 1:] |= tokens_NxL[:, :-1] == EOS_ID
    first_NxL[:, 0] = False
    return np.cumsum(first_NxL, axis=1)


def _choose_runs(word_NxL: Integers, keys_N: rng.Keys, objective: MaskedLM, count: int) -> tuple[Mask, Integers]:
    """Which tokens are chosen, and the number of each token's run ([N, L] both).

    The runs begin at a random word and go around the window's end, so that its first words are as likely as others.
    """
    length = word_NxL.shape[1]
    words_N = word_NxL[:, -1] + 1
    first_N = rng.below(rng.bits(keys_N, draws.ROTATION, 1)[:, 0], words_N)
    offset_N = np.argmax(word_NxL == first_N[:, None], axis=1)
    turned_NxL = (draws.rotate(word_NxL, offset_N) - first_N[:, None]) % words_N[:, None]
    run_NxL = runs_of_words(turned_NxL, keys_N, objective)
    chosen_NxL = _choose_units(run_NxL, keys_N, count, cut=True)
    back_N = (length - offset_N) % length
    return draws.rotate(chosen_NxL, back_N), draws.rotate(run_NxL, back_N)


def runs_of_words(word_NxL: Integers, keys_N: rng.Keys, objective: MaskedLM) -> Integers:
    """[N, L]: the number of each token's run of words; the runs' lengths in words are independent and geometric."""
    rows, words = len(word_NxL), int(word_NxL[:, -1].max()) + 1
    stay = 1 - objective.span_end_probability
    weights = [stay**k for k in range(objective.max_span_words)]
    law = (0.0, *(weight / sum(weights) for weight in weights))
    # A run has a word at least. Where fewer draws cover all words, as most often, more would change nothing.
    count = words // 2 + 1
    ends_NxW = np.cumsum(draws.sample(keys_N, draws.LENGTHS, law, count), axis=1)
    if ends_NxW[:, -1].min() < words:
        ends_NxW = np.cumsum(draws.sample(keys_N, draws.LENGTHS, law, words), axis=1)
    first_NxW = np.zeros((rows, words + 1), np.int64)
    start_N = np.arange(rows)[:, None] * (words + 1)
    first_NxW.ravel()[np.minimum(ends_NxW, words) + start_N] = 1
    return np.cumsum(first_NxW, axis=1).ravel().take(word_NxL + start_N)


def _choose_units(unit_NxL: Integers, keys_N: rng.Keys, count: int, *, cut: bool) -> Mask:
    """Units in random order, at most `count` tokens of each row.

    With `cut`, they are taken until there are `count` tokens, of the last unit only its first ones or its last ones,
    which no place of a unit is the likelier for. Without, a unit that would exceed `count` is left out; if all would,
    the first gives its first `count` tokens.
    """
    (rows, length), units = unit_NxL.shape, int(unit_NxL[:, -1].max()) + 1
    flat = (unit_NxL + np.arange(rows)[:, None] * units).ravel()
    size_NxU = np.bincount(flat, minlength=rows * units).reshape(rows, units)
    first_NxU = np.cumsum(size_NxU, axis=1) - size_NxU
    order_NxU = draws.random_order(keys_N, draws.CHOICE, unit_NxL[:, -1] + 1, units)
    size_NxU = np.take_along_axis(size_NxU, order_NxU, axis=1)
    taken_NxU = _until(size_NxU, count) if cut else _fitting(size_NxU, count)

    row_T, place_T = np.nonzero(taken_NxU)
    taken_T = taken_NxU[row_T, place_T]
    start_T = first_NxU[row_T, order_NxU[row_T, place_T]]
    if cut:
        last_ones_N = rng.bits(keys_N, draws.FORM, 1)[:, 0] & np.uint64(1) == 1
        start_T += np.where(last_ones_N[row_T], size_NxU[row_T, place_T] - taken_T, 0)
    steps = np.zeros((rows, length + 1), np.int8)
    steps[row_T, start_T] = 1
    steps[row_T, start_T + taken_T] -= 1
    return np.cumsum(steps[:, :-1], axis=1, dtype=np.int8).astype(np.bool_)


def _until(size_NxU: Integers, count: int) -> Integers:
    """Tokens taken of each unit where the units are taken until there are `count` tokens."""
    before_NxU = np.cumsum(size_NxU, axis=1) - size_NxU
    return np.clip(count - before_NxU, 0, size_NxU)


def _fitting(size_NxU: Integers, count: int) -> Integers:
    """Tokens taken of each unit where only units are taken that leave no more than `count` tokens."""
    taken_NxU = np.zeros_like(size_NxU)
    open_NxU = size_NxU > 0
    left_N = np.full(len(size_NxU), count)
    while True:
        # What does not fit now never will; of the others, those up to the first that does not fit are taken.
        open_NxU &= size_NxU <= left_N[:, None]
        if not open_NxU.any():
            break
        now_NxU = open_NxU & (np.cumsum(np.where(open_NxU, size_NxU, 0), axis=1) <= left_N[:, None])
        taken_NxU[now_NxU] = size_NxU[now_NxU]
        left_N = count - taken_NxU.sum(axis=1)
        open_NxU &= ~now_NxU
    taken_NxU[left_N == count, 0] = count
    return taken_NxU
