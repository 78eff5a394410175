"""Constrained decoding: which tokens may come next after what a row has said, as an automaton on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from t5x_like.config import DataError

NO_TOKEN = -1
FREE = 0
"""The state that allows every token and is never left."""
_DONE = 1


class Automaton(NamedTuple):
    """Each state allows a few tokens, and each of them leads to a state. A pytree.

    Attributes:
      tokens_SxD: int32, the tokens that state S allows, `NO_TOKEN` in cells that are not used; a state without any
        allows all tokens, and is not left.
      next_SxD: int32, the states that they lead to.
    """

    tokens_SxD: jax.Array | npt.NDArray[np.int32]
    next_SxD: jax.Array | npt.NDArray[np.int32]

    def allowed(self, state_R: jax.Array, vocab_size: int) -> jax.Array:
        """bool [R, V]."""
        tokens_RxD = jnp.asarray(self.tokens_SxD)[state_R]
        row_Rx1 = jnp.arange(len(state_R))[:, None]
        # What is not used goes to a column behind the last.
        column_RxD = jnp.where(tokens_RxD == NO_TOKEN, vocab_size, tokens_RxD)
        listed_RxV = jnp.zeros((len(state_R), vocab_size + 1), bool).at[row_Rx1, column_RxD].set(True)[:, :vocab_size]
        return listed_RxV | jnp.all(tokens_RxD == NO_TOKEN, axis=-1, keepdims=True)

    def advance(self, state_R: jax.Array, token_R: jax.Array) -> jax.Array:
        """The states after these tokens; a row whose token its state does not list stays where it is."""
        here_RxD = jnp.asarray(self.tokens_SxD)[state_R] == token_R[:, None]
        next_R = jnp.max(jnp.where(here_RxD, jnp.asarray(self.next_SxD)[state_R], -1), axis=-1)
        return jnp.where(next_R < 0, state_R, next_R)


class Constraints:
    """Makes one automaton for rows with constraints of their own. Rows that ask for the same share their states."""

    def __init__(self, eos_id: int):
        self._eos_id = eos_id
        self._edges: list[dict[int, int]] = [{}, {eos_id: _DONE}]
        self._known: dict[tuple[tuple[int, ...], ...], int] = {}

    def choices(self, choices: Sequence[Sequence[int]]) -> int:
        """The state from which exactly one of the choices can be said, and then EOS.

        Args:
          choices: Token ids without EOS; one may be the beginning of another.

        Raises:
          DataError: no choices, or an empty one.
        """
        key = tuple(sorted({tuple(choice) for choice in choices}))
        if not key or not key[0]:
            found = "an empty choice" if key else "no choices"
            raise DataError(f"found {found}, expected one or more choices of at least one token")
        if key not in self._known:
            self._known[key] = self._new()
            for choice in key:
                self._edges[self._path(self._known[key], choice)][self._eos_id] = _DONE
        return self._known[key]

    def forced(self, tokens: Sequence[int]) -> int:
        """The state from which these tokens come first, and then anything."""
        if not tokens:
            return FREE
        start = self._new()
        self._edges[self._path(start, tokens[:-1])][tokens[-1]] = FREE
        return start

    def automaton(self) -> Automaton:
        """Widths and heights are powers of two, so that automata of like sizes share what is compiled."""
        height = 1 << (len(self._edges) - 1).bit_length()
        width = 1 << (max(map(len, self._edges)) - 1).bit_length()
        tokens_SxD, next_SxD = np.full((height, width), NO_TOKEN, np.int32), np.zeros((height, width), np.int32)
        for state, of_state in enumerate(self._edges):
            tokens_SxD[state, : len(of_state)] = list(of_state)
            next_SxD[state, : len(of_state)] = list(of_state.values())
        return Automaton(tokens_SxD, next_SxD)

    def _new(self) -> int:
        self._edges.append({})
        return len(self._edges) - 1

    def _path(self, state: int, tokens: Sequence[int]) -> int:
        for token in tokens:
            if token not in self._edges[state]:
                child = self._new()
                self._edges[state][token] = child
            state = self._edges[state][token]
        return state
