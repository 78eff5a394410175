"""Masked LM: tokens are masked, replaced or kept, and predicted at their own positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from t5x_like.config.objectives import Layout, MaskedLM
from t5x_like.data.inspection.goodness_of_fit import Fit, multinomial
from t5x_like.data.inspection.noise_distributions import ObservedNoise
from t5x_like.data.objectives import random_ops
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Mask, Tokens
from t5x_like.data.objectives.prompts import PromptFormat, masked_text_format
from t5x_like.data.stream import rng
from t5x_like.data.stream.unpack import UnpackedExample
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary
from t5x_like.errors import DataError
from t5x_like.utils.type_aliases import IntArray


class MaskedLMDenoiser(ObjectiveImplementation[MaskedLM]):
    """NumPy half of `MaskedLM`."""

    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        return mask_tokens(tokens_NxL, keys_N, self.config, vocabulary, traits)

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        return targets.tolist()

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return masked_text_format()

    def observe(
        self, example: UnpackedExample, raw_length: int, vocabulary: Vocabulary, *, first: bool
    ) -> ObservedNoise:
        # In a single stream the last input is never read, so that its noise is not known.
        known = example.scored[: len(example.inputs)]
        inputs, targets = example.inputs[known], example.targets[: len(example.inputs)][known]
        masked, same = int((inputs == vocabulary.mask_id).sum()), int((inputs == targets).sum())
        outcome = (masked, int(known.sum()) - masked - same, same)
        return ObservedNoise(raw_length, int(example.scored.sum()), outcome=outcome)

    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        """Compare the numbers of tokens that were masked, replaced and kept with their probabilities.

        A random piece can equal the token itself, and then counts as kept. With masking unit `span`, the tokens of a
        run are treated alike and are not independent draws, so that the fit has no p-value.
        """
        rates = [self.config.mask_rate, *(rate for _, rate in self.config.mask_rate_schedule)]
        least, most = (
            [dataclasses.replace(self.config, mask_rate=rate).masked_count(one.raw_length) for one in observed]
            for rate in (min(rates), max(rates))
        )
        exact = self.config.masking_unit != "word"
        forbidden = sum(
            one.masked > high or (exact and one.masked < low)
            for one, low, high in zip(observed, least, most, strict=True)
        )
        measured = np.sum([one.outcome for one in observed], axis=0).astype(np.float64)
        other = self.config.replace_with_random * (1 - 1 / max(vocabulary.base_size - vocabulary.first_text_id, 1))
        probabilities = np.array([self.config.replace_with_mask, other, 1 - self.config.replace_with_mask - other])
        labels = ("mask token", "another piece", "kept")
        fit = multinomial("chosen tokens became", labels, measured, probabilities, forbidden)
        return [dataclasses.replace(fit, p_value=None) if self.config.masking_unit == "span" else fit]


def mask_tokens(
    tokens_NxL: Tokens, keys_N: rng.Keys, objective: MaskedLM, vocabulary: Vocabulary, traits: TokenTraits | None
) -> Examples:
    """Return the examples of N windows: by default, 80 % of the chosen tokens become the mask token, 10 % a random
    piece of text, and 10 % are kept. `MaskedLM` describes which tokens are chosen.

    Raises:
      IndexError: the vocabulary has neither a mask token nor a sentinel, which serves as one.
      DataError: whole words are to be masked, and no piece of the vocabulary begins one.
    """
    # Raises IndexError for a vocabulary without mask token and sentinels, before any work is done.
    assert vocabulary.mask_id >= 0
    rows, length = tokens_NxL.shape
    count = objective.masked_count(length)
    fate_NxL: IntArray | None = None
    if objective.masking_unit == "token":
        chosen_NxL = np.zeros((rows, length), np.bool_)
        np.put_along_axis(chosen_NxL, rng.choose(keys_N, random_ops.CHOICE, length, count), True, axis=1)
    else:
        assert traits is not None  # checked by `denoise`
        word_NxL = _words(tokens_NxL, traits, objective.name)
        if objective.masking_unit == "span":
            chosen_NxL, fate_NxL = _choose_runs(word_NxL, keys_N, objective, count)
        else:
            chosen_NxL = _choose_units(word_NxL, keys_N, count, cut=False)
    inputs_NxL = _replace(tokens_NxL, chosen_NxL, fate_NxL, keys_N, objective, vocabulary)
    lengths_N = np.full(rows, length, np.int64)
    return Examples(inputs_NxL, tokens_NxL, lengths_N, lengths_N, chosen_NxL, aligned=True)


def _replace(
    tokens_NxL: Tokens,
    chosen_NxL: Mask,
    fate_NxL: IntArray | None,
    keys_N: rng.Keys,
    objective: MaskedLM,
    vocabulary: Vocabulary,
) -> Tokens:
    """Return the text with mask tokens and random pieces.

    Tokens of a row with the same number in `fate_NxL` are masked, replaced or kept together; None: each token
    independently. Random words are computed for chosen tokens only.
    """
    row_R, position_R = np.nonzero(chosen_NxL)
    number_R = position_R if fate_NxL is None else fate_NxL[row_R, position_R]
    # One draw decides among mask token, random piece and unchanged, so that the three shares add up to 1 (Devlin et al.
    # 2019, section 3.1).
    fate_R = random_ops.as_fraction(rng.bits_at(keys_N[row_R], random_ops.REPLACEMENT, number_R))
    to_mask, to_random = objective.replace_with_mask, objective.replace_with_mask + objective.replace_with_random
    inputs_NxL = tokens_NxL.copy()
    masked_R = np.flatnonzero(fate_R < to_mask)
    inputs_NxL[row_R[masked_R], position_R[masked_R]] = vocabulary.mask_id
    random_R = np.flatnonzero((fate_R >= to_mask) & (fate_R < to_random))
    row_R, position_R = row_R[random_R], position_R[random_R]
    # The words of chosen tokens are addressed by their position. Whether a neighbour is chosen too does not change
    # them.
    words_R = rng.bits_at(keys_N[row_R], random_ops.RANDOM_TOKEN, position_R)
    inputs_NxL[row_R, position_R] = (
        rng.below(words_R, vocabulary.base_size - vocabulary.first_text_id) + vocabulary.first_text_id
    )
    return inputs_NxL


def _words(tokens_NxL: Tokens, traits: TokenTraits, name: str) -> IntArray:
    """Return the word number of each token in its row ([N, L]). The first token of a row always begins a word.

    Raises:
      DataError: no piece of the vocabulary begins a word.
    """
    if not np.delete(traits.word_starts, traits.eos_id).any():
        raise DataError(
            f"{name}: found no piece among {len(traits.word_starts)} that begins a word, expected a tokenizer whose "
            'pieces keep the space before a word; use masking_unit="token" with this tokenizer'
        )
    first_NxL = traits.word_starts[tokens_NxL]
    # A new document begins a word, whatever its first piece.
    first_NxL[:, 1:] |= tokens_NxL[:, :-1] == traits.eos_id
    first_NxL[:, 0] = False
    return np.cumsum(first_NxL, axis=1)


def _choose_runs(word_NxL: IntArray, keys_N: rng.Keys, objective: MaskedLM, count: int) -> tuple[Mask, IntArray]:
    """Return the mask of chosen tokens and the run number of each token (both [N, L]).

    The runs begin at a random word and continue at the start of the window after its end, so that the first words are
    chosen with the same probability as the others.
    """
    length = word_NxL.shape[1]
    # Word numbers increase along a row, so the last one plus 1 is the number of words.
    words_N = word_NxL[:, -1] + 1
    first_N = rng.below(rng.bits(keys_N, random_ops.ROTATION, 1)[:, 0], words_N)
    offset_N = np.argmax(word_NxL == first_N[:, None], axis=1)
    # Words are renumbered from the random first one on, so that numbers increase along the turned row.
    turned_NxL = (random_ops.rotate(word_NxL, offset_N) - first_N[:, None]) % words_N[:, None]
    run_NxL = runs_of_words(turned_NxL, keys_N, objective)
    chosen_NxL = _choose_units(run_NxL, keys_N, count, cut=True)
    # Turn the result back into the order of the text.
    back_N = (length - offset_N) % length
    return random_ops.rotate(chosen_NxL, back_N), random_ops.rotate(run_NxL, back_N)


def runs_of_words(word_NxL: IntArray, keys_N: rng.Keys, objective: MaskedLM) -> IntArray:
    """Return the run number of each token ([N, L]). The lengths of the runs in words are independent and geometric."""
    rows, words = len(word_NxL), int(word_NxL[:, -1].max()) + 1
    stay = 1 - objective.span_end_probability
    # SpanBERT's geometric distribution, truncated at the maximum and normalized (Joshi et al. 2020, section 3.1).
    weights = [stay**k for k in range(objective.max_span_words)]
    probabilities = (0.0, *(weight / sum(weights) for weight in weights))
    # A run has at least one word, so that `words` draws always cover the row. Half as many nearly always do, and then
    # further draws would change nothing.
    count = words // 2 + 1
    ends_NxW = np.cumsum(random_ops.sample_categorical(keys_N, random_ops.LENGTHS, probabilities, count), axis=1)
    if ends_NxW[:, -1].min() < words:
        ends_NxW = np.cumsum(random_ops.sample_categorical(keys_N, random_ops.LENGTHS, probabilities, words), axis=1)
    first_NxW = np.zeros((rows, words + 1), np.int64)
    start_N = np.arange(rows)[:, None] * (words + 1)
    # Runs that end after the last word all write to the extra column, which is not read.
    first_NxW.ravel()[np.minimum(ends_NxW, words) + start_N] = 1
    return np.cumsum(first_NxW, axis=1).ravel().take(word_NxL + start_N)


def _choose_units(unit_NxL: IntArray, keys_N: rng.Keys, count: int, *, cut: bool) -> Mask:
    """Return a mask of at most `count` tokens per row, from units that are taken in random order.

    With `cut`, units are taken until there are `count` tokens. Of the last unit, only its first or its last tokens are
    taken, each with probability 1/2, so that no position within a unit is preferred. Without `cut`, a unit that would
    exceed `count` is skipped; if every unit would, the first one gives its first `count` tokens.
    """
    (rows, length), units = unit_NxL.shape, int(unit_NxL[:, -1].max()) + 1
    # Units of all rows get different numbers, so that one `bincount` measures all of them.
    flat = (unit_NxL + np.arange(rows)[:, None] * units).ravel()
    size_NxU = np.bincount(flat, minlength=rows * units).reshape(rows, units)
    first_NxU = np.cumsum(size_NxU, axis=1) - size_NxU
    # Rows have different numbers of units. Numbers beyond a row's count come last in its order and have size 0.
    order_NxU = random_ops.random_order(keys_N, random_ops.CHOICE, unit_NxL[:, -1] + 1, units)
    size_NxU = np.take_along_axis(size_NxU, order_NxU, axis=1)
    taken_NxU = _until(size_NxU, count) if cut else _fitting(size_NxU, count)

    row_T, index_T = np.nonzero(taken_NxU)
    taken_T = taken_NxU[row_T, index_T]
    start_T = first_NxU[row_T, order_NxU[row_T, index_T]]
    if cut:
        # One draw per row is enough: at most one unit of a row is taken in part, and it moves the start of no other.
        last_ones_N = rng.bits(keys_N, random_ops.FORM, 1)[:, 0] & np.uint64(1) == 1
        start_T += np.where(last_ones_N[row_T], size_NxU[row_T, index_T] - taken_T, 0)
    # +1 where a taken stretch begins, -1 after its end; the cumulative sum is the mask. Stretches can be adjacent,
    # hence -= for the ends, which are set last.
    steps = np.zeros((rows, length + 1), np.int8)
    steps[row_T, start_T] = 1
    steps[row_T, start_T + taken_T] -= 1
    return np.cumsum(steps[:, :-1], axis=1, dtype=np.int8).astype(np.bool_)


def _until(size_NxU: IntArray, count: int) -> IntArray:
    """Return the number of tokens taken of each unit if units are taken until there are `count` tokens."""
    # The unit in which the sum reaches `count` is taken in part; later ones are clipped to 0.
    before_NxU = np.cumsum(size_NxU, axis=1) - size_NxU
    return np.clip(count - before_NxU, 0, size_NxU)


def _fitting(size_NxU: IntArray, count: int) -> IntArray:
    """Return the number of tokens taken of each unit if units that would exceed `count` tokens are skipped."""
    taken_NxU = np.zeros_like(size_NxU)
    open_NxU = size_NxU > 0
    left_N = np.full(len(size_NxU), count)
    while True:
        # A unit that does not fit now never will. Of the others, all before the first that does not fit are taken.
        open_NxU &= size_NxU <= left_N[:, None]
        if not open_NxU.any():
            break
        now_NxU = open_NxU & (np.cumsum(np.where(open_NxU, size_NxU, 0), axis=1) <= left_N[:, None])
        taken_NxU[now_NxU] = size_NxU[now_NxU]
        left_N = count - taken_NxU.sum(axis=1)
        open_NxU &= ~now_NxU
    # Nothing fitted: the first unit of the order is longer than `count`, and its beginning is taken.
    taken_NxU[left_N == count, 0] = count
    return taken_NxU
