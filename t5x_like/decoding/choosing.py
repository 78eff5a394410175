"""What decides about the next token of each row, as one pytree for the loops: settings that stay, a state that moves.

rules = Rules(allowed=..., sampling=..., seeds_R=..., rows_R=...)
state = start(rules, tokens_RxP, lengths_R, vocab_size)
token_R, found_stop_R, state = choose(logits_RxV, rules, state)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_like.decoding import sampling as samplers
from t5x_like.decoding.constraints import Automaton
from t5x_like.decoding.sampling import RowSampling
from t5x_like.decoding.stops import FOUND


class Rules(NamedTuple):
    """What does not change while R rows are decoded. What is None is not computed.

    Attributes:
      allowed: bool [V] or [R, V], tokens that may be chosen at all.
      sampling: Of each row.
      seeds_R: uint32; with `rows_R`, int32, and the position they decide about each draw.
      automaton: Decides which of the allowed tokens may come next; its rows start in `start_state_R`, int32.
      stops_SxV: int16, `Stops.next_SxV`.
    """

    allowed: jax.Array
    sampling: RowSampling
    seeds_R: jax.Array
    rows_R: jax.Array
    automaton: Automaton | None = None
    start_state_R: jax.Array | None = None
    stops_SxV: jax.Array | None = None


class State(NamedTuple):
    """Attributes:
    made_R: int32, tokens that each row has chosen.
    seen_RxV: bool, tokens that the decoder has read or chosen; None without a penalty.
    automaton_R, stop_R: int32 states; None without.
    """

    made_R: jax.Array
    seen_RxV: jax.Array | None = None
    automaton_R: jax.Array | None = None
    stop_R: jax.Array | None = None


def start(rules: Rules, tokens_RxP: jax.Array, lengths_R: jax.Array, vocab_size: int) -> State:
    """The state before the first choice.

    Args:
      tokens_RxP: What the decoder reads first, the start token included: the prompt, or the start token alone beside
        an encoder.
      lengths_R: Tokens of each row that are not padding.
    """
    made_R = jnp.zeros_like(rules.rows_R)
    seen_RxV = None
    if rules.sampling.penalty_R is not None:
        rows, length = tokens_RxP.shape
        # Ids beyond the table occur in no logits; padding goes to a column behind the last.
        column_RxP = jnp.where(jnp.arange(length) < lengths_R[:, None], tokens_RxP, vocab_size)
        seen_RxV = jnp.zeros((rows, vocab_size + 1), bool).at[jnp.arange(rows)[:, None], column_RxP].set(True)
        seen_RxV = seen_RxV[:, :vocab_size]
    automaton_R = None if rules.automaton is None else rules.start_state_R
    return State(made_R, seen_RxV, automaton_R, None if rules.stops_SxV is None else jnp.zeros_like(made_R))


def processed(logits_RxV: jax.Array, rules: Rules, state: State) -> jax.Array:
    """float32 logits after the penalty, minus infinity for what must not come next: what greedy decoding takes the
    maximum of."""
    logits_RxV = logits_RxV.astype(jnp.float32)
    if state.seen_RxV is not None and rules.sampling.penalty_R is not None:
        logits_RxV = samplers.penalize(logits_RxV, state.seen_RxV, rules.sampling.penalty_R)
    logits_RxV = samplers.restrict(logits_RxV, rules.allowed)
    if rules.automaton is not None and state.automaton_R is not None:
        logits_RxV = samplers.restrict(logits_RxV, rules.automaton.allowed(state.automaton_R, logits_RxV.shape[-1]))
    return logits_RxV


def distribution(logits_RxV: jax.Array, rules: Rules, state: State) -> jax.Array:
    """Logits of the distribution that the next token is drawn from; of a greedy row, all of it is on one token."""
    logits_RxV = processed(logits_RxV, rules, state)
    if rules.sampling.temperature_R is None:
        greedy = RowSampling(temperature_R=jnp.zeros(logits_RxV.shape[0], jnp.float32))
        return samplers.warp(logits_RxV, greedy)
    return samplers.warp(logits_RxV, rules.sampling)


def choose(logits_RxV: jax.Array, rules: Rules, state: State) -> tuple[jax.Array, jax.Array, State]:
    """(tokens int32 [R], whether a stop string is complete with them bool [R], the state with them)."""
    keys_R = samplers.draw_keys(rules.seeds_R, rules.rows_R, state.made_R)
    token_R = samplers.choose(processed(logits_RxV, rules, state), keys_R, rules.sampling)
    state = advance(token_R, rules, state)
    return token_R, found_stop(state), state


def advance(token_R: jax.Array, rules: Rules, state: State) -> State:
    """The state after tokens that something else chose."""
    seen_RxV, automaton_R, stop_R = state.seen_RxV, state.automaton_R, state.stop_R
    if seen_RxV is not None:
        seen_RxV = seen_RxV.at[jnp.arange(len(token_R)), token_R].set(True)
    if rules.automaton is not None and automaton_R is not None:
        automaton_R = rules.automaton.advance(automaton_R, token_R)
    if rules.stops_SxV is not None and stop_R is not None:
        stop_R = rules.stops_SxV[stop_R, token_R].astype(jnp.int32)
    return State(state.made_R + 1, seen_RxV, automaton_R, stop_R)


def found_stop(state: State) -> jax.Array:
    """bool [R]: a stop string is complete."""
    if state.stop_R is None:
        return jnp.zeros(state.made_R.shape, bool)
    return state.stop_R == FOUND


def reorder(state: State, rows_R: jax.Array) -> State:
    """The states of other rows, as of the beams that go on."""
    return jax.tree.map(lambda leaf: leaf[rows_R], state)
