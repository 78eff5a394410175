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


class Automaton(NamedTuple):
    """Each state allows a few tokens, and each of them leads to a state. A pytree.

    Attributes:
      tokens_SxD: int32, the tokens that state S allows, `NO_TOKEN` in cells that are not used.
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
        return jnp.zeros((len(state_R), vocab_size + 1), bool).at[row_Rx1, column_RxD].set(True)[:, :vocab_size]

    def advance(self, state_R: jax.Array, token_R: jax.Array) -> jax.Array:
        """The states after these tokens; a row whose token its state does not allow stays where it is."""
        here_RxD = jnp.asarray(self.tokens_SxD)[state_R] == token_R[:, None]
        next_R = jnp.max(jnp.where(here_RxD, jnp.asarray(self.next_SxD)[state_R], -1), axis=-1)
        return jnp.where(next_R < 0, state_R, next_R)


def trie(choices: Sequence[Sequence[int]], eos_id: int) -> Automaton:
    """Exactly one of the choices, and then EOS. Rows start in state 1; state 0 is behind the end.

    Args:
      choices: Token ids without EOS; one may be the beginning of another.

    Raises:
      DataError: no choices, or an empty one.
    """
    automaton, _ = forest([choices], eos_id)
    return automaton


def forest(choices_of_rows: Sequence[Sequence[Sequence[int]]], eos_id: int) -> tuple[Automaton, npt.NDArray[np.int32]]:
    """An automaton for rows with choices of their own, and the state [rows] that each of them starts in. Rows with the
    same choices share their states."""
    edges: list[dict[int, int]] = []

    def new_state() -> int:
        edges.append({})
        return len(edges) - 1

    starts: dict[tuple[tuple[int, ...], ...], int] = {}
    start_of_rows = []
    done = new_state()
    edges[done][eos_id] = done
    for choices in choices_of_rows:
        key = tuple(sorted({tuple(choice) for choice in choices}))
        if not key or not key[0]:
            found = "an empty choice" if key else "no choices"
            raise DataError(f"found {found}, expected one or more choices of at least one token")
        if key not in starts:
            starts[key] = new_state()
            for choice in key:
                state = starts[key]
                for token in choice:
                    if token not in edges[state]:
                        edges[state][token] = new_state()
                    state = edges[state][token]
                edges[state][eos_id] = done
        start_of_rows.append(starts[key])
    return _table(edges), np.array(start_of_rows, np.int32)


def _table(edges: Sequence[dict[int, int]]) -> Automaton:
    """Widths and heights are powers of two, so that automata of like sizes share what is compiled."""
    height = 1 << (len(edges) - 1).bit_length()
    width = 1 << (max(map(len, edges)) - 1).bit_length()
    tokens_SxD, next_SxD = np.full((height, width), NO_TOKEN, np.int32), np.zeros((height, width), np.int32)
    for state, of_state in enumerate(edges):
        tokens_SxD[state, : len(of_state)] = list(of_state)
        next_SxD[state, : len(of_state)] = list(of_state.values())
    return Automaton(tokens_SxD, next_SxD)
