"""Dialogues: tokens of a chat template with the mask of the assistant's turns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import Dialogues, Layout
from t5x_like.data.inspection.goodness_of_fit import Fit
from t5x_like.data.inspection.noise_distributions import ObservedNoise
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Tokens
from t5x_like.data.objectives.prompts import PromptFormat
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary


class DialogueExamples(ObjectiveImplementation[Dialogues]):
    """NumPy half of `Dialogues`."""

    prompt_preference = 0

    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        """Raise ValueError: dialogues are read from a corpus, see `dialogue_examples`."""
        raise ValueError(f"{self.config.name}: found windows of text, expected a corpus of dialogues")

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        """Return the tokens of the dialogue."""
        result: list[int] = targets.tolist()
        return result

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return self._default_prompt_format(layout, sentinels=False)

    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        """Return no fits: dialogues have no noise."""
        return []


def dialogue_examples(
    dialogues: Sequence[tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]], vocabulary: Vocabulary
) -> Examples:
    """Return the examples of (ids, mask of the scored ids).

    A decoder reads its start id first. Where a dialogue itself begins with that id, as with a template that writes BOS,
    the id is not repeated.
    """
    begins = [len(ids) > 1 and ids[0] == vocabulary.start_id for ids, _ in dialogues]
    kept = [(ids[first:], mask[first:]) for first, (ids, mask) in zip(map(int, begins), dialogues, strict=True)]
    lengths_N = np.array([len(ids) for ids, _ in kept], np.int64)
    targets_NxT = np.zeros((len(kept), int(lengths_N.max())), np.int32)
    scored_NxT = np.zeros(targets_NxT.shape, np.bool_)
    for row, (ids, mask) in enumerate(kept):
        targets_NxT[row, : len(ids)], scored_NxT[row, : len(ids)] = ids, mask > 0
    none_N = np.zeros(len(kept), np.int64)
    return Examples(np.zeros((len(kept), 0), np.int32), targets_NxT, none_N, lengths_N, scored_NxT)
