"""Span corruption: T5's objective, and UL2's R and X denoisers."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import Layout, SpanCorruption
from t5x_like.config.objectives.span_lengths import expected_cuts
from t5x_like.data.inspection.goodness_of_fit import Fit, compare
from t5x_like.data.inspection.noise_distributions import ObservedNoise, fit_composition_lengths
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Mask, Tokens
from t5x_like.data.objectives.prompts import PromptFormat, SentinelSpans
from t5x_like.data.objectives.random_ops import CLEAN, NOISE, ROTATION, rotate
from t5x_like.data.stream import rng
from t5x_like.data.stream.unpack import UnpackedExample
from t5x_like.data.tokenizers.vocabulary import PAD_ID, TokenTraits, Vocabulary


class SpanCorruptionDenoiser(ObjectiveImplementation[SpanCorruption]):
    """NumPy half of `SpanCorruption`."""

    prompt_preference = 3

    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        return corrupt_spans(tokens_NxL, keys_N, self.config, vocabulary)

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        return restore_spans(*self._text_ids(inputs, targets), vocabulary)

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return self._default_prompt_format(layout, sentinels=True, infill=SentinelSpans())

    def observe(
        self, example: UnpackedExample, raw_length: int, vocabulary: Vocabulary, *, first: bool
    ) -> ObservedNoise:
        starts = np.append(np.flatnonzero(vocabulary.is_sentinel(example.targets)), len(example.targets) - 1)
        # Spans in the order of their sentinels, without the sentinel itself.
        order = np.argsort(-example.targets[starts[:-1]])
        lengths = (np.diff(starts) - 1)[order].tolist()
        return ObservedNoise.of_spans(raw_length, lengths, example.inputs[self.config.mode_tokens : -1], vocabulary)

    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        groups: collections.Counter[tuple[int, int]] = collections.Counter()
        lengths: collections.Counter[int] = collections.Counter()
        forbidden = cuts = 0
        expected_cut, variance = 0.0, 0.0
        for one in observed:
            noise, spans = self.config.noise_counts(one.raw_length)
            if (one.masked, len(one.spans)) != (noise, spans) or min(one.spans) < 1:
                forbidden += 1
                continue
            groups[noise, spans] += 1
            lengths.update(one.spans)
            cuts += one.cut
            share = 0.0 if self.config.t5_exact else expected_cuts(noise, spans, one.raw_length)
            expected_cut, variance = expected_cut + share, variance + share * (1 - share)
        if not groups:
            return [Fit("span lengths", (), np.zeros(0), np.zeros(0), 0.0, forbidden, np.zeros(0))]
        cut = compare(
            "spans cut by the window's ends",
            ("cut", "whole"),
            np.array([cuts, sum(groups.values()) - cuts]),
            np.array([expected_cut, sum(groups.values()) - expected_cut]),
            # "cut" and "whole" sum to the number of examples, hence the perfect negative covariance.
            variance * np.array([[1.0, -1.0], [-1.0, 1.0]]),
        )
        return [fit_composition_lengths(groups, lengths, forbidden), cut]


def random_cuts(keys_N: rng.Keys, stream: int, total: int, parts: int) -> npt.NDArray[np.int64]:
    """Return 0, the cuts of `total` into positive parts, and `total` ([N, parts + 1]), uniform over all compositions.

    The cuts between parts are a uniform subset of the total - 1 boundaries. T5's `random_spans_noise_mask` shuffles a
    0/1 vector of them, which has the same distribution.
    """
    cuts_NxP = np.zeros((len(keys_N), parts + 1), np.int64)
    cuts_NxP[:, -1] = total
    if parts > 1:
        np.add(rng.choose(keys_N, stream, total - 1, parts - 1), 1, out=cuts_NxP[:, 1:-1])
    return cuts_NxP


def span_mask(keys_N: rng.Keys, objective: SpanCorruption, length: int) -> Mask:
    """Return a mask [N, length]: True for masked tokens, with the distribution that `SpanCorruption` describes."""
    noise, spans = objective.noise_counts(length)
    rows = len(keys_N)
    # Clean and masked runs alternate, clean first. `steps` has +1 where a masked run begins and -1 after its end, so
    # that its cumulative sum is the mask. Rows have length + 1 entries, so that a run at the end of a row fits.
    # The s-th masked run begins after s + 1 clean runs and s masked ones: the sum of both cuts.
    begin_NxS = random_cuts(keys_N, CLEAN, length - noise, spans)[:, 1:]
    begin_NxS += np.arange(rows)[:, None] * (length + 1)
    masked_NxS = random_cuts(keys_N, NOISE, noise, spans)
    steps = np.zeros(rows * (length + 1), np.int8)
    # No begin equals an end: each clean run between two masked ones has at least one token.
    steps[begin_NxS + masked_NxS[:, :-1]] = 1
    steps[begin_NxS + masked_NxS[:, 1:]] = -1
    mask_NxL = np.cumsum(steps, dtype=np.int8).view(np.bool_).reshape(rows, length + 1)[:, :-1]
    if objective.t5_exact:
        return np.ascontiguousarray(mask_NxL)
    # T5's mask always begins with a clean run, which leaves the first tokens unmasked. A uniform rotation masks every
    # position with the same probability.
    offset_N = rng.below(rng.bits(keys_N, ROTATION, 1)[:, 0], length)
    return rotate(mask_NxL, offset_N)


def corrupt_spans(tokens_NxL: Tokens, keys_N: rng.Keys, objective: SpanCorruption, vocabulary: Vocabulary) -> Examples:
    """Return the examples of N windows: each span is replaced by its sentinel in the inputs.

    Sentinels are numbered in the order of the positions where spans start, so that inputs and targets agree wherever
    the first span begins. Every row selects the same number of positions, padding included, so that the selected
    tokens form a matrix again.
    """
    rows, length = tokens_NxL.shape
    most_spans = objective.max_spans(length)
    # Raises IndexError for a vocabulary with too few sentinels, before any work is done.
    vocabulary.sentinel_id(most_spans - 1)
    noise, spans = objective.noise_counts(length)
    mask_NxL = span_mask(keys_N, objective, length)
    starts_NxL = mask_NxL.copy()
    starts_NxL[:, 1:] &= ~mask_NxL[:, :-1]
    # A rotation that cuts a span makes two spans of it.
    spans_N = spans + (mask_NxL[:, 0] & mask_NxL[:, -1]).astype(np.int64)
    is_shorter_N = spans_N < most_spans
    # S counts the spans of all rows, in row-major order; `rank_S` is the number of a span in its row, hence of its
    # sentinel.
    start_S = np.flatnonzero(starts_NxL)
    row_S = np.repeat(np.arange(rows), spans_N)
    rank_S = np.arange(len(start_S)) - (np.cumsum(spans_N) - spans_N)[row_S]
    sentinel_S = (vocabulary.first_sentinel_id - rank_S).astype(np.int32)

    # Inputs: [mode], text with a sentinel where a span starts, EOS, and padding where another row has one span more.
    mode = objective.mode_tokens
    source = np.empty((rows, mode + length + 2), np.int32)
    kept = np.ones(source.shape, np.bool_)
    if objective.mode is not None:
        source[:, 0] = vocabulary.mode_id(objective.mode)
    source[:, mode:-2] = tokens_NxL
    # Indexing by position numbers, here and below, is several times faster than by boolean masks, whose random bits
    # defeat branch prediction.
    source.ravel()[start_S + row_S * (mode + 2) + mode] = sentinel_S
    source[:, -2:] = vocabulary.eos_id, PAD_ID
    # mask <= start is False for the tokens of a span after its first: those are removed.
    np.less_equal(mask_NxL, starts_NxL, out=kept[:, mode:-2])
    # Rows with one span less have one sentinel less in the inputs and get one pad token more: all rows keep the same
    # number of tokens, which the `reshape` below relies on.
    kept[:, -1] = is_shorter_N if most_spans > spans else False
    inputs_NxI = source.ravel().take(np.flatnonzero(kept)).reshape(rows, mode + length - noise + most_spans + 1)

    # Targets: pairs of a sentinel (kept only where a span starts) and a masked token; then EOS and padding.
    masked = np.flatnonzero(mask_NxL)
    pairs = np.empty((rows, noise + 1, 2), np.int32)
    wanted = np.ones(pairs.shape, np.bool_)
    # True for masked tokens that begin a span. Their sentinels are written to the first half of their pair; a row has
    # one pair more than masked tokens, hence `+ row_S` in the index.
    begins = starts_NxL.ravel().take(masked)
    wanted[:, :-1, 0] = begins.reshape(rows, noise)
    wanted[:, -1, 1] = is_shorter_N if most_spans > spans else False
    pairs[:, :-1, 1] = tokens_NxL.ravel().take(masked).reshape(rows, noise)
    pairs.ravel()[2 * (np.flatnonzero(begins) + row_S)] = sentinel_S
    pairs[:, -1] = vocabulary.eos_id, PAD_ID
    targets_NxT = pairs.ravel().take(np.flatnonzero(wanted)).reshape(rows, noise + most_spans + 1)
    return Examples(inputs_NxI, targets_NxT, mode + length - noise + spans_N + 1, noise + spans_N + 1)


def restore_spans(given: Sequence[int], wanted: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """Return the raw window of inputs and targets without mode token and EOS.

    Raises:
      ValueError: inputs and targets do not belong together (a sentinel missing, repeated or out of order).
    """
    sentinels = {vocabulary.sentinel_id(index): index for index in range(vocabulary.num_sentinels)}
    spans: list[list[int]] = []
    for token in wanted:
        if token in sentinels:
            if sentinels[token] != len(spans):
                raise ValueError(f"targets: found sentinel {sentinels[token]}, expected {len(spans)}")
            spans.append([])
        elif not spans:
            raise ValueError("targets: found a token before the first sentinel")
        else:
            spans[-1].append(token)
    tokens: list[int] = []
    seen = 0
    for token in given:
        if token not in sentinels:
            tokens.append(token)
            continue
        if sentinels[token] != seen or seen >= len(spans):
            raise ValueError(f"inputs: found sentinel {sentinels[token]}, expected {seen} of {len(spans)}")
        tokens.extend(spans[seen])
        seen += 1
    if seen != len(spans):
        raise ValueError(f"found {seen} sentinels in the inputs and {len(spans)} in the targets, expected as many")
    return tokens
