"""Causal masking: spans move to the end of the window, each after its sentinel (CM3)."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from t5x_like.config.objectives import CausalMasking, Layout
from t5x_like.data.inspection.goodness_of_fit import Fit, compare
from t5x_like.data.inspection.noise_distributions import ObservedNoise
from t5x_like.data.objectives import random_ops
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Tokens, concatenate, without_inputs
from t5x_like.data.objectives.infilling import (
    append_ids,
    sentinel_ids,
    split_at_sentinels,
    text_with_sentinels,
)
from t5x_like.data.objectives.prompts import MovedSpans, PromptFormat
from t5x_like.data.stream import rng
from t5x_like.data.stream.unpack import UnpackedExample
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary


class CausalMaskingDenoiser(ObjectiveImplementation[CausalMasking]):
    """NumPy half of `CausalMasking`."""

    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        return mask_causally(tokens_NxL, keys_N, self.config, vocabulary)

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        return restore_causal(targets[:-1].tolist(), vocabulary)

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return self._default_prompt_format(layout, sentinels=True, infill=MovedSpans())

    def observe(
        self, example: UnpackedExample, raw_length: int, vocabulary: Vocabulary, *, first: bool
    ) -> ObservedNoise:
        return ObservedNoise(raw_length, raw_length, outcome=(int(vocabulary.is_sentinel(example.targets).sum()),))

    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        """Compare the number of spans per window with its conditioned Poisson distribution."""
        groups = collections.Counter(one.raw_length for one in observed)
        distributions = {length: np.array(self.config.moved_spans_distribution(length)) for length in groups}
        most = max(map(len, distributions.values()))
        measured, expected, covariance = np.zeros(most), np.zeros(most), np.zeros((most, most))
        for length, count in groups.items():
            share = np.pad(distributions[length], (0, most - len(distributions[length])))
            expected += count * share
            covariance += count * (np.diag(share) - np.outer(share, share))
        forbidden = 0
        for one in observed:
            # Each span has its sentinel twice: in the text and before the span.
            spans, odd = divmod(one.outcome[0], 2)
            if odd or not 1 <= spans <= most:
                forbidden += 1
            else:
                measured[spans - 1] += 1
        labels = tuple(str(spans) for spans in range(1, most + 1))
        return [compare("spans per window", labels, measured, expected, covariance, forbidden)]


def mask_causally(tokens_NxL: Tokens, keys_N: rng.Keys, objective: CausalMasking, vocabulary: Vocabulary) -> Examples:
    """Return the examples of N windows: spans after the text, as `CausalMasking` describes."""
    rows, length = tokens_NxL.shape
    most = objective.max_moved_spans(length)
    probabilities = (0.0, *objective.moved_spans_distribution(length))
    count_N = random_ops.sample_categorical(keys_N, random_ops.COUNT, probabilities, 1)[:, 0]
    # The ends of the spans, in order; those of absent spans are at the end of the window.
    cuts = random_ops.random_subset(keys_N, random_ops.CUT, length + 1, 2 * most)
    cuts = np.sort(np.where(np.arange(2 * most) < 2 * count_N[:, None], cuts, length), axis=1)
    # Different cuts, taken in pairs: no span is empty and no two are adjacent. Absent spans are empty at the end.
    starts_NxM, ends_NxM = cuts[:, 0::2], cuts[:, 1::2]
    present_NxM = (np.arange(most) < count_N[:, None]).astype(np.int64)

    # Sentinels and EOS are appended to the text as further tokens. A stream is then a list of (start, length) pieces of
    # this row, which one gather assembles for all rows.
    source = append_ids(tokens_NxL, (*sentinel_ids(most, vocabulary), vocabulary.eos_id))
    sentinel_NxM = np.broadcast_to(length + np.arange(most), (rows, most))
    text = text_with_sentinels(starts_NxM, ends_NxM, length, sentinel_NxM, present_NxM)
    # Every span has a sentinel in the text and one before it at the end, so the stream has 2 k sentinels.
    spans = (
        # Pieces alternate: the sentinel of a span, the span.
        np.stack([sentinel_NxM, starts_NxM], axis=2).reshape(rows, -1),
        np.stack([present_NxM, ends_NxM - starts_NxM], axis=2).reshape(rows, -1),
    )
    end = np.full((rows, 1), length + most), np.ones((rows, 1), np.int64)
    starts, lengths = (np.concatenate(parts, axis=1) for parts in zip(text, spans, end, strict=True))
    examples = without_inputs(*concatenate(source, starts, lengths, objective.longest_example(length).targets))

    # The k-th sentinel inside the text follows k sentinels and all tokens before its span that are in no span. Its
    # position is random, so that it is not scored.
    moved_NxM = np.cumsum(ends_NxM - starts_NxM, axis=1) - (ends_NxM - starts_NxM)
    scored = np.arange(examples.targets_NxT.shape[1]) < examples.target_lengths_N[:, None]
    row_R, rank_R = np.nonzero(present_NxM)
    scored[row_R, (starts_NxM - moved_NxM)[row_R, rank_R] + rank_R] = False
    return Examples(
        examples.inputs_NxI, examples.targets_NxT, examples.input_lengths_N, examples.target_lengths_N, scored
    )


def restore_causal(stream: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """Return the raw window of an example without its EOS.

    Raises:
      ValueError: a sentinel is missing or out of order.
    """
    head, *parts = split_at_sentinels(stream, vocabulary)
    text, spans = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    if len(text) != len(spans) or any(k != i for half in (text, spans) for i, (k, _) in enumerate(half)):
        raise ValueError(f"targets: found sentinels {[k for k, _ in parts]}, expected 0, 1, ... twice")
    return head[1] + [token for (_, after), (_, span) in zip(text, spans, strict=True) for token in span + after]
