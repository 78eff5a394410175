"""Preference pairs: rows are made by `data.stream.preference_rows`, with each answer laid out as supervised targets."""

from __future__ import annotations

from t5x_like.data.objectives.examples import Examples, Tokens
from t5x_like.data.objectives.supervised import SupervisedPairs
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary


class PreferencePairs(SupervisedPairs):
    """NumPy half of `Preference`: prompts and answers have the form of supervised inputs and targets."""

    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        """Raise ValueError: preference pairs are read from a corpus."""
        raise ValueError(f"{self.config.name}: found windows of text, expected a corpus of preference pairs")
