"""Labelled texts: rows are made by `data.stream.labeled_rows`, not by denoising windows of text."""

from __future__ import annotations

from collections.abc import Sequence

from t5x_like.config.objectives import LabeledExamples, Layout
from t5x_like.data.inspection.goodness_of_fit import Fit
from t5x_like.data.inspection.noise_distributions import ObservedNoise
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Tokens
from t5x_like.data.objectives.prompts import PromptFormat
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary


class LabeledTexts(ObjectiveImplementation[LabeledExamples]):
    """NumPy half of `LabeledExamples`."""

    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        """Raise ValueError: labelled examples are read from a corpus of pairs."""
        raise ValueError(f"{self.config.name}: found windows of text, expected a corpus of labelled pairs")

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        """Return the text; the label is no part of it."""
        return self._text_ids(inputs, targets)[0]

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return self._default_prompt_format(layout, sentinels=False)

    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        """Return no fits: the examples have no noise."""
        return []
