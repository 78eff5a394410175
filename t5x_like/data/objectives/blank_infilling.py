"""Blank infilling: blanked spans are written after the text in random order (GLM)."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from t5x_like.config.objectives import BlankInfilling, Layout
from t5x_like.config.objectives.span_lengths import poisson
from t5x_like.data.inspection.goodness_of_fit import Fit, compare
from t5x_like.data.inspection.noise_distributions import (
    ObservedNoise,
    expected_span_counts,
    length_bins,
    length_labels,
)
from t5x_like.data.objectives import random_ops
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Tokens, concatenate
from t5x_like.data.objectives.infilling import (
    append_ids,
    sentinel_ids,
    split_at_sentinels,
    text_with_sentinels,
)
from t5x_like.data.objectives.prompts import PromptFormat, SeparateBlanks
from t5x_like.data.stream import rng
from t5x_like.data.stream.unpack import UnpackedExample
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary


class BlankInfillingDenoiser(ObjectiveImplementation[BlankInfilling]):
    """NumPy half of `BlankInfilling`."""

    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        return fill_blanks(tokens_NxL, keys_N, self.config, vocabulary)

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        return restore_blanks(*self._text_ids(inputs, targets), vocabulary)

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return self._default_prompt_format(layout, sentinels=True, infill=SeparateBlanks())

    def observe(
        self, example: UnpackedExample, raw_length: int, vocabulary: Vocabulary, *, first: bool
    ) -> ObservedNoise:
        starts = np.append(np.flatnonzero(vocabulary.is_sentinel(example.targets)), len(example.targets))
        # Spans in the order of their sentinels, without the sentinel and the EOS that ends each span.
        order = np.argsort(-example.targets[starts[:-1]])
        lengths = (np.diff(starts) - 2)[order].tolist()
        return ObservedNoise.of_spans(raw_length, lengths, example.inputs[self.config.mode_tokens : -1], vocabulary)

    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        """Compare the lengths of the blanks with their expected counts.

        The lengths of one example depend on each other in a way that has no short formula. Their covariance is
        estimated from the sample.
        """
        counts = collections.Counter(self.config.blank_count(one.raw_length) for one in observed)
        distribution = poisson(self.config.mean_span_length, at_least=1)
        longest = max(counts)
        expected = np.zeros(longest + 1)
        for blank, examples in counts.items():
            expected[: blank + 1] += examples * expected_span_counts(distribution, blank)
        allowed = [one for one in observed if one.masked == self.config.blank_count(one.raw_length)]
        starts = length_bins(expected)
        measured = np.zeros((len(allowed), len(starts)))
        for row, one in enumerate(allowed):
            measured[row] = np.bincount(np.searchsorted(starts, one.spans, side="right") - 1, minlength=len(starts))
        binned = np.add.reduceat(expected, starts)
        covariance = (
            len(allowed) * np.atleast_2d(np.cov(measured.T)) if len(allowed) > 1 else np.zeros((len(starts),) * 2)
        )
        labels, widths = length_labels(starts, longest)
        forbidden = len(observed) - len(allowed)
        fit = compare("span lengths", labels, measured.sum(axis=0), binned, covariance, forbidden, widths)
        # The covariance of few examples is too noisy for a p-value.
        return [fit if fit.forbidden or len(allowed) > 10 * len(starts) else dataclasses.replace(fit, p_value=None)]


def fill_blanks(tokens_NxL: Tokens, keys_N: rng.Keys, objective: BlankInfilling, vocabulary: Vocabulary) -> Examples:
    """Return the examples of N windows: Part A as inputs, Part B as targets, as `BlankInfilling` describes.

    GLM gives each token two position ids. The first is its position in Part A; for a token of Part B, that of its
    blank. The second is 0 in Part A and counts from 1 within a span. The models here read one position id, the position
    in the row. This is sufficient: each blank has a sentinel of its own, which identifies the blank at the start of
    its span.
    """
    rows, length = tokens_NxL.shape
    blank, most = objective.blank_count(length), objective.max_blanks(length)
    # A blank has at least one token, in contrast to BART, whose spans of length 0 insert a mask token.
    distribution = poisson(objective.mean_span_length, at_least=1)
    most_draws = objective.max_blank_draws(length)
    drawn = random_ops.span_lengths_with_total(keys_N, random_ops.LENGTHS, distribution, blank, most_draws)
    mask_NxL, _ = random_ops.place_spans_cyclic(keys_N, *drawn, length)
    starts_NxM, ends_NxM, count_N = random_ops.find_runs(mask_NxL, most)
    # Integers and not booleans: they are lengths of pieces, 1 for the sentinel of a span and 0 for padding.
    present_NxM = (np.arange(most) < count_N[:, None]).astype(np.int64)

    mode = () if objective.mode is None else (vocabulary.mode_id(objective.mode),)
    # Layout of a source row: text at 0, sentinel k at length + k, EOS at length + most, the mode token after it. All
    # rows are assembled from it by one gather.
    source = append_ids(tokens_NxL, (*sentinel_ids(most, vocabulary), vocabulary.eos_id, *mode))
    sentinel_NxM = np.broadcast_to(length + np.arange(most), (rows, most))
    end_NxM = np.full((rows, most), length + most)
    text = text_with_sentinels(starts_NxM, ends_NxM, length, sentinel_NxM, present_NxM)
    one = np.ones((rows, 1), np.int64)
    head = [(end_NxM[:, :1] + 1, one)] if mode else []
    parts = [*head, text, (end_NxM[:, :1], one)]
    starts, lengths = (np.concatenate([part[k] for part in parts], axis=1) for k in range(2))
    longest = objective.longest_example(length)
    inputs_NxI, input_lengths_N = concatenate(source, starts, lengths, longest.inputs)

    # Part B: sentinel, span and EOS of each blank, in random order; EOS is scored, sentinels are not.
    order_NxM = random_ops.random_order(keys_N, random_ops.ORDER, count_N, most)
    # [N, M, 3]: three pieces per blank. The order permutes blanks, so that the pieces of one stay together.
    starts = np.stack([sentinel_NxM, starts_NxM, end_NxM], axis=2)
    lengths = np.stack([present_NxM, ends_NxM - starts_NxM, present_NxM], axis=2)
    starts, lengths = (np.take_along_axis(part, order_NxM[:, :, None], axis=1) for part in (starts, lengths))
    pieces = starts.reshape(rows, -1), lengths.reshape(rows, -1)
    targets_NxT, target_lengths_N = concatenate(source, *pieces, longest.targets)
    present_NxT = np.arange(targets_NxT.shape[1]) < target_lengths_N[:, None]
    # The order of the blanks is random: a model cannot know which sentinel comes next, so it is given and not scored.
    scored_NxT = present_NxT & ~vocabulary.is_sentinel(targets_NxT)
    return Examples(inputs_NxI, targets_NxT, input_lengths_N, target_lengths_N, scored_NxT)


def restore_blanks(inputs: Sequence[int], targets: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """Return the raw window of Part A and Part B, both without their last EOS.

    Raises:
      ValueError: the sentinels of the two parts do not match.
    """
    head, *text = split_at_sentinels(inputs, vocabulary)
    before, *spans = split_at_sentinels([*targets, vocabulary.eos_id], vocabulary)
    span_of = {sentinel: span[:-1] for sentinel, span in spans}
    expected = list(range(len(text)))
    if before[1] or [k for k, _ in text] != expected or sorted(k for k, _ in spans) != expected:
        raise ValueError(
            f"found sentinels {[k for k, _ in text]} in the inputs and {[k for k, _ in spans]} in the targets"
        )
    return head[1] + [token for sentinel, after in text for token in span_of[sentinel] + after]
