"""Log-probabilities of tokens beside their text: what a token stands for, and where its text begins."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from t5x_like.data.tokenizers.tokenizer import TokenizerProtocol, pieces
from t5x_like.decoding.token_logprobs import TokenLogprob

_LOWEST = -9999.0
"""In place of minus infinity, which JSON cannot express."""


class TokenText(NamedTuple):
    """A token as responses show it.

    Attributes:
      name: Its text, or the name of a special token; bytes that are no complete UTF-8 are escaped, so that the names of
        different tokens differ.
      data: The bytes that it adds to a text.
    """

    name: str
    data: bytes


class TextLogprob(NamedTuple):
    """Log-probability of a token of a text.

    Attributes:
      token: The token.
      offset: Number of characters of the text before its first one.
      logprob: In nats; None for a token that the model does not predict.
      top: The most likely tokens at this position, descending; empty where `logprob` is None.
    """

    token: TokenText
    offset: int
    logprob: float | None
    top: tuple[tuple[TokenText, float], ...]


def token_texts(tokenizer: TokenizerProtocol) -> Callable[[int], TokenText]:
    """Return the function from an id to its text."""

    # The most likely tokens of many positions are the same few.
    @functools.lru_cache(maxsize=2**16)
    def text_of(token: int) -> TokenText:
        (data,) = pieces(tokenizer, [token])
        try:
            name = data.decode()
        except UnicodeDecodeError:
            name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return TokenText(name if data else tokenizer.vocabulary.special_name(token) or "", data)

    return text_of


class LogprobLog:
    """Log-probabilities of the tokens of one text: they arrive in parts and leave with their part of the text."""

    def __init__(
        self, text_of: Callable[[int], TokenText], decode: Callable[[Sequence[int]], str], num_top: int
    ) -> None:
        """
        Args:
          text_of: See `token_texts`.
          decode: Converts ids to text.
          num_top: Number of the most likely tokens that are kept at a position.
        """
        self._text_of, self._decode, self._num_top = text_of, decode, num_top
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting: list[TextLogprob] = []
        self._offset = 0
        self._is_empty = True

    def add(self, entries: Sequence[TokenLogprob]) -> None:
        """Append the next tokens."""
        for entry in entries:
            token = self._text_of(entry.token)
            top = [(self._text_of(other), max(logprob, _LOWEST)) for other, logprob in entry.top[: self._num_top]]
            logprob = None if entry.logprob is None else max(entry.logprob, _LOWEST)
            self._waiting.append(TextLogprob(token, self._offset, logprob, tuple(top)))
            characters = self._characters.decode(token.data)
            if self._is_empty and token.data:
                self._is_empty = False
                # Some tokenizers put a space before a text, which decoding removes again.
                if characters.startswith(" ") and self._decode([entry.token]) == characters[1:]:
                    characters = characters[1:]
            self._offset += len(characters)

    def take(self, end: int | None) -> list[TextLogprob]:
        """Remove and return the tokens whose text begins before `end` characters; None: all tokens."""
        count = len(self._waiting)
        if end is not None:
            count = next((index for index, entry in enumerate(self._waiting) if entry.offset >= end), count)
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken


def completion_logprobs(entries: Sequence[TextLogprob]) -> dict[str, Any]:
    """Return `logprobs` of a choice of OpenAI's completions.

    The most likely tokens are an object with their names as keys, and the token itself is among them.
    """

    def top(entry: TextLogprob) -> dict[str, float] | None:
        if entry.logprob is None:
            return None
        # Of tokens with one name, the most likely one is the first.
        named: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            named.setdefault(token.name, logprob)
        return named

    return {
        "text_offset": [entry.offset for entry in entries],
        "tokens": [entry.token.name for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [top(entry) for entry in entries],
    }


def chat_logprobs(entries: Sequence[TextLogprob]) -> dict[str, Any]:
    """Return `logprobs` of a choice of OpenAI's chat completions."""

    def element(token: TokenText, logprob: float | None) -> dict[str, Any]:
        return {"token": token.name, "logprob": logprob, "bytes": list(token.data)}

    content = [
        {**element(entry.token, entry.logprob), "top_logprobs": [element(*other) for other in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}
