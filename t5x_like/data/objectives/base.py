"""The NumPy half of an objective: from windows of raw tokens to examples and back, its prompts, and its statistics."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from t5x_like.config.layouts import has_bidirectional_prefix
from t5x_like.config.objectives import Layout, ObjectiveConfig
from t5x_like.data.inspection.goodness_of_fit import Fit
from t5x_like.data.inspection.noise_distributions import ObservedNoise
from t5x_like.data.objectives.examples import Examples, Tokens
from t5x_like.data.objectives.prompts import InfillFormat, PromptFormat
from t5x_like.data.stream import rng
from t5x_like.data.stream.unpack import UnpackedExample
from t5x_like.data.tokenizers.vocabulary import TokenTraits, Vocabulary

ConfigT = TypeVar("ConfigT", bound=ObjectiveConfig)


class ObjectiveImplementation(abc.ABC, Generic[ConfigT]):
    """Base class of the implementations: one per objective, constructed with the objective's configuration.

    Attributes:
      config: The objective.
      prompt_preference: Rank for prompts without a mode token: in a mixture without modes, prompts have the format of
        the objective with the lowest rank.
      stratified: True if some of the noise is drawn from words that are stratified over the rows of the stream:
        `denoise_stratified` is defined.
      continues_text: True if examples can be the beginning of a text and its continuation: `continuation` is defined.
    """

    prompt_preference: ClassVar[int] = 4
    continues_text: ClassVar[bool] = False
    stratified: ClassVar[bool] = False

    def __init__(self, config: ConfigT):
        self.config = config

    @abc.abstractmethod
    def denoise(
        self, tokens_NxL: Tokens, keys_N: rng.Keys, vocabulary: Vocabulary, traits: TokenTraits | None
    ) -> Examples:
        """Return the examples of N rows of raw tokens, one key per row.

        The examples of a row are a function of its tokens and its key only, never of the rows beside it: the data
        stream relies on this for the same rows on any number of hosts. Each use of a key has a stream number of its own
        (`random_ops`). The lengths must not exceed `config.longest_example`.

        Args:
          tokens_NxL: `config.windows_per_row` windows of equal length per row, one after the other.
          keys_N: One key per row.
          vocabulary: Ids of the sentinels and mode tokens.
          traits: Pieces that begin words and end sentences; not None if `config.needs_token_traits`.
        """

    def denoise_stratified(
        self,
        tokens_NxL: Tokens,
        keys_N: rng.Keys,
        words_N: rng.Keys,
        vocabulary: Vocabulary,
        traits: TokenTraits | None,
    ) -> Examples:
        """Return the examples of N rows that also have a word of `rng.stratified` each. Defined if `stratified`.

        As in `denoise`, an example is a function of the tokens, the key and the word of its row only.
        """
        raise NotImplementedError(f"{type(self).__name__} sets stratified without defining denoise_stratified")

    @abc.abstractmethod
    def restore(self, inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Sequence[int]:
        """Return the raw window of one example, whose padding has been removed: the inverse of `denoise`.

        Raises:
          ValueError: inputs and targets do not belong together.
        """

    @abc.abstractmethod
    def prompt_format(self, layout: Layout) -> PromptFormat:
        """Return the format of prompts in a layout, so that they equal the inputs of training."""

    @abc.abstractmethod
    def noise_fits(self, observed: Sequence[ObservedNoise], vocabulary: Vocabulary) -> list[Fit]:
        """Compare a sample of at least one example with each noise distribution of the objective.

        Returns an empty list for an objective without randomness, or without a known distribution.
        """

    def observe(
        self, example: UnpackedExample, raw_length: int, vocabulary: Vocabulary, *, first: bool
    ) -> ObservedNoise:
        """Return the properties of an example that `noise_fits` needs.

        Args:
          example: The example.
          raw_length: Number of tokens of its window.
          vocabulary: Ids of the sentinels.
          first: False for the second window of a pair, whose noise is a function of the first one's.
        """
        # The last scored token is EOS.
        masked = int((example.scored & ~vocabulary.is_sentinel(example.targets)).sum()) - 1
        return ObservedNoise(raw_length, masked, first=first)

    def continuation(self, tokens_NxL: Tokens, vocabulary: Vocabulary) -> tuple[Examples, int]:
        """Return examples whose loss is on the continuation of each window, and the number of tokens that are given.

        The window is cut in the middle, or as close to it as the objective allows. Defined if `continues_text`.
        """
        raise NotImplementedError(f"{type(self).__name__} sets continues_text without defining continuation")

    def _text_ids(self, inputs: Tokens, targets: Tokens) -> tuple[list[int], list[int]]:
        """Return inputs without mode token and EOS, and targets without EOS."""
        return inputs[self.config.mode_tokens : -1].tolist(), targets[:-1].tolist()

    def _default_prompt_format(
        self, layout: Layout, *, sentinels: bool, infill: InfillFormat | None = None
    ) -> PromptFormat:
        """Return a format whose prompts are complete inputs, or the beginning of a text if there are no inputs."""
        has_inputs = self.config.has_inputs
        return PromptFormat(
            mode=self.config.mode,
            ends_in_eos=has_inputs,
            bidirectional=has_bidirectional_prefix(layout) and has_inputs,
            sentinels=sentinels,
            infill=infill,
        )
