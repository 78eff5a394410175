"""Prefix LM and causal LM: the text as it is, cut once or not at all."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from t5x_like.config.lengths import prefix_target_range, windows_per_row
from t5x_like.config.objectives import CausalLM, PrefixLM
from t5x_like.data import keys as rng
from t5x_like.data.denoising.draws import CUT
from t5x_like.data.denoising.examples import Examples, Tokens
from t5x_like.data.vocabulary import EOS_ID, PAD_ID, Vocabulary


def split_prefix(tokens_NxL: Tokens, keys_N: rng.Keys, objective: PrefixLM, vocabulary: Vocabulary) -> Examples:
    """One cut per window; of a pair, the second window has as many targets more as the first has fewer."""
    windows = windows_per_row(objective)
    rows, width = tokens_NxL.shape
    if width % windows:
        raise ValueError(f"{objective.name}: found rows of {width} tokens, expected {windows} windows of equal length")
    length = width // windows
    fewest, most = prefix_target_range(objective, length)
    wanted_NxW = np.empty((rows, windows), np.int64)
    wanted_NxW[:, 0] = fewest + rng.below(rng.bits(keys_N, CUT, 1)[:, 0], most - fewest + 1)
    if windows == 2:
        wanted_NxW[:, 1] = fewest + most - wanted_NxW[:, 0]
    return split_at(tokens_NxL.reshape(rows * windows, length), length - wanted_NxW.ravel(), objective, vocabulary)


def split_at(
    tokens_NxL: Tokens, given_N: npt.NDArray[np.int64], objective: PrefixLM, vocabulary: Vocabulary
) -> Examples:
    """The prefix-LM example of which the first `given_N` raw tokens are the inputs."""
    rows, length = tokens_NxL.shape
    mode = 0 if objective.mode is None else 1
    places_L = np.arange(length)
    given_NxL = places_L < given_N[:, None]

    inputs_NxI = np.full((rows, mode + int(given_N.max()) + 1), PAD_ID, np.int32)
    if objective.mode is not None:
        inputs_NxI[:, 0] = vocabulary.mode_id(objective.mode)
    places_I = np.arange(inputs_NxI.shape[1])
    inputs_NxI[(places_I >= mode) & (places_I < mode + given_N[:, None])] = tokens_NxL[given_NxL]
    inputs_NxI[np.arange(rows), mode + given_N] = EOS_ID

    wanted_N = length - given_N
    targets_NxT = np.full((rows, int(wanted_N.max()) + 1), PAD_ID, np.int32)
    targets_NxT[np.arange(targets_NxT.shape[1]) < wanted_N[:, None]] = tokens_NxL[~given_NxL]
    targets_NxT[np.arange(rows), wanted_N] = EOS_ID
    return Examples(inputs_NxI, targets_NxT, mode + given_N + 1, wanted_N + 1)


def predict_all(tokens_NxL: Tokens, keys_N: rng.Keys, objective: CausalLM, vocabulary: Vocabulary) -> Examples:
    del keys_N, objective, vocabulary
    rows, length = tokens_NxL.shape
    targets_NxT = np.concatenate([tokens_NxL, np.full((rows, 1), EOS_ID, np.int32)], axis=1)
    return Examples(
        np.zeros((rows, 0), np.int32), targets_NxT, np.zeros(rows, np.int64), np.full(rows, length + 1, np.int64)
    )
