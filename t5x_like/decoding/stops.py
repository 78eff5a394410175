"""Stop strings: found in the text as it is made, wherever its tokens are cut.

The strings become an automaton over bytes (Aho and Corasick 1975), and that one over tokens: a table of the state that
each token leads to from each state, since a token stands for known bytes. So the device sees a stop string in the very
step that completes it, exactly and without text. The host then cuts the text where the string begins.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from t5x_like.config import ConfigError, Problem

FOUND = 1
"""The state in which a stop string has been seen; no token leads out of it."""
MOST_STATES = 2**9
"""Bytes of all stop strings together, about."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stops:
    """Attributes:
    strings: UTF-8.
    next_SxV: int16, the state after each token; state 0 is the first and `FOUND` the last.
    """

    strings: tuple[bytes, ...]
    next_SxV: npt.NDArray[np.int16]

    def cut(self, text: bytes) -> tuple[bytes, bool]:
        """The text up to the stop string that ends first, and whether there is one. Of strings that end at the same
        byte the longest counts."""
        ends = [(text.find(stop) + len(stop), -len(stop)) for stop in self.strings if stop in text]
        if not ends:
            return text, False
        end, minus_length = min(ends)
        return text[: end + minus_length], True


def make_stops(strings: Sequence[str], pieces: Sequence[bytes], table_size: int) -> Stops:
    """Compiles stop strings for a vocabulary.

    Args:
      strings: Not empty.
      pieces: The bytes that each id stands for in the text, b"" for what is not shown.
      table_size: Ids of the model, at least as many; those without a piece stand for nothing.

    Raises:
      ConfigError: an empty string, or more of them than a table should hold.
    """
    stops = tuple(dict.fromkeys(string.encode() for string in strings))
    if not all(stops):
        raise ConfigError([Problem("stop", "an empty string", "text that ends the output")])
    if sum(map(len, stops)) > MOST_STATES:
        found = f"{sum(map(len, stops)):,} bytes of stop strings"
        raise ConfigError([Problem("stop", found, f"at most {MOST_STATES:,} in all")])
    next_SxB = _byte_automaton(stops)
    states = len(next_SxB)
    lengths_V = np.zeros(table_size, np.int64)
    lengths_V[: len(pieces)] = [len(piece) for piece in pieces]
    state_SxV = np.repeat(np.arange(states, dtype=np.int16)[:, None], table_size, axis=1)
    for place in range(int(lengths_V.max(initial=0))):
        having = np.flatnonzero(lengths_V > place)
        bytes_of = np.array([pieces[token][place] for token in having.tolist()])
        state_SxV[:, having] = next_SxB[state_SxV[:, having], bytes_of]
    return Stops(stops, state_SxV)


def _byte_automaton(stops: Sequence[bytes]) -> npt.NDArray[np.int16]:
    """[states, 256]."""
    edges: list[dict[int, int]] = [{}, {}]
    ends = {FOUND}
    for stop in stops:
        state = 0
        for byte in stop:
            if byte not in edges[state]:
                edges.append({})
                edges[state][byte] = len(edges) - 1
            state = edges[state][byte]
        ends.add(state)
    table = np.zeros((len(edges), 256), np.int16)
    fallback = [0] * len(edges)
    queue = deque(edges[0].values())
    table[0, list(edges[0])] = list(edges[0].values())
    while queue:
        state = queue.popleft()
        table[state] = table[fallback[state]]
        if fallback[state] in ends:
            ends.add(state)
        for byte, child in edges[state].items():
            fallback[child] = int(table[fallback[state], byte])
            table[state, byte] = child
            queue.append(child)
    table[np.isin(table, list(ends))] = FOUND
    table[FOUND] = FOUND
    return table
