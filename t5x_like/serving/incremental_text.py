"""Incremental detokenization: text of a completion while its tokens arrive, cut at stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from t5x_like.decoding.stop_strings import cut_at_stop

_REPLACEMENT = "\ufffd"
"""Character that decoders give for bytes that are no complete UTF-8 character."""


class IncrementalDetokenizer:
    """Converts tokens that arrive a few at a time to text that is never revised.

    Attributes:
      tokens: All tokens so far.
      stopped: A stop string is complete; the text ends before it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str], echoed: Sequence[int] = ()):
        """
        Args:
          decode: Converts ids to text.
          stops: Strings that end the text.
          echoed: Tokens whose text begins the text. They are decoded with those that follow, since a tokenizer may
            remove the space before the first word of a text. Stop strings are looked for after them only.
        """
        self._decode, self._stops = decode, stops
        self._echoed = list(echoed)
        self._num_echoed = len(decode(self._echoed).rstrip(_REPLACEMENT)) if self._echoed else 0
        self.tokens: list[int] = []
        self.stopped = False
        self._num_emitted = 0
        self._text = ""

    def add(self, tokens: Sequence[int], *, last: bool) -> str:
        """Return the new text that is final after these tokens.

        Unless these tokens are the `last`, two kinds of endings are held back: the possible beginning of a stop
        string, and an incomplete character.
        """
        if self.stopped:
            return ""
        self.tokens += tokens
        # All tokens are decoded again, since a decoder may give an earlier token other text once its successor is
        # known.
        whole = self._decode([*self._echoed, *self.tokens])
        echo, text = whole[: self._num_echoed], whole[self._num_echoed :]
        text, self.stopped = cut_at_stop(text, self._stops)
        if not self.stopped and not last:
            text = text.rstrip(_REPLACEMENT)
            held_back = max((_overlap(text, stop) for stop in self._stops), default=0)
            text = text[: len(text) - held_back]
        text = echo + text
        # A decoder may revise the text of the last token, but nothing that has been emitted.
        new = text[self._num_emitted :]
        self._num_emitted = max(self._num_emitted, len(text))
        self._text += new
        return new

    @property
    def text(self) -> str:
        """All text that has been returned so far."""
        return self._text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` that the text ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
