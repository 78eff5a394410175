"""Objectives as pure functions of (tokens, keys): a window of raw tokens becomes inputs and targets.

All functions work on N rows of one objective and one length at once. A row's result depends on its tokens and its key
only, never on the rows beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from t5x_like.config.lengths import masked_count, max_spans, noise_counts, prefix_target_range, windows_per_row
from t5x_like.config.objectives import CausalLM, MaskedLM, Objective, PrefixLM, SpanCorruption
from t5x_like.data import keys as rng
from t5x_like.data.vocabulary import EOS_ID, NUM_SPECIAL, PAD_ID, Vocabulary

Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

# Uses of a row's key. The numbers are part of what a seed means: changing one changes every run.
_NOISE, _CLEAN, _ROTATION, _CUT, _CHOICE, _REPLACEMENT, _RANDOM_TOKEN = range(1, 8)


@dataclasses.dataclass(frozen=True)
class Examples:
    """N examples of one objective, padded with 0 at the right.

    Attributes:
      inputs_NxI: Mode token, text and sentinels, EOS; empty rows for causal LM; the masked text for masked LM.
      targets_NxT: Ends in EOS, except for masked LM, where it is the raw text.
      input_lengths_N, target_lengths_N: Tokens that are not padding.
      scored_NxT: Target positions that are predicted; None means all of them.
    """

    inputs_NxI: Tokens
    targets_NxT: Tokens
    input_lengths_N: npt.NDArray[np.int64]
    target_lengths_N: npt.NDArray[np.int64]
    scored_NxT: Mask | None = None


def denoise(tokens_NxL: npt.NDArray[Any], keys_N: rng.Keys, objective: Objective, vocabulary: Vocabulary) -> Examples:
    """Turns windows of raw tokens into examples of `objective`.

    Args:
      tokens_NxL: Raw ids of text, at least 2 per window (1 for causal and masked LM); none may be the pad id. Where a
        row holds W windows (`config.lengths.windows_per_row`), they stand one after the other, and the examples of row
        n are W n, W n + 1, ... of the N W that are returned.
      keys_N: One key per row.
      objective: The denoiser.
      vocabulary: Ids of sentinels and mode tokens.

    Raises:
      IndexError: the window can need more sentinels than the vocabulary has.
      ValueError: rows of several windows that do not have one length.
    """
    return _DENOISERS[type(objective)](tokens_NxL.astype(np.int32, copy=False), keys_N, objective, vocabulary)


def random_composition(keys_N: rng.Keys, stream: int, total: int, parts: int) -> npt.NDArray[np.int64]:
    """[N, parts] positive integers that sum to `total`: uniform over all such compositions.

    The cuts between parts are a uniform subset of the total - 1 places (T5's `random_spans_noise_mask` shuffles a 0/1
    vector of them, which is the same law).
    """
    cuts = parts - 1
    edges = np.zeros((len(keys_N), parts + 1), np.int64)
    edges[:, -1] = total
    if cuts:
        edges[:, 1:-1] = rng.choose(keys_N, stream, total - 1, cuts) + 1
    return np.diff(edges, axis=1)


def span_mask(keys_N: rng.Keys, objective: SpanCorruption, length: int) -> Mask:
    """[N, length]: True where a token is masked. See `SpanCorruption` for the law."""
    noise, spans = noise_counts(objective, length)
    runs = np.empty((len(keys_N), spans, 2), np.int64)
    runs[:, :, 0] = random_composition(keys_N, _CLEAN, length - noise, spans)
    runs[:, :, 1] = random_composition(keys_N, _NOISE, noise, spans)
    pattern = np.tile(np.array([False, True]), len(keys_N) * spans)
    mask_NxL = np.repeat(pattern, runs.ravel()).reshape(len(keys_N), length)
    if objective.t5_exact:
        return mask_NxL
    offset_N = rng.below(rng.bits(keys_N, _ROTATION, 1)[:, 0], length)
    twice = np.concatenate([mask_NxL, mask_NxL], axis=1).ravel()
    # Whole stretches are copied, which is many times faster than an index for each position.
    return sliding_window_view(twice, length)[np.arange(len(keys_N)) * 2 * length + offset_N]


def _corrupt_spans(tokens_NxL: Tokens, keys_N: rng.Keys, objective: SpanCorruption, vocabulary: Vocabulary) -> Examples:
    """Each span gets its sentinel where it starts, so that inputs and targets agree wherever the first span begins.

    Every row selects the same number of cells, padding included, so that what is selected is a matrix again.
    """
    rows, length = tokens_NxL.shape
    most_spans = max_spans(objective, length)
    vocabulary.sentinel_id(most_spans - 1)
    noise, spans = noise_counts(objective, length)
    mask_NxL = span_mask(keys_N, objective, length)
    starts_NxL = mask_NxL.copy()
    starts_NxL[:, 1:] &= ~mask_NxL[:, :-1]
    # A rotation that cuts a span makes two of it.
    spans_N = spans + (mask_NxL[:, 0] & mask_NxL[:, -1]).astype(np.int64)
    is_shorter_N = spans_N < most_spans
    span = np.arange(spans_N.sum()) - np.repeat(np.cumsum(spans_N) - spans_N, spans_N)
    sentinels = (vocabulary.first_sentinel_id - span).astype(np.int32)

    # [mode] text with a sentinel where a span starts, EOS, and padding where another row has a span more.
    mode = 0 if objective.mode is None else 1
    source = np.empty((rows, mode + length + 2), np.int32)
    kept = np.ones(source.shape, np.bool_)
    if objective.mode is not None:
        source[:, 0] = vocabulary.mode_id(objective.mode)
    source[:, mode:-2] = tokens_NxL
    source[:, mode:-2][starts_NxL] = sentinels
    source[:, -2:] = EOS_ID, PAD_ID
    np.less_equal(mask_NxL, starts_NxL, out=kept[:, mode:-2])
    kept[:, -1] = is_shorter_N if most_spans > spans else False
    inputs_NxI = source[kept].reshape(rows, mode + length - noise + most_spans + 1)

    # Pairs of a sentinel, where a span starts, and a masked token; then EOS and padding.
    masked = np.flatnonzero(mask_NxL)
    pairs = np.empty((rows, noise + 1, 2), np.int32)
    wanted = np.ones(pairs.shape, np.bool_)
    wanted[:, :-1, 0] = starts_NxL.ravel()[masked].reshape(rows, noise)
    wanted[:, -1, 1] = is_shorter_N if most_spans > spans else False
    pairs[:, :-1, 1] = tokens_NxL.ravel()[masked].reshape(rows, noise)
    pairs[:, :-1, 0][wanted[:, :-1, 0]] = sentinels
    pairs[:, -1] = EOS_ID, PAD_ID
    targets_NxT = pairs[wanted].reshape(rows, noise + most_spans + 1)
    return Examples(inputs_NxI, targets_NxT, mode + length - noise + spans_N + 1, noise + spans_N + 1)


def _split_prefix(tokens_NxL: Tokens, keys_N: rng.Keys, objective: PrefixLM, vocabulary: Vocabulary) -> Examples:
    """One cut per window; of a pair, the second window has as many targets more as the first has fewer."""
    windows = windows_per_row(objective)
    rows, width = tokens_NxL.shape
    if width % windows:
        raise ValueError(f"{objective.name}: found rows of {width} tokens, expected {windows} windows of equal length")
    length = width // windows
    fewest, most = prefix_target_range(objective, length)
    wanted_NxW = np.empty((rows, windows), np.int64)
    wanted_NxW[:, 0] = fewest + rng.below(rng.bits(keys_N, _CUT, 1)[:, 0], most - fewest + 1)
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


def _predict_all(tokens_NxL: Tokens, keys_N: rng.Keys, objective: CausalLM, vocabulary: Vocabulary) -> Examples:
    del keys_N, objective, vocabulary
    rows, length = tokens_NxL.shape
    targets_NxT = np.concatenate([tokens_NxL, np.full((rows, 1), EOS_ID, np.int32)], axis=1)
    return Examples(
        np.zeros((rows, 0), np.int32), targets_NxT, np.zeros(rows, np.int64), np.full(rows, length + 1, np.int64)
    )


def _mask_tokens(tokens_NxL: Tokens, keys_N: rng.Keys, objective: MaskedLM, vocabulary: Vocabulary) -> Examples:
    """BERT's masking: of the chosen tokens 80 % become the mask token, 10 % a random piece of text, 10 % stay."""
    vocabulary.sentinel_id(0)
    rows, length = tokens_NxL.shape
    count = masked_count(objective, length)
    chosen_NxL = np.zeros((rows, length), np.bool_)
    np.put_along_axis(chosen_NxL, rng.choose(keys_N, _CHOICE, length, count), True, axis=1)

    fate_NxL = (rng.bits(keys_N, _REPLACEMENT, length) >> np.uint64(11)) * 2.0**-53
    masked_NxL = chosen_NxL & (fate_NxL < objective.replace_with_mask)
    random_NxL = chosen_NxL & ~masked_NxL & (fate_NxL < objective.replace_with_mask + objective.replace_with_random)
    inputs_NxL = tokens_NxL.copy()
    inputs_NxL[masked_NxL] = vocabulary.mask_id
    pieces = rng.below(rng.bits(keys_N, _RANDOM_TOKEN, length), vocabulary.base_size - NUM_SPECIAL) + NUM_SPECIAL
    inputs_NxL[random_NxL] = pieces[random_NxL]
    lengths_N = np.full(rows, length, np.int64)
    return Examples(inputs_NxL, tokens_NxL, lengths_N, lengths_N, chosen_NxL)


