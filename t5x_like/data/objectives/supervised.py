"""Supervised pairs: inputs and targets as they are in the corpus."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import Layout, ObjectiveConfig
from t5x_like.config.objectives.supervised import PairObjective
from t5x_like.data.inspection.goodness_of_fit import Fit
from t5x_like.data.inspection.noise_distributions import ObservedNoise
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Tokens
from t5x_like.data.objectives.prompts import PromptFormat
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary


class SupervisedPairs(ObjectiveImplementation[PairObjective]):
    """NumPy half of `Supervised`, and the form of the inputs and targets of all pairs."""

    prompt_preference = 0

    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        """Raise ValueError: pairs are read from a corpus, see `pair_examples`."""
        raise ValueError(f"{self.config.name}: found windows of text, expected a corpus of supervised pairs")

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        """Return the tokens of the inputs, then those of the targets."""
        given, predicted = self._text_ids(inputs, targets)
        # Targets that are cut do not end in EOS.
        return [*given, *predicted, *([] if targets[-1] == vocabulary.eos_id else targets[-1:].tolist())]

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return self._default_prompt_format(layout, sentinels=False)

    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        """Return no fits: pairs have no noise."""
        return []


def pair_examples(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    objective: ObjectiveConfig,
    vocabulary: Vocabulary,
    cut: Sequence[bool] | None = None,
) -> Examples:
    """Return the examples of (inputs, targets) pairs of raw tokens, with mode token and EOS.

    Args:
      cut: True for pairs whose targets are truncated: they do not end in EOS, which would say that the answer is
        complete. None: no targets are.
    """
    mode = [] if objective.mode is None else [vocabulary.mode_id(objective.mode)]
    # The store of pairs has no EOS: both parts are stored as they are in the corpus.
    inputs = [[*mode, *tokens, vocabulary.eos_id] for tokens, _ in pairs]
    ends = [[] if is_cut else [vocabulary.eos_id] for is_cut in cut or [False] * len(pairs)]
    targets = [[*tokens, *end] for (_, tokens), end in zip(pairs, ends, strict=True)]
    return Examples(padded(inputs), padded(targets), lengths(inputs), lengths(targets))


def lengths(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """Return the length of each row, [N]."""
    return np.array([len(row) for row in rows], np.int64)


def padded(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """Return the rows as one array [N, longest], padded with 0."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
