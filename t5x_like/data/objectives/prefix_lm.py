"""Prefix LM: the text is cut once, into inputs and targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import Layout, PrefixLM
from t5x_like.data.inspection.goodness_of_fit import Fit, compare
from t5x_like.data.inspection.noise_distributions import MIN_EXPECTED_COUNT, ObservedNoise
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Tokens, scored_part
from t5x_like.data.objectives.prompts import PromptFormat
from t5x_like.data.objectives.random_ops import CUT
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.vocabulary import PAD_ID, TokenTraits, Vocabulary

_MAX_FRACTION_BINS = 20


class PrefixLMDenoiser(ObjectiveImplementation[PrefixLM]):
    """NumPy half of `PrefixLM`."""

    prompt_preference = 1
    continues_text = True

    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        return split_prefix(tokens_NxL, keys_N, self.config, vocabulary)

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        given, predicted = self._text_ids(inputs, targets)
        return given + predicted

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return self._default_prompt_format(layout, sentinels=False)

    def continuation(self, tokens_NxL: Tokens, vocabulary: Vocabulary) -> tuple[Examples, int]:
        """Cut the windows as close to the middle as the distribution of cuts allows.

        A model that never produced targets of half a window would expect EOS.
        """
        rows, length = tokens_NxL.shape
        min_targets, max_targets = self.config.target_range(length)
        # Half of the window is scored, or the nearest number of targets that training can draw.
        num_given = length - min(max(length // 2, min_targets), max_targets)
        examples = split_at(tokens_NxL.astype(np.int32), np.full(rows, num_given, np.int64), self.config, vocabulary)
        return scored_part(examples, 0, length - num_given), num_given

    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        """Compare the target fractions, in bins of equal width, with their uniform distribution.

        The second window of a pair is omitted, since its cut is a function of the first one's.
        """
        low, high = self.config.min_target_fraction, self.config.max_target_fraction
        counted = [one for one in observed if one.first or self.config.windows_per_row == 1]
        bins = max(min(_MAX_FRACTION_BINS, int(len(counted) / (2 * MIN_EXPECTED_COUNT))), 1)
        width = max(high - low, 1e-9) / bins
        measured, expected, covariance = np.zeros(bins), np.zeros(bins), np.zeros((bins, bins))
        forbidden = 0

        def bin_of(targets: npt.NDArray[Any], length: int) -> npt.NDArray[np.int64]:
            return np.clip(((targets / length - low) / width + 1e-9).astype(np.int64), 0, bins - 1)

        by_length: dict[int, list[int]] = {}
        for one in counted:
            by_length.setdefault(one.raw_length, []).append(one.masked)
        for length, targets in by_length.items():
            fewest, most = self.config.target_range(length)
            allowed = np.array([count for count in targets if fewest <= count <= most], np.int64)
            forbidden += len(targets) - len(allowed)
            measured += np.bincount(bin_of(allowed, length), minlength=bins)
            # Cuts are whole tokens, so the share of a bin is counted from the possible cuts and not taken as 1 / bins.
            share = np.bincount(bin_of(np.arange(fewest, most + 1), length), minlength=bins) / (most - fewest + 1)
            expected += len(allowed) * share
            covariance += len(allowed) * (np.diag(share) - np.outer(share, share))
        edges = low + width * np.arange(bins + 1)
        labels = tuple(f"{100 * a:.0f}–{100 * b:.0f} %" for a, b in zip(edges[:-1], edges[1:], strict=True))
        return [compare("target fraction", labels, measured, expected, covariance, forbidden)]


def split_prefix(tokens_NxL: Tokens, keys_N: rng.Keys, objective: PrefixLM, vocabulary: Vocabulary) -> Examples:
    """Return the examples of N rows, with one cut per window.

    In a pair, the second window has as many more target tokens as the first one has fewer.

    Raises:
      ValueError: rows of a length that is not a multiple of the windows per row.
    """
    windows = objective.windows_per_row
    rows, width = tokens_NxL.shape
    if width % windows:
        raise ValueError(f"{objective.name}: found rows of {width} tokens, expected {windows} windows of equal length")
    length = width // windows
    fewest, most = objective.target_range(length)
    suffix_NxW = np.empty((rows, windows), np.int64)
    suffix_NxW[:, 0] = fewest + rng.below(rng.bits(keys_N, CUT, 1)[:, 0], most - fewest + 1)
    if windows == 2:
        # The sum over the pair is constant, so rows of pairs have a fixed length, and the second count has the same
        # uniform distribution as the first.
        suffix_NxW[:, 1] = fewest + most - suffix_NxW[:, 0]
    return split_at(tokens_NxL.reshape(rows * windows, length), length - suffix_NxW.ravel(), objective, vocabulary)


def split_at(
    tokens_NxL: Tokens, prefix_N: npt.NDArray[np.int64], objective: PrefixLM, vocabulary: Vocabulary
) -> Examples:
    """Return the prefix-LM examples whose inputs are the first `prefix_N` raw tokens of each window."""
    rows, length = tokens_NxL.shape
    mode = objective.mode_tokens
    in_prefix_NxL = np.arange(length) < prefix_N[:, None]

    inputs_NxI = np.full((rows, mode + int(prefix_N.max()) + 1), PAD_ID, np.int32)
    if objective.mode is not None:
        inputs_NxI[:, 0] = vocabulary.mode_id(objective.mode)
    # Boolean masks of both sides list the same tokens in the same order, row by row.
    position_I = np.arange(inputs_NxI.shape[1])
    inputs_NxI[(position_I >= mode) & (position_I < mode + prefix_N[:, None])] = tokens_NxL[in_prefix_NxL]
    # EOS after the prefix marks the end of the inputs, as in every objective with inputs; prompts end in it too.
    inputs_NxI[np.arange(rows), mode + prefix_N] = vocabulary.eos_id

    suffix_N = length - prefix_N
    targets_NxT = np.full((rows, int(suffix_N.max()) + 1), PAD_ID, np.int32)
    targets_NxT[np.arange(targets_NxT.shape[1]) < suffix_N[:, None]] = tokens_NxL[~in_prefix_NxL]
    targets_NxT[np.arange(rows), suffix_N] = vocabulary.eos_id
    return Examples(inputs_NxI, targets_NxT, mode + prefix_N + 1, suffix_N + 1)
