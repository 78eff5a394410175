"""A model as a function of text: what it is given for a context, and what of a text is scored.

A model whose inputs are closed (an encoder-decoder, a prefix LM) reads a context as an objective's inputs, with its
mode token and EOS, in both directions, and the continuation is its targets. A causal decoder reads one stream. Where
the mode's targets are spans (R, X and T5's own), the context ends in the first sentinel, which the continuation begins
with and which is not scored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from t5x_like.config import ConfigError, Problem
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.decoding.prompts import PromptFormat, prompt_format
from t5x_like.decoding.scoring import Score
from t5x_like.evaluation.opened import RUN, Opened

Pair = tuple[list[int], list[int]]


@dataclasses.dataclass(frozen=True)
class TextModel:
    """See the module.

    Attributes:
      form: How a context is laid out.
      inputs_length: Tokens of a closed context with all that is around it; of a stream, of context and targets.
      targets_length: Tokens that are scored at once, in closed forms.

    Raises:
      ConfigError: lengths without room for text.
    """

    tokenizer: Tokenizer
    form: PromptFormat
    inputs_length: int
    targets_length: int

    def __post_init__(self) -> None:
        # A window of a stream moves by all tokens but one.
        least = self._around + 2
        if self.inputs_length < least:
            raise ConfigError([Problem("max_length", str(self.inputs_length), f"at least {least}")])

    def pair(self, context: str, continuation: str) -> Pair:
        """Inputs and targets that say how likely the continuation is after the context. Spaces between the two belong
        to the continuation, where tokens have them."""
        stripped = context.rstrip(" ")
        context, continuation = stripped, context[len(stripped) :] + continuation
        given = self.tokenizer.encode(context)
        if self.form.ends_in_eos:
            return self.closed(given, self.tokenizer.encode(continuation))
        wanted = self.tokenizer.encode(context + continuation)[len(given) :]
        return self.stream(given, wanted)

    def rolling(self, text: str) -> list[Pair]:
        """Windows that score each token of the text once, each after as much of the text before it as fits. (In a
        stream, a window that is not the last goes on after one token of context, and the last one is full.)"""
        tokens = self.tokenizer.encode(text)
        if self.form.ends_in_eos:
            size = self.targets_length
            return [self.closed(tokens[:start], tokens[start : start + size]) for start in range(0, len(tokens), size)]
        longest = self.inputs_length - self._around
        windows = [self.stream([], tokens[:longest])] if tokens else []
        start = longest
        while start < len(tokens):
            wanted = tokens[start : start + longest - 1]
            windows.append(self.stream(tokens[:start], wanted))
            start += len(wanted)
        return windows

    def prompt(self, context: str, new_tokens: int) -> list[int]:
        """What the model is given to go on with the context by so many tokens."""
        given = self.tokenizer.encode(context.rstrip(" "))
        if self.form.ends_in_eos:
            return self.closed(given, [])[0]
        return self._ids(given[max(len(given) - max(self.inputs_length - self._around - new_tokens, 0), 0) :])

    def text(self, tokens: Sequence[int]) -> str:
        """What the model has said; of spans, the first one."""
        vocabulary = self.tokenizer.vocabulary
        said = list(tokens)
        if self.form.sentinels:
            places = [place for place, token in enumerate(said) if token >= vocabulary.base_size]
            said = said[places[0] + 1 : places[1] if len(places) > 1 else None] if places else said
        return self.tokenizer.decode(said)

    def log_likelihood(self, score: Score) -> tuple[float, bool]:
        """Of the text alone: a sentinel in front is given, and only asked to be what greedy decoding says first."""
        return sum(score.per_token[1:]) if self.form.sentinels else score.sum, score.is_greedy

    def closed(self, given: Sequence[int], wanted: Sequence[int]) -> Pair:
        """A context that is too long keeps its end."""
        room = self.inputs_length - self._around
        sentinel = [self.tokenizer.sentinel_id(0)] if self.form.sentinels else []
        return self._ids([*given[max(len(given) - room, 0) :], *sentinel]), [*sentinel, *wanted]

    def stream(self, given: Sequence[int], wanted: Sequence[int]) -> Pair:
        """As `closed`; context and continuation share their room."""
        room = max(self.inputs_length - self._around - len(wanted), 0)
        return self._ids(given[max(len(given) - room, 0) :]), list(wanted)

    def _ids(self, tokens: Sequence[int]) -> list[int]:
        return self.form.ids(tokens, self.tokenizer.vocabulary)

    @property
    def _around(self) -> int:
        """Tokens of a context that are no text: mode, sentinel and EOS."""
        return len(self._ids([])) + self.form.sentinels


def text_model(opened: Opened, *, mode: str | None = None, max_length: int | None = None) -> TextModel:
    """How the opened model reads text.

    Args:
      mode: As of `generate --mode`; None: S if it was trained.
      max_length: In place of the training's lengths (512 and 128 of a model that is no run, or the positions it has
        learned): of a closed context, or of context and continuation in a stream.

    Raises:
      ConfigError: an encoder, a mode that was not trained, lengths without room for text, or a model whose tokenizer is
        not known here.
    """
    model, data = opened.run.model, opened.run.data
    if model.decoder is None:
        fix = "an encoder has no likelihood of a text; `eval` scores its masked tokens and its head"
        raise ConfigError([Problem(str(opened.path), "an encoder", "a model with a decoder", fix)])
    if opened.tokenizer is None:
        found = "no tokenizer that is known here"
        expected = "a run on a prepared store, or a model with a spiece.model beside it"
        raise ConfigError([Problem(str(opened.path), found, expected)])
    form = (
        prompt_format(data, mode)
        if opened.kind == RUN
        else PromptFormat(mode=None, ends_in_eos=model.encoder is not None, bidirectional=False, sentinels=False)
    )
    if mode is not None and opened.kind != RUN:
        raise ConfigError([Problem("mode", mode, "none: the modes of a model that is no run are not known")])
    longest = data.inputs_length if form.ends_in_eos else data.row_length
    return TextModel(opened.tokenizer, form, max_length or longest, data.targets_length or longest)


def allowed(opened: Opened, model: TextModel) -> Any:
    """[V] of the tokens that the model may say."""
    return model.form.allowed(model.tokenizer.vocabulary, opened.run.model.vocab_size)
