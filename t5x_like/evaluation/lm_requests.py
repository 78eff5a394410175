"""Layout of lm-eval requests: token ids that a model reads for a context, and the tokens that are scored.

A model with separate inputs (an encoder-decoder, a prefix LM) reads a context as an objective's inputs, with its mode
token and EOS and bidirectional attention, and the continuation is the targets. A causal decoder reads one stream. Where
the targets of the mode are spans (R, X and T5's span corruption), the context ends in the first sentinel, and the
continuation begins with it; the sentinel is not scored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from t5x_like.data.objectives.prompts import PromptFormat, masked_text_format
from t5x_like.data.tokenizers.tokenizer import TokenizerProtocol
from t5x_like.decoding.log_likelihood import Score
from t5x_like.decoding.masked_prompts import special_tokens
from t5x_like.decoding.prompt_format import prompt_format
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.model_loading import LoadedModel

Pair = tuple[list[int], list[int]]


@dataclasses.dataclass(frozen=True)
class RequestFormat:
    """Format of requests for one model; see the module.

    Attributes:
      tokenizer: Tokenizer of the model.
      form: Prompt format of a context.
      inputs_length: With separate inputs, the largest number of tokens of a context with all added tokens; in a stream,
        that of context and targets.
      targets_length: With separate inputs, the largest number of tokens that are scored at once.

    Raises:
      ConfigError: the lengths leave no positions for text.
    """

    tokenizer: TokenizerProtocol
    form: PromptFormat
    inputs_length: int
    targets_length: int

    def __post_init__(self) -> None:
        # A window of a stream advances by its length minus one token.
        minimum = self._num_added + 2
        if self.inputs_length < minimum:
            raise ConfigError([ConfigProblem("max_length", str(self.inputs_length), f"at least {minimum}")])

    def pair(self, context: str, continuation: str) -> Pair:
        """Return inputs and targets for the log-likelihood of the continuation after the context.

        Spaces between the two belong to the continuation, as in the tokens of most vocabularies.
        """
        stripped = context.rstrip(" ")
        context, continuation = stripped, context[len(stripped) :] + continuation
        context_ids = self.tokenizer.encode(context)
        if self.form.ends_in_eos:
            return self.separate_inputs(context_ids, self.tokenizer.encode(continuation))
        target_ids = self.tokenizer.encode(context + continuation)[len(context_ids) :]
        return self.stream(context_ids, target_ids)

    def rolling(self, text: str) -> list[Pair]:
        """Return windows that score each token of the text once, after as much preceding text as fits.

        In a stream, each window but the first begins with context: one token, or in the last window as many as fit.
        """
        tokens = self.tokenizer.encode(text)
        if self.form.ends_in_eos:
            size = self.targets_length
            return [
                self.separate_inputs(tokens[:start], tokens[start : start + size])
                for start in range(0, len(tokens), size)
            ]
        longest = self.inputs_length - self._num_added
        windows = [self.stream([], tokens[:longest])] if tokens else []
        start = longest
        while start < len(tokens):
            target_ids = tokens[start : start + longest - 1]
            windows.append(self.stream(tokens[:start], target_ids))
            start += len(target_ids)
        return windows

    def prompt(self, context: str, new_tokens: int) -> list[int]:
        """Return the prompt for a continuation of the context by `new_tokens` tokens."""
        context_ids = self.tokenizer.encode(context.rstrip(" "))
        if self.form.ends_in_eos:
            return self.separate_inputs(context_ids, [])[0]
        return self._ids(
            context_ids[max(len(context_ids) - max(self.inputs_length - self._num_added - new_tokens, 0), 0) :]
        )

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of generated tokens; with span targets, that of the first span."""
        vocabulary = self.tokenizer.vocabulary
        ids = list(tokens)
        if self.form.sentinels:
            sentinels = [position for position, token in enumerate(ids) if token >= vocabulary.base_size]
            if sentinels:
                ids = ids[sentinels[0] + 1 : sentinels[1] if len(sentinels) > 1 else None]
        return self.tokenizer.decode(ids)

    def log_likelihood(self, score: Score) -> tuple[float, bool]:
        """Return the log-likelihood of the text, and True if it is the greedy continuation.

        A leading sentinel is not scored, but must be the first greedy token.
        """
        return sum(score.per_token[1:]) if self.form.sentinels else score.sum, score.is_greedy

    def separate_inputs(self, context_ids: Sequence[int], target_ids: Sequence[int]) -> Pair:
        """Return inputs and targets as separate sequences. A context that is too long is truncated on the left."""
        free = self.inputs_length - self._num_added
        sentinel = [self.tokenizer.vocabulary.sentinel_id(0)] if self.form.sentinels else []
        return self._ids([*context_ids[max(len(context_ids) - free, 0) :], *sentinel]), [*sentinel, *target_ids]

    def stream(self, context_ids: Sequence[int], target_ids: Sequence[int]) -> Pair:
        """Return inputs and targets of one stream, which share its length. A context that is too long is truncated."""
        free = max(self.inputs_length - self._num_added - len(target_ids), 0)
        return self._ids(context_ids[max(len(context_ids) - free, 0) :]), list(target_ids)

    def _ids(self, tokens: Sequence[int]) -> list[int]:
        return self.form.ids(tokens, self.tokenizer.vocabulary)

    @property
    def longest_context(self) -> int:
        """Largest number of tokens of a context that is not truncated, with the targets where both share a stream."""
        return self.inputs_length - self._num_added

    @property
    def _num_added(self) -> int:
        """Number of tokens that are added to a context: mode, sentinel and EOS."""
        return len(self._ids([])) + self.form.sentinels


