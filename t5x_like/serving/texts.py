"""An answer's text as its tokens come: cut at a stop string, and given out only as far as it will not change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"


class Growing:
    """Text of tokens that come a few at a time.

    Attributes:
      tokens: All that came.
      stopped: A stop string is complete; what follows it is no part of the text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]):
        self._decode, self._stops = decode, stops
        self.tokens: list[int] = []
        self.stopped = False
        self._given = 0
        self._text = ""

    def add(self, tokens: Sequence[int], *, last: bool) -> str:
        """What can be given out now and was not before.

        Held back, unless these tokens are the `last`: an end that may be the beginning of a stop string, and one that
        may be the beginning of a character.
        """
        if self.stopped:
            return ""
        self.tokens += tokens
        text = self._decode(self.tokens)
        ends = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
        if ends:
            end, minus_length = min(ends)
            text, self.stopped = text[: end + minus_length], True
        elif not last:
            text = text.rstrip(_REPLACEMENT)
            held = max((_overlap(text, stop) for stop in self._stops), default=0)
            text = text[: len(text) - held]
        # Decoders may change what they said of the last token, but not before what has been given out.
        new = text[self._given :]
        self._given = max(self._given, len(text))
        self._text += new
        return new

    @property
    def text(self) -> str:
        """All that has been given out."""
        return self._text


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end that are a beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
