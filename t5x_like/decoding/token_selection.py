"""Selection of the next token of each row, as one pytree of settings and one of state for the decoding loops.

selection = SelectionParams(allowed=..., sampling=..., seeds_R=..., rows_R=...)
state = initial_state(selection, tokens_RxP, lengths_R, vocab_size)
token_R, found_stop_R, state = select_tokens(logits_RxV, selection, state)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_like.decoding import sampling as samplers
from t5x_like.decoding.constrained import Automaton
from t5x_like.decoding.sampling import RowSampling
from t5x_like.decoding.stop_strings import FOUND

NOT_FINITE = -1
"""In place of a token whose logits are not finite. No token has this id, so the host needs no second array."""


class SelectionParams(NamedTuple):
    """Settings that stay constant while R rows are decoded. No work is compiled for a setting whose value is None.

    Attributes:
      allowed: bool [V] or [R, V], tokens that may be selected at any position.
      sampling: Temperature, top-k, top-p, min-p and repetition penalty of each row.
      seeds_R: uint32, seed of each row's draws.
      rows_R: int32, row number of each row. The key of a draw is a function of seed, row number and position.
      automaton: Constraint on which of the allowed tokens may come next.
      start_state_R: int32, initial state of each row in the automaton.
      stops_SxV: int16, `StopStrings.next_SxV`.
    """

    allowed: jax.Array
    sampling: RowSampling
    seeds_R: jax.Array
    rows_R: jax.Array
    automaton: Automaton | None = None
    start_state_R: jax.Array | None = None
    stops_SxV: jax.Array | None = None


class SelectionState(NamedTuple):
    """State of the selection, carried by a decoding loop.

    Attributes:
      num_selected_R: int32, number of tokens that each row has selected.
      seen_RxV: bool, tokens that the decoder has read or selected; None without a repetition penalty.
      automaton_R: int32, state of each row in the automaton; None without one.
      stop_R: int32, state of each row in the automaton of stop strings; None without one.
    """

    num_selected_R: jax.Array
    seen_RxV: jax.Array | None = None
    automaton_R: jax.Array | None = None
    stop_R: jax.Array | None = None


def initial_state(
    selection: SelectionParams, tokens_RxP: jax.Array, lengths_R: jax.Array, vocab_size: int
) -> SelectionState:
    """Return the state before the first token is selected.

    Args:
      tokens_RxP: Tokens that the decoder reads first, the start token included: the prompt, or the start token alone in
        an encoder-decoder.
      lengths_R: Number of tokens of each row that are not padding.
    """
    num_selected_R = jnp.zeros_like(selection.rows_R)
    seen_RxV = None
    if selection.sampling.penalty_R is not None:
        rows, length = tokens_RxP.shape
        # Padding is marked in an additional last column, which is cut off. Ids beyond the table occur in no logits and
        # are dropped by the scatter.
        column_RxP = jnp.where(jnp.arange(length) < lengths_R[:, None], tokens_RxP, vocab_size)
        seen_RxV = jnp.zeros((rows, vocab_size + 1), bool).at[jnp.arange(rows)[:, None], column_RxP].set(True)
        seen_RxV = seen_RxV[:, :vocab_size]
    automaton_R = None if selection.automaton is None else selection.start_state_R
    stop_R = None if selection.stops_SxV is None else jnp.zeros_like(num_selected_R)
    return SelectionState(num_selected_R, seen_RxV, automaton_R, stop_R)


def process_logits(logits_RxV: jax.Array, selection: SelectionParams, state: SelectionState) -> jax.Array:
    """Return float32 logits [R, V] after the repetition penalty, minus infinity for tokens that are not allowed.

    Greedy decoding selects the maximum of these logits.
    """
    logits_RxV = logits_RxV.astype(jnp.float32)
    if state.seen_RxV is not None and selection.sampling.penalty_R is not None:
        logits_RxV = samplers.apply_repetition_penalty(logits_RxV, state.seen_RxV, selection.sampling.penalty_R)
    logits_RxV = samplers.restrict(logits_RxV, selection.allowed)
    if selection.automaton is not None and state.automaton_R is not None:
        allowed_RxV = selection.automaton.allowed(state.automaton_R, logits_RxV.shape[-1])
        logits_RxV = samplers.restrict(logits_RxV, allowed_RxV)
    return logits_RxV


def sampling_logits(logits_RxV: jax.Array, selection: SelectionParams, state: SelectionState) -> jax.Array:
    """Return the logits [R, V] of the distribution that the next token is drawn from.

    The distribution of a greedy row has all its probability on one token.
    """
    logits_RxV = process_logits(logits_RxV, selection, state)
    if selection.sampling.temperature_R is None:
        # Without settings all rows are greedy. A temperature of 0 gives them the one-point distribution that
        # speculation needs.
        greedy = RowSampling(temperature_R=jnp.zeros(logits_RxV.shape[0], jnp.float32))
        return samplers.warp(logits_RxV, greedy)
    return samplers.warp(logits_RxV, selection.sampling)


def not_finite(logits: jax.Array) -> jax.Array:
    """Return bool [...], True for logits [..., V] that hold NaN or infinity, as of weights that are not finite.

    Minus infinity excludes a token and is no fault.
    """
    return (jnp.isnan(logits) | jnp.isposinf(logits)).any(-1)


def select_tokens(
    logits_RxV: jax.Array, selection: SelectionParams, state: SelectionState
) -> tuple[jax.Array, jax.Array, SelectionState]:
    """Select the next token of each row.

    Returns:
      Tokens int32 [R], bool [R] where the token completes a stop string, and the state after the tokens.
    """
    # The key depends on the number of selected tokens and not on the step of the loop: a request that joins a running
    # batch gets the draws that it would get alone.
    keys_R = samplers.draw_keys(selection.seeds_R, selection.rows_R, state.num_selected_R)
    token_R = samplers.sample(process_logits(logits_RxV, selection, state), keys_R, selection.sampling)
    state = advance(token_R, selection, state)
    return token_R, found_stop(state), state


def advance(token_R: jax.Array, selection: SelectionParams, state: SelectionState) -> SelectionState:
    """Return the state after the tokens `token_R`, which may come from another source than `select_tokens`."""
    seen_RxV, automaton_R, stop_R = state.seen_RxV, state.automaton_R, state.stop_R
    if seen_RxV is not None:
        seen_RxV = seen_RxV.at[jnp.arange(len(token_R)), token_R].set(True)
    if selection.automaton is not None and automaton_R is not None:
        automaton_R = selection.automaton.advance(automaton_R, token_R)
    if selection.stops_SxV is not None and stop_R is not None:
        # The table advances by whole tokens, whose bytes can complete a stop string in their middle.
        stop_R = selection.stops_SxV[stop_R, token_R].astype(jnp.int32)
    # Counted for done rows as well, whose draws nobody reads.
    return SelectionState(state.num_selected_R + 1, seen_RxV, automaton_R, stop_R)


def found_stop(state: SelectionState) -> jax.Array:
    """Return bool [R], True where a stop string is complete."""
    if state.stop_R is None:
        return jnp.zeros(state.num_selected_R.shape, bool)
    return state.stop_R == FOUND


def reorder(state: SelectionState, rows_R: jax.Array) -> SelectionState:
    """Return the states of the rows with the given indices, in that order."""
    return jax.tree.map(lambda leaf: leaf[rows_R], state)
