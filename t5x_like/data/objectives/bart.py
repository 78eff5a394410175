"""BART's denoising: the composition of its five noises."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from t5x_like.config.objectives import BartDenoising, Layout
from t5x_like.config.objectives.span_lengths import poisson
from t5x_like.data.inspection.goodness_of_fit import Fit
from t5x_like.data.inspection.noise_distributions import ObservedNoise
from t5x_like.data.objectives import random_ops
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Mask, Tokens, concatenate
from t5x_like.data.objectives.prompts import PromptFormat, WholeText
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.vocabulary import PAD_ID, TokenTraits, Vocabulary


class BartDenoiser(ObjectiveImplementation[BartDenoising]):
    """NumPy half of `BartDenoising`."""

    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        return add_noise(tokens_NxL, keys_N, self.config, vocabulary, traits)

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        return targets[:-1].tolist()

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return self._default_prompt_format(layout, sentinels=False, infill=WholeText())

    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        """Return no fits: the composition of the noises has no known distribution of an observable quantity."""
        return []


def add_noise(
    tokens_NxL: Tokens, keys_N: rng.Keys, objective: BartDenoising, vocabulary: Vocabulary, traits: TokenTraits | None
) -> Examples:
    """Return examples with the raw window as targets and the window after the noises of `BartDenoising` as inputs."""
    rows, length = tokens_NxL.shape
    text_NxL = tokens_NxL
    # Order of the noises as `BartDenoising` states it: sentences and rotation move whole text, and spans are placed on
    # the moved text.
    if objective.permute_sentences:
        assert traits is not None  # checked by `denoise`
        text_NxL = permute_sentences(text_NxL, keys_N, traits)
    if objective.rotate_document:
        text_NxL = random_ops.rotate(text_NxL, rng.below(rng.bits(keys_N, random_ops.DOCUMENT, 1)[:, 0], length))

    gone_NxL, masks_NxL, mask_before_NxL = _noise(keys_N, objective, length)
    if objective.infill_rate > 0 or objective.mask_rate > 0:
        text_NxL = np.where(masks_NxL, np.int32(vocabulary.mask_id), text_NxL)
    # Two slots per token: a mask token that is inserted before it, and the token itself or its mask token. `kept` then
    # selects the slots that remain.
    mode = objective.mode_tokens
    # Deletion alone needs no mask token; its slots then hold a pad id that `kept` never selects.
    has_mask = vocabulary.own_mask_id is not None or vocabulary.num_sentinels > 0
    mask_id = vocabulary.mask_id if has_mask else PAD_ID
    slots = np.empty((rows, length, 2), np.int32)
    slots[:, :, 0], slots[:, :, 1] = mask_id, text_NxL
    kept = np.stack([mask_before_NxL, ~gone_NxL], axis=2).reshape(rows, -1)
    kept_N = kept.sum(axis=1)

    width = objective.longest_example(length).inputs
    inputs_NxI = np.full((rows, width), PAD_ID, np.int32)
    if objective.mode is not None:
        inputs_NxI[:, 0] = vocabulary.mode_id(objective.mode)
    positions_I = np.arange(width)
    # Both sides run through the rows in the same order, and row n has kept_N[n] places on either side.
    inputs_NxI[(positions_I >= mode) & (positions_I < mode + kept_N[:, None])] = slots.ravel().take(
        np.flatnonzero(kept)
    )
    inputs_NxI[np.arange(rows), mode + kept_N] = vocabulary.eos_id
    targets_NxT = np.concatenate([tokens_NxL, np.full((rows, 1), vocabulary.eos_id, np.int32)], axis=1)
    return Examples(inputs_NxI, targets_NxT, mode + kept_N + 1, np.full(rows, length + 1, np.int64))


def permute_sentences(tokens_NxL: Tokens, keys_N: rng.Keys, traits: TokenTraits) -> Tokens:
    """Return each row with its sentences in random order, every permutation with the same probability.

    The tokens after the last end of a sentence count as a sentence, and so does the part of a sentence that the row
    begins with.
    """
    rows, length = tokens_NxL.shape
    # Indexing by an array copies, so `last_NxL` can be changed.
    last_NxL = traits.sentence_ends[tokens_NxL]
    # The rest of a row after its last sentence end is a sentence.
    last_NxL[:, -1] = True
    row_S, end_S = np.nonzero(last_NxL)
    count_N = np.bincount(row_S, minlength=rows)
    most = int(count_N.max())
    ends_NxM = np.full((rows, most), length, np.int64)
    ends_NxM[row_S, np.arange(len(row_S)) - np.repeat(np.cumsum(count_N) - count_N, count_N)] = end_S + 1
    starts_NxM = np.zeros_like(ends_NxM)
    # Absent sentences begin and end at the end of the row: they have length 0.
    starts_NxM[:, 1:] = ends_NxM[:, :-1]
    order_NxM = random_ops.random_order(keys_N, random_ops.SENTENCES, count_N, most)
    lengths_NxM = np.take_along_axis(ends_NxM - starts_NxM, order_NxM, axis=1)
    return concatenate(tokens_NxL, np.take_along_axis(starts_NxM, order_NxM, axis=1), lengths_NxM, length)[0]


def _noise(keys_N: rng.Keys, objective: BartDenoising, length: int) -> tuple[Mask, Mask, Mask]:
    """Return three masks [N, length]: removed tokens, tokens that become a mask token, tokens before which a mask token
    is inserted. The mask token of a span takes the position of its first token."""
    infilled, deleted, masked = objective.noise_counts(length)
    rows = len(keys_N)
    covered_NxL, inserted_NxL, starts_NxL = np.zeros((3, rows, length), np.bool_)
    if infilled:
        distribution = poisson(objective.mean_span_length)
        most = objective.max_infill_draws(length)
        drawn = random_ops.span_lengths_with_total(keys_N, random_ops.LENGTHS, distribution, infilled, most)
        # A span of length 0 covers nothing and inserts a mask token (Lewis et al. 2020, text infilling).
        covered_NxL, inserted_NxL = random_ops.place_spans_cyclic(keys_N, *drawn, length)
        starts_NxL = covered_NxL.copy()
        starts_NxL[:, 1:] &= ~covered_NxL[:, :-1]
    # A whole span becomes one mask token, so that the model also learns how many tokens are missing. Spans that are
    # adjacent on the ring were placed apart by at least one token.
    gone_NxL, masks_NxL = covered_NxL & ~starts_NxL, starts_NxL
    if deleted or masked:
        # The uncovered tokens in random order: covered ones get the largest sort key, so that they come last.
        # The shift leaves the largest word to covered tokens alone, which therefore never tie with an uncovered one.
        words_NxL = rng.bits(keys_N, random_ops.SINGLES, length) >> np.uint64(1)
        words_NxL[covered_NxL] = np.iinfo(np.uint64).max
        order_NxK = np.argsort(words_NxL, axis=1)[:, : deleted + masked]
        singles = np.zeros((2, rows, length), np.bool_)
        np.put_along_axis(singles[0], order_NxK[:, :deleted], True, axis=1)
        np.put_along_axis(singles[1], order_NxK[:, deleted:], True, axis=1)
        gone_NxL, masks_NxL = gone_NxL | singles[0], masks_NxL | singles[1]
    return gone_NxL, masks_NxL, inserted_NxL
