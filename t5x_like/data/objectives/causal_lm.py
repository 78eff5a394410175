"""Causal LM: the text itself, all of which is predicted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from t5x_like.config.objectives import CausalLM, Layout
from t5x_like.data.inspection.goodness_of_fit import Fit
from t5x_like.data.inspection.noise_distributions import ObservedNoise
from t5x_like.data.objectives.base import ObjectiveImplementation
from t5x_like.data.objectives.examples import Examples, Tokens, scored_part, without_inputs
from t5x_like.data.objectives.prompts import PromptFormat
from t5x_like.data.stream import rng
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary


class CausalLMDenoiser(ObjectiveImplementation[CausalLM]):
    """NumPy half of `CausalLM`."""

    prompt_preference = 2
    continues_text = True

    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        rows, length = tokens_NxL.shape
        targets_NxT = np.concatenate([tokens_NxL, np.full((rows, 1), vocabulary.eos_id, np.int32)], axis=1)
        return without_inputs(targets_NxT, np.full(rows, length + 1, np.int64))

    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        return targets[:-1].tolist()

    def prompt_format(self, layout: Layout) -> PromptFormat:
        return self._default_prompt_format(layout, sentinels=False)

    def continuation(self, tokens_NxL: Tokens, vocabulary: Vocabulary) -> tuple[Examples, int]:
        rows, length = tokens_NxL.shape
        # Causal LM has no noise, so its keys are not used. Its targets are the whole window.
        examples = self.denoise(tokens_NxL.astype(np.int32), np.zeros(rows, np.uint64), vocabulary, None)
        return scored_part(examples, length // 2, length - length // 2), length // 2

    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        """Return no fits: the objective has no noise."""
        return []
