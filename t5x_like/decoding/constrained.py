"""Constrained decoding: an automaton on the device that decides which tokens may follow the tokens of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from t5x_like.errors import DataError

NO_TOKEN = -1
FREE = 0
"""State that allows every token and is never left."""
_DONE = 1


class Automaton(NamedTuple):
    """Deterministic automaton over tokens: each state allows a few tokens, each of which leads to a state. A pytree.

    Attributes:
      tokens_SxD: int32, tokens that state s allows, `NO_TOKEN` in unused entries. A state without any token allows all
        tokens and is never left.
      next_SxD: int32, states that these tokens lead to.
    """

    tokens_SxD: jax.Array | npt.NDArray[np.int32]
    next_SxD: jax.Array | npt.NDArray[np.int32]

    def allowed(self, state_R: jax.Array, vocab_size: int) -> jax.Array:
        """Return bool [R, V], the tokens that each row's state allows."""
        tokens_RxD = jnp.asarray(self.tokens_SxD)[state_R]
        row_Rx1 = jnp.arange(len(state_R))[:, None]
        # Unused entries are marked in an additional last column, which is cut off.
        column_RxD = jnp.where(tokens_RxD == NO_TOKEN, vocab_size, tokens_RxD)
        listed_RxV = jnp.zeros((len(state_R), vocab_size + 1), bool).at[row_Rx1, column_RxD].set(True)[:, :vocab_size]
        return listed_RxV | jnp.all(tokens_RxD == NO_TOKEN, axis=-1, keepdims=True)

    def advance(self, state_R: jax.Array, token_R: jax.Array) -> jax.Array:
        """Return the states after these tokens. A row whose state does not list its token keeps its state."""
        matches_RxD = jnp.asarray(self.tokens_SxD)[state_R] == token_R[:, None]
        next_R = jnp.max(jnp.where(matches_RxD, jnp.asarray(self.next_SxD)[state_R], -1), axis=-1)
        return jnp.where(next_R < 0, state_R, next_R)


class Constraints:
    """Builder of one automaton for rows with different constraints. Rows with equal choices share their states."""

    def __init__(self, eos_id: int):
        self._eos_id = eos_id
        # State 0 is FREE, without edges; state 1 allows EOS only, so that a row that has ended stays ended.
        self._edges: list[dict[int, int]] = [{}, {eos_id: _DONE}]
        self._start_states: dict[tuple[tuple[int, ...], ...], int] = {}

    def choices(self, choices: Sequence[Sequence[int]]) -> int:
        """Add a constraint to exactly one of the choices, followed by EOS, and return its initial state.

        Args:
          choices: Token ids without EOS; one choice may be the beginning of another.

        Raises:
          DataError: there are no choices, or one is empty.
        """
        # Sorted, so that equal sets of choices in any order share their states.
        key = tuple(sorted({tuple(choice) for choice in choices}))
        if not key or not key[0]:
            found = "an empty choice" if key else "no choices"
            raise DataError(f"found {found}, expected one or more choices of at least one token")
        if key not in self._start_states:
            self._start_states[key] = self._add_state()
            for choice in key:
                self._edges[self._add_path(self._start_states[key], choice)][self._eos_id] = _DONE
        return self._start_states[key]

    def forced(self, tokens: Sequence[int]) -> int:
        """Add a constraint to these tokens first and any tokens after them, and return its initial state."""
        if not tokens:
            return FREE
        start = self._add_state()
        # After the last forced token everything is allowed.
        self._edges[self._add_path(start, tokens[:-1])][tokens[-1]] = FREE
        return start

    def automaton(self) -> Automaton:
        """Return the automaton. Its shape is rounded up to powers of two, to compile few different programs."""
        height = 1 << (len(self._edges) - 1).bit_length()
        width = 1 << (max(map(len, self._edges)) - 1).bit_length()
        tokens_SxD, next_SxD = np.full((height, width), NO_TOKEN, np.int32), np.zeros((height, width), np.int32)
        for state, edges in enumerate(self._edges):
            tokens_SxD[state, : len(edges)] = list(edges)
            next_SxD[state, : len(edges)] = list(edges.values())
        return Automaton(tokens_SxD, next_SxD)

    def _add_state(self) -> int:
        self._edges.append({})
        return len(self._edges) - 1

    def _add_path(self, state: int, tokens: Sequence[int]) -> int:
        """Return the state after the tokens from `state`, and add the states that are missing on the way."""
        for token in tokens:
            if token not in self._edges[state]:
                child = self._add_state()
                self._edges[state][token] = child
            state = self._edges[state][token]
        return state
