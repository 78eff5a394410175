"""Stop strings: detection on the device while tokens are decoded, and truncation of the text on the host.

The strings are compiled to an automaton over bytes (Aho and Corasick 1975, "Efficient string matching"). Each token
stands for known bytes, so the automaton over bytes gives one over tokens: a table of the next state for each state and
token. The device thus detects a stop string in the step that completes it, wherever the token boundaries are, without
producing text. The host then cuts the text where the stop string begins.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import AnyStr

import numpy as np
import numpy.typing as npt

from t5x_like.errors import ConfigError, ConfigProblem

FOUND = 1
"""State after a complete stop string; every token leads from it to itself."""
MAX_STATES = 2**9
"""Largest total number of bytes of all stop strings, which is about the number of states."""


@dataclasses.dataclass(frozen=True, eq=False)
class StopStrings:
    """Stop strings compiled for a vocabulary.

    Attributes:
      strings: The stop strings in UTF-8.
      next_SxV: int16 [states, vocabulary], state after each token. State 0 is the initial one, `FOUND` the final one.
    """

    strings: tuple[bytes, ...]
    next_SxV: npt.NDArray[np.int16]


def cut_at_stop(text: AnyStr, stops: Sequence[AnyStr]) -> tuple[AnyStr, bool]:
    """Return the text before the stop string that is completed first, and True if there is one.

    Of several stop strings that end at the same position the longest is cut. This is the text that decoding token by
    token and stopping at once would give.
    """
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        return text, False
    # First by the end, then by the negative length: of equal ends the longest string.
    end, minus_length = min(ends)
    return text[: end + minus_length], True


def find_end(tokens: Sequence[int], eos_ids: Sequence[int], stops: StopStrings | None) -> int | None:
    """Return the number of tokens before EOS, or up to and including the one that completes a stop string; None if
    neither occurs."""
    state = 0
    for position, token in enumerate(tokens):
        if token in eos_ids:
            return position
        state = state if stops is None else int(stops.next_SxV[state, token])
        if state == FOUND:
            return position + 1
    return None


def truncate(tokens: list[int], eos_ids: Sequence[int], stops: StopStrings | None) -> list[int]:
    """Return the tokens before EOS, or up to and including the token that completes a stop string."""
    return tokens[: find_end(tokens, eos_ids, stops)]


def compile_stop_strings(strings: Sequence[str], pieces: Sequence[bytes], table_size: int) -> StopStrings:
    """Compile stop strings for a vocabulary.

    Args:
      strings: Stop strings, none of them empty.
      pieces: Bytes of text that each token id stands for, b"" for ids without text.
      table_size: Number of ids of the model, at least the number of pieces; ids without a piece stand for no text.

    Raises:
      ConfigError: a stop string is empty, or all together are longer than `MAX_STATES` bytes.
    """
    stops = tuple(dict.fromkeys(string.encode() for string in strings))
    if not all(stops):
        raise ConfigError([ConfigProblem("stop", "an empty string", "text that ends the output")])
    if sum(map(len, stops)) > MAX_STATES:
        found = f"{sum(map(len, stops)):,} bytes of stop strings"
        raise ConfigError([ConfigProblem("stop", found, f"at most {MAX_STATES:,} in all")])
    next_SxB = _byte_automaton(stops)
    states = len(next_SxB)
    lengths_V = np.zeros(table_size, np.int64)
    lengths_V[: len(pieces)] = [len(piece) for piece in pieces]
    # Tokens without text leave the state as it is.
    state_SxV = np.repeat(np.arange(states, dtype=np.int16)[:, None], table_size, axis=1)
    # Follow the bytes of all tokens at once, from every state: the i-th pass follows the i-th byte of each token that
    # has one.
    for position in range(int(lengths_V.max(initial=0))):
        long_enough = np.flatnonzero(lengths_V > position)
        bytes_L = np.array([pieces[token][position] for token in long_enough.tolist()])
        state_SxV[:, long_enough] = next_SxB[state_SxV[:, long_enough], bytes_L]
    return StopStrings(stops, state_SxV)


def _byte_automaton(stops: Sequence[bytes]) -> npt.NDArray[np.int16]:
    """Return the Aho-Corasick automaton of the strings: int16 [states, 256], the state after each byte."""
    # A trie of the strings. State 1 is reserved for `FOUND`.
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
    # Breadth first, so that the row of a state's fallback, its longest proper suffix in the trie, is complete before
    # the state's own row: bytes without an edge lead where they lead from the fallback.
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
    # All states at which a string ends become one, which is never left.
    table[np.isin(table, list(ends))] = FOUND
    table[FOUND] = FOUND
    return table