def request_format(loaded: LoadedModel, *, mode: str | None = None, max_length: int | None = None) -> RequestFormat:
    """Return the request format of a model.

    Args:
      mode: Mode token as of `generate --mode`; None: S if it was trained.
      max_length: Replaces the lengths of training (for a model that is not a run: 512 and 128, or its number of learned
        positions): the length of a context, or of context and continuation in a stream.

    Raises:
      ConfigError: the model is an encoder, the mode was not trained, or the lengths leave no positions for text.
      DataError: the model has no tokenizer that can be read.
    """
    model, data = loaded.run.model, loaded.run.data
    if model.decoder is None:
        fix = "an encoder has no likelihood of text; `lm-eval` and `eval` score it by its masked tokens"
        raise ConfigError([ConfigProblem(str(loaded.path), "an encoder", "a model with a decoder", fix)])
    form = (
        prompt_format(data, mode)
        if loaded.kind == "run"
        else PromptFormat(mode=None, ends_in_eos=model.encoder is not None, bidirectional=False, sentinels=False)
    )
    if mode is not None and loaded.kind != "run":
        raise ConfigError([ConfigProblem("mode", mode, "none: the modes of a model that is not a run are unknown")])
    longest = data.inputs_length if form.ends_in_eos else data.row_length
    return RequestFormat(loaded.tokenizer, form, max_length or longest, data.targets_length or longest)


def masked_request_format(loaded: LoadedModel, *, max_length: int | None = None) -> RequestFormat:
    """Return the request format of a model that predicts masked tokens: context and continuation are one text.

    Args:
      loaded: The model.
      max_length: Replaces the length of a row in training (for a model that is not a run: 512, or its number of learned
        positions).
    """
    data, special = loaded.run.data, sum(map(len, special_tokens(loaded)))
    longest = (max_length or data.row_length) - special
    return RequestFormat(loaded.tokenizer, masked_text_format(), longest, longest)


def allowed_tokens(loaded: LoadedModel, request_format: RequestFormat) -> Any:
    """Return bool [V], the tokens that the model may generate."""
    return request_format.form.allowed(request_format.tokenizer.vocabulary, loaded.run.model.vocab_size)