_DENOISERS: dict[type, Callable[..., Examples]] = {
    SpanCorruption: _corrupt_spans,
    PrefixLM: _split_prefix,
    CausalLM: _predict_all,
    MaskedLM: _mask_tokens,
}


def restore(
    inputs: npt.NDArray[Any], targets: npt.NDArray[Any], objective: Objective, vocabulary: Vocabulary
) -> Tokens:
    """The raw window of one example [I], [T]: the inverse of `denoise`, and the definition of its correctness.

    Raises:
      ValueError: inputs and targets do not belong together (a sentinel missing, repeated or out of order).
    """
    if isinstance(objective, MaskedLM):
        return np.trim_zeros(targets, "b").astype(np.int32)
    given = [int(token) for token in np.trim_zeros(inputs, "b")][0 if objective.mode is None else 1 : -1]
    wanted = [int(token) for token in np.trim_zeros(targets, "b")][:-1]
    if not isinstance(objective, SpanCorruption):
        return np.array(given + wanted, np.int32)

    sentinels = {vocabulary.sentinel_id(index): index for index in range(vocabulary.num_sentinels)}
    spans: list[list[int]] = []
    for token in wanted:
        if token in sentinels:
            if sentinels[token] != len(spans):
                raise ValueError(f"targets: sentinel {sentinels[token]} where {len(spans)} was due")
            spans.append([])
        elif not spans:
            raise ValueError("targets: a token before the first sentinel")
        else:
            spans[-1].append(token)
    tokens: list[int] = []
    seen = 0
    for token in given:
        if token not in sentinels:
            tokens.append(token)
            continue
        if sentinels[token] != seen or seen >= len(spans):
            raise ValueError(f"inputs: sentinel {sentinels[token]} where {seen} of {len(spans)} was due")
        tokens.extend(spans[seen])
        seen += 1
    if seen != len(spans):
        raise ValueError(f"inputs have {seen} sentinels, targets {len(spans)}")
    return np.array(tokens, np.int32)
