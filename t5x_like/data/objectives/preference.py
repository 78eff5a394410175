"""Preference pairs: rows are made by `data.stream.preference_rows`, with each answer laid out as supervised targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from t5x_like.config.objectives import Layout, Preference
from t5x_like.data.objectives.examples import Examples, Tokens
from t5x_like.data.objectives.prompts import PromptFormat
from t5x_like.data.objectives.supervised import SupervisedPairs, lengths, padded, pair_examples
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary


class PreferencePairs(SupervisedPairs):
    """NumPy half of `Preference`: prompts and answers have the form of supervised inputs and targets, or in dialogues
    that of the chat template."""

    config: Preference

    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        """Raise ValueError: preference pairs are read from a corpus."""
        raise ValueError(f"{self.config.name}: found windows of text, expected a corpus of preference pairs")

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        """Return the tokens of the prompt, then those of one answer."""
        if self.config.dialogues:
            return [*inputs.tolist(), *targets.tolist()]
        return super().restore(inputs, targets, vocabulary)

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return dataclasses.replace(super().prompt_format(layout), ends_in_eos=not self.config.dialogues)


def answer_examples(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    objective: Preference,
    vocabulary: Vocabulary,
    cut: Sequence[bool],
) -> Examples:
    """Return the examples of (prompt, answer), without EOS in dialogues; see `pair_examples`.

    A decoder reads its start id first. A dialogue that begins with it does not repeat it.
    """
    if not objective.dialogues:
        return pair_examples(pairs, objective, vocabulary, cut)
    prompts = [prompt[int(prompt[0] == vocabulary.start_id) :] for prompt, _ in pairs]
    answers = [answer for _, answer in pairs]
    return Examples(padded(prompts), padded(answers), lengths(prompts), lengths(answers))
