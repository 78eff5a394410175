"""BART's five noises, composed."""

from __future__ import annotations

import numpy as np

from t5x_like.config.lengths import bart_counts, longest, max_infill_draws, poisson
from t5x_like.config.objectives import Bart
from t5x_like.data import keys as rng
from t5x_like.data.denoising import draws
from t5x_like.data.denoising.examples import Examples, Mask, Tokens, concatenate
from t5x_like.data.vocabulary import EOS_ID, PAD_ID, TokenTraits, Vocabulary


def add_noise(
    tokens_NxL: Tokens, keys_N: rng.Keys, objective: Bart, vocabulary: Vocabulary, traits: TokenTraits | None
) -> Examples:
    """The raw window as targets, what the noises leave of it as inputs; see `Bart` for the law."""
    rows, length = tokens_NxL.shape
    text_NxL = tokens_NxL
    if objective.permute_sentences:
        assert traits is not None  # `denoise` has seen to it
        text_NxL = permute_sentences(text_NxL, keys_N, traits)
    if objective.rotate_document:
        text_NxL = draws.rotate(text_NxL, rng.below(rng.bits(keys_N, draws.DOCUMENT, 1)[:, 0], length))

    gone_NxL, masks_NxL, mask_before_NxL = _noise(keys_N, objective, length)
    if objective.infill_rate > 0 or objective.mask_rate > 0:
        text_NxL = np.where(masks_NxL, np.int32(vocabulary.sentinel_id(0)), text_NxL)
    # Two cells for each token: a mask token inserted before it, and the token or the mask token in its place.
    mode = 0 if objective.mode is None else 1
    cells = np.empty((rows, length, 2), np.int32)
    cells[:, :, 0], cells[:, :, 1] = vocabulary.mask_id if vocabulary.num_sentinels else PAD_ID, text_NxL
    kept = np.stack([mask_before_NxL, ~gone_NxL], axis=2).reshape(rows, -1)
    kept_N = kept.sum(axis=1)

    width = longest(objective, length).inputs
    inputs_NxI = np.full((rows, width), PAD_ID, np.int32)
    if objective.mode is not None:
        inputs_NxI[:, 0] = vocabulary.mode_id(objective.mode)
    places_I = np.arange(width)
    inputs_NxI[(places_I >= mode) & (places_I < mode + kept_N[:, None])] = cells.ravel().take(np.flatnonzero(kept))
    inputs_NxI[np.arange(rows), mode + kept_N] = EOS_ID
    targets_NxT = np.concatenate([tokens_NxL, np.full((rows, 1), EOS_ID, np.int32)], axis=1)
    return Examples(inputs_NxI, targets_NxT, mode + kept_N + 1, np.full(rows, length + 1, np.int64))


def permute_sentences(tokens_NxL: Tokens, keys_N: rng.Keys, traits: TokenTraits) -> Tokens:
    """Each row's sentences in random order: every permutation with the same probability. What follows the last end of
    a sentence counts as one, and so does the part of a sentence that the row begins with."""
    rows, length = tokens_NxL.shape
    last_NxL = traits.sentence_ends[tokens_NxL]
    last_NxL[:, -1] = True
    row_S, end_S = np.nonzero(last_NxL)
    count_N = np.bincount(row_S, minlength=rows)
    most = int(count_N.max())
    ends_NxM = np.full((rows, most), length, np.int64)
    ends_NxM[row_S, np.arange(len(row_S)) - np.repeat(np.cumsum(count_N) - count_N, count_N)] = end_S + 1
    starts_NxM = np.zeros_like(ends_NxM)
    starts_NxM[:, 1:] = ends_NxM[:, :-1]
    order_NxM = draws.random_order(keys_N, draws.SENTENCES, count_N, most)
    lengths_NxM = np.take_along_axis(ends_NxM - starts_NxM, order_NxM, axis=1)
    return concatenate(tokens_NxL, np.take_along_axis(starts_NxM, order_NxM, axis=1), lengths_NxM, length)[0]


def _noise(keys_N: rng.Keys, objective: Bart, length: int) -> tuple[Mask, Mask, Mask]:
    """Three masks [N, length]: tokens that leave no cell, tokens that become a mask token, tokens before which one is
    inserted. A span's mask token stands where its first token was."""
    infilled, deleted, masked = bart_counts(objective, length)
    rows = len(keys_N)
    covered_NxL, inserted_NxL, starts_NxL = np.zeros((3, rows, length), np.bool_)
    if infilled:
        law = poisson(objective.mean_span_length)
        most = max_infill_draws(objective, length)
        drawn = draws.lengths_until(keys_N, draws.LENGTHS, law, infilled, most)
        covered_NxL, inserted_NxL = draws.place_on_circle(keys_N, *drawn, length)
        starts_NxL = covered_NxL.copy()
        starts_NxL[:, 1:] &= ~covered_NxL[:, :-1]
    gone_NxL, masks_NxL = covered_NxL & ~starts_NxL, starts_NxL
    if deleted or masked:
        words_NxL = rng.bits(keys_N, draws.SINGLES, length) >> np.uint64(1)
        words_NxL[covered_NxL] = np.iinfo(np.uint64).max
        order_NxK = np.argsort(words_NxL, axis=1)[:, : deleted + masked]
        singles = np.zeros((2, rows, length), np.bool_)
        np.put_along_axis(singles[0], order_NxK[:, :deleted], True, axis=1)
        np.put_along_axis(singles[1], order_NxK[:, deleted:], True, axis=1)
        gone_NxL, masks_NxL = gone_NxL | singles[0], masks_NxL | singles[1]
    return gone_NxL, masks_NxL, inserted_NxL
