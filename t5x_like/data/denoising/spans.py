"""Span corruption: T5's, and UL2's R and X denoisers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from t5x_like.config.lengths import max_spans, noise_counts
from t5x_like.config.objectives import SpanCorruption
from t5x_like.data import keys as rng
from t5x_like.data.denoising.draws import CLEAN, NOISE, ROTATION, rotate
from t5x_like.data.denoising.examples import Examples, Mask, Tokens
from t5x_like.data.vocabulary import EOS_ID, PAD_ID, Vocabulary


def random_cuts(keys_N: rng.Keys, stream: int, total: int, parts: int) -> npt.NDArray[np.int64]:
    """[N, parts + 1]: 0, the cuts of `total` into positive parts, and `total`: uniform over all such compositions.

    The cuts between parts are a uniform subset of the total - 1 places (T5's `random_spans_noise_mask` shuffles a 0/1
    vector of them, which is the same law).
    """
    cuts_NxP = np.zeros((len(keys_N), parts + 1), np.int64)
    cuts_NxP[:, -1] = total
    if parts > 1:
        np.add(rng.choose(keys_N, stream, total - 1, parts - 1), 1, out=cuts_NxP[:, 1:-1])
    return cuts_NxP


def span_mask(keys_N: rng.Keys, objective: SpanCorruption, length: int) -> Mask:
    """[N, length]: True where a token is masked. See `SpanCorruption` for the law."""
    noise, spans = noise_counts(objective, length)
    rows = len(keys_N)
    # Clean and masked runs alternate, clean first; +1 where a masked run begins, -1 behind its end.
    begin_NxS = random_cuts(keys_N, CLEAN, length - noise, spans)[:, 1:]
    begin_NxS += np.arange(rows)[:, None] * (length + 1)
    masked_NxS = random_cuts(keys_N, NOISE, noise, spans)
    steps = np.zeros(rows * (length + 1), np.int8)
    steps[begin_NxS + masked_NxS[:, :-1]] = 1
    steps[begin_NxS + masked_NxS[:, 1:]] = -1
    mask_NxL = np.cumsum(steps, dtype=np.int8).view(np.bool_).reshape(rows, length + 1)[:, :-1]
    if objective.t5_exact:
        return np.ascontiguousarray(mask_NxL)
    offset_N = rng.below(rng.bits(keys_N, ROTATION, 1)[:, 0], length)
    return rotate(mask_NxL, offset_N)


def corrupt_spans(tokens_NxL: Tokens, keys_N: rng.Keys, objective: SpanCorruption, vocabulary: Vocabulary) -> Examples:
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
    start_S = np.flatnonzero(starts_NxL)
    row_S = np.repeat(np.arange(rows), spans_N)
    rank_S = np.arange(len(start_S)) - (np.cumsum(spans_N) - spans_N)[row_S]
    sentinel_S = (vocabulary.first_sentinel_id - rank_S).astype(np.int32)

    # [mode] text with a sentinel where a span starts, EOS, and padding where another row has a span more.
    mode = 0 if objective.mode is None else 1
    source = np.empty((rows, mode + length + 2), np.int32)
    kept = np.ones(source.shape, np.bool_)
    if objective.mode is not None:
        source[:, 0] = vocabulary.mode_id(objective.mode)
    source[:, mode:-2] = tokens_NxL
    # Numbers of cells, here and below, are several times faster than masks of bits that no processor can foresee.
    source.ravel()[start_S + row_S * (mode + 2) + mode] = sentinel_S
    source[:, -2:] = EOS_ID, PAD_ID
    np.less_equal(mask_NxL, starts_NxL, out=kept[:, mode:-2])
    kept[:, -1] = is_shorter_N if most_spans > spans else False
    inputs_NxI = source.ravel().take(np.flatnonzero(kept)).reshape(rows, mode + length - noise + most_spans + 1)

    # Pairs of a sentinel, where a span starts, and a masked token; then EOS and padding.
    masked = np.flatnonzero(mask_NxL)
    pairs = np.empty((rows, noise + 1, 2), np.int32)
    wanted = np.ones(pairs.shape, np.bool_)
    begins = starts_NxL.ravel().take(masked)
    wanted[:, :-1, 0] = begins.reshape(rows, noise)
    wanted[:, -1, 1] = is_shorter_N if most_spans > spans else False
    pairs[:, :-1, 1] = tokens_NxL.ravel().take(masked).reshape(rows, noise)
    pairs.ravel()[2 * (np.flatnonzero(begins) + row_S)] = sentinel_S
    pairs[:, -1] = EOS_ID, PAD_ID
    targets_NxT = pairs.ravel().take(np.flatnonzero(wanted)).reshape(rows, noise + most_spans + 1)
    return Examples(inputs_NxI, targets_NxT, mode + length - noise + spans_N + 1, noise + spans_N + 1)


def restore_spans(given: Sequence[int], wanted: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """The raw window of inputs and targets without mode token and EOS.

    Raises:
      ValueError: inputs and targets do not belong together (a sentinel missing, repeated or out of order).
    """
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
    return tokens
