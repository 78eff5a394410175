"""Masked diffusion: a uniformly drawn number of tokens is masked and predicted at their own positions."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import Layout, MaskedDiffusion
from t5x_like.data.inspection.goodness_of_fit import Fit, compare
from t5x_like.data.inspection.noise_distributions import ObservedNoise
from t5x_like.data.objectives import random_ops
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Mask, Tokens
from t5x_like.data.objectives.prompts import PromptFormat, masked_text_format
from t5x_like.data.stream import rng
from t5x_like.data.stream.unpack import UnpackedExample
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary
from t5x_like.utils.type_aliases import IntArray

_BINS = 10


class MaskedDiffusionDenoiser(ObjectiveImplementation[MaskedDiffusion]):
    """NumPy half of `MaskedDiffusion`."""

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
        counts_N = masked_counts(words_N, tokens_NxL.shape[1])
        return mask_positions(tokens_NxL, random_masks(keys_N, counts_N, tokens_NxL.shape[1]), vocabulary)

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        return targets.tolist()

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return masked_text_format()

    def observe(
        self, example: UnpackedExample, raw_length: int, vocabulary: Vocabulary, *, first: bool
    ) -> ObservedNoise:
        return ObservedNoise(raw_length, int(example.scored.sum()))

    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        """Compare the number of masked tokens with its uniform distribution, in ten bins of the share of the window.

        Stratified rows fit better than independent draws would, so that the p-value is then near 1.
        """
        return [fit_of_masked_counts("masked share of the window", observed)]


def fit_of_masked_counts(subject: str, observed: Sequence[ObservedNoise]) -> Fit:
    """Return the fit of the numbers of masked tokens to the uniform distribution on 1..`raw_length` of each."""
    measured, expected = np.zeros(_BINS), np.zeros(_BINS)
    covariance = np.zeros((_BINS, _BINS))
    possible = [one for one in observed if 1 <= one.masked <= one.raw_length]
    forbidden = len(observed) - len(possible)
    for length, number in collections.Counter(one.raw_length for one in possible).items():
        probabilities = np.bincount(np.arange(length) * _BINS // length, minlength=_BINS) / length
        expected += number * probabilities
        covariance += number * (np.diag(probabilities) - np.outer(probabilities, probabilities))
    for one in possible:
        measured[(one.masked - 1) * _BINS // one.raw_length] += 1
    width = 100 // _BINS
    labels = tuple(f"{width * index}–{width * (index + 1)} %" for index in range(_BINS))
    return compare(subject, labels, measured, expected, covariance, forbidden)


def masked_counts(words_N: rng.Keys, length: int | IntArray) -> IntArray:
    """Return the numbers of masked tokens [N], in 1..length, from random words; increasing in the word.

    `length` is one number, or one for each row.
    """
    return (random_ops.as_fraction(words_N) * length).astype(np.int64) + 1


def random_masks(keys_N: rng.Keys, counts_N: IntArray, length: int) -> Mask:
    """Return [N, length]: True at a uniform set of `counts_N` positions of each row.

    The sets of one key for different counts contain each other.
    """
    order_NxL = random_ops.random_subset(keys_N, random_ops.CHOICE, length, length)
    mask_NxL = np.zeros(order_NxL.shape, np.bool_)
    np.put_along_axis(mask_NxL, order_NxL, np.arange(length) < counts_N[:, None], axis=1)
    return mask_NxL


def mask_positions(
    tokens_NxL: Tokens, masked_NxL: Mask, vocabulary: Vocabulary, total_N: npt.NDArray[Any] | None = None
) -> Examples:
    """Return examples in which the given positions are masked and scored.

    Args:
      tokens_NxL, masked_NxL: Tokens, and True at those that are masked, at least one in each row.
      vocabulary: Vocabulary with the mask token.
      total_N: Sum of the loss weights of each row; None: the number of its tokens.

    Raises:
      IndexError: the vocabulary has neither a mask token nor a sentinel, which serves as one.
    """
    rows, length = tokens_NxL.shape
    lengths_N = np.full(rows, length, np.int64)
    weight_N = (lengths_N if total_N is None else total_N) / masked_NxL.sum(axis=1)
    inputs_NxL = np.where(masked_NxL, np.int32(vocabulary.mask_id), tokens_NxL)
    return Examples(inputs_NxL, tokens_NxL, lengths_N, lengths_N, masked_NxL, aligned=True, scored_weight_N=weight_N)
