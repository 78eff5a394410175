"""Fill-in-the-middle: prefix, suffix and middle of the window, each after its marker."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from t5x_like.config.objectives import FillInTheMiddle, Layout
from t5x_like.config.objectives.fill_in_the_middle import INFILLING_MARKERS
from t5x_like.data.inspection.goodness_of_fit import Fit, multinomial
from t5x_like.data.inspection.noise_distributions import ObservedNoise
from t5x_like.data.objectives import random_ops
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Tokens, concatenate, without_inputs
from t5x_like.data.objectives.infilling import append_ids
from t5x_like.data.objectives.prompts import MarkedMiddle, PromptFormat
from t5x_like.data.stream import rng
from t5x_like.data.stream.unpack import UnpackedExample
from t5x_like.data.tokenizers.vocabulary import PAD_ID, TokenTraits, Vocabulary
from t5x_like.utils.type_aliases import IntArray


class FillInTheMiddleDenoiser(ObjectiveImplementation[FillInTheMiddle]):
    """NumPy half of `FillInTheMiddle`."""

    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        return fill_in_the_middle(tokens_NxL, keys_N, self.config, vocabulary)

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        return restore_middle(targets[:-1].tolist(), vocabulary)

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return self._default_prompt_format(layout, sentinels=True, infill=MarkedMiddle())

    def observe(
        self, example: UnpackedExample, raw_length: int, vocabulary: Vocabulary, *, first: bool
    ) -> ObservedNoise:
        return ObservedNoise(raw_length, raw_length, outcome=(int(vocabulary.is_sentinel(example.targets).sum()),))

    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        """Compare the number of rearranged windows, which have three markers, with `fim_rate`."""
        counts = collections.Counter(one.outcome[0] for one in observed)
        measured = np.array([counts[3], counts[0]], np.float64)
        probabilities = np.array([self.config.fim_rate, 1 - self.config.fim_rate])
        forbidden = len(observed) - int(measured.sum())
        return [multinomial("windows", ("rearranged", "left as they are"), measured, probabilities, forbidden)]


def fill_in_the_middle(
    tokens_NxL: Tokens, keys_N: rng.Keys, objective: FillInTheMiddle, vocabulary: Vocabulary
) -> Examples:
    """Return the examples of N windows: PSM, SPM or the unchanged window, as `FillInTheMiddle` describes."""
    rows, length = tokens_NxL.shape
    form_Nx2 = random_ops.uniform(keys_N, random_ops.FORM, 2)
    moved_N = form_Nx2[:, 0] < objective.fim_rate
    cuts_Nx2 = np.sort(rng.below(rng.bits(keys_N, random_ops.CUT, 2), length + 1), axis=1)
    first_N, second_N = cuts_Nx2[:, 0], cuts_Nx2[:, 1]
    # Both draws are made for every row, so that a change of one rate does not move the cuts or the other draw.
    prefix_first_N = moved_N & (form_Nx2[:, 1] >= objective.spm_rate)

    # Each row is assembled from the same sequence of pieces, of which those of the other forms have length 0.
    markers = vocabulary.infilling_ids if objective.fim_rate > 0 else (PAD_ID,) * INFILLING_MARKERS
    source = append_ids(tokens_NxL, (*markers, vocabulary.eos_id))
    marker_N, none_N = moved_N.astype(np.int64), np.zeros(rows, np.int64)
    pieces: list[tuple[int | IntArray, IntArray]] = [
        (length, marker_N),
        (0, np.where(prefix_first_N, first_N, none_N)),
        (length + 1, marker_N),
        (second_N, np.where(moved_N, length - second_N, none_N)),
        (length + 2, marker_N),
        # SPM puts the prefix here, directly before the middle; in a window that is left unchanged, prefix, middle and
        # suffix follow each other.
        (0, np.where(prefix_first_N, none_N, first_N)),
        (first_N, second_N - first_N),
        (second_N, np.where(moved_N, none_N, length - second_N)),
        (length + 3, np.ones(rows, np.int64)),
    ]
    starts_NxP = np.stack([np.broadcast_to(np.asarray(start, np.int64), rows) for start, _ in pieces], axis=1)
    lengths_NxP = np.stack([lengths for _, lengths in pieces], axis=1)
    return without_inputs(*concatenate(source, starts_NxP, lengths_NxP, objective.longest_example(length).targets))


def restore_middle(stream: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """Return the raw window of an example without its EOS.

    Raises:
      ValueError: a marker is missing or out of order.
    """
    tokens = list(stream)
    if vocabulary.num_sentinels < 3 or tokens[:1] != [vocabulary.infilling_ids[0]]:
        return tokens
    _, suffix_id, middle_id = vocabulary.infilling_ids
    suffix, middle = tokens.index(suffix_id), tokens.index(middle_id)
    if suffix > middle:
        raise ValueError("targets: found the marker of the middle before that of the suffix")
    # PSM has the prefix before the suffix marker. SPM has nothing there and prefix and middle after the last marker;
    # the same three slices restore both.
    return tokens[1:suffix] + tokens[middle + 1 :] + tokens[suffix + 1 : middle]
