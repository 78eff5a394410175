"""Drafts for speculative decoding: a smaller model, or prompt lookup."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.decoding import token_selection
from t5x_like.decoding.sampling import draw_keys
from t5x_like.decoding.token_selection import SelectionParams, SelectionState
from t5x_like.models.kv_cache import KVCache
from t5x_like.utils.type_aliases import PyTree

Decode = Callable[[Array, KVCache, Array], tuple[Array, KVCache]]
"""(tokens [R, T], cache, number of valid tokens of each row [R]) -> (logits [R, T, V], cache with these tokens)."""

# Purposes of random keys: folded into the key of a position, so that no two draws at one position are correlated.
PROPOSING, ACCEPTING, REPLACING = range(1, 4)


class Proposal(NamedTuple):
    """Proposed tokens of R rows.

    Attributes:
      tokens_RxG: int32, G proposed tokens of each row.
      log_q_RxGxV: float32, log-probabilities of the distributions that the tokens were drawn from. None for a
        deterministic draft, whose distributions have all their probability on its tokens.
    """

    tokens_RxG: Array
    log_q_RxGxV: Array | None


class Draft(Protocol):
    """Source of proposed tokens. Its state is a pytree that the decoding loop carries."""

    def propose(
        self, state: PyTree, last_R: Array, live_R: Array, selection: SelectionParams, selection_state: SelectionState
    ) -> tuple[Proposal, PyTree]:
        """Return proposed tokens and the new state.

        Args:
          last_R: Newest token of each row, which the state does not contain yet.
          live_R: int32, 0 for rows that are done.
          selection_state: Selection state before the first proposed token.
        """

    def keep(self, state: PyTree, tokens_RxT: Array, kept_R: Array) -> PyTree:
        """Return the state of rows that keep the first `kept_R` of T = G + 1 tokens: `last_R` and the proposal."""


def purpose_keys(selection: SelectionParams, selection_state: SelectionState, purpose: int) -> Array:
    """Return each row's key for a draw at its next token, for one purpose."""
    keys_R = draw_keys(selection.seeds_R, selection.rows_R, selection_state.num_selected_R)
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys_R)


class ModelDraft:
    """Draft by a smaller model with the same vocabulary.

    Its state is its cache, which must have been created for steps of G + 1 tokens, since they are rolled back.
    """

    def __init__(self, decode: Decode, count: int):
        self.decode, self.count = decode, count

    def propose(
        self, state: KVCache, last_R: Array, live_R: Array, selection: SelectionParams, selection_state: SelectionState
    ) -> tuple[Proposal, KVCache]:
        def propose_one(
            carry: tuple[KVCache, Array, SelectionState], _: None
        ) -> tuple[tuple[KVCache, Array, SelectionState], Proposal]:
            cache, token_R, selection_state = carry
            logits_Rx1xV, cache = self.decode(token_R[:, None], cache, live_R)
            log_q_RxV = jax.nn.log_softmax(
                token_selection.sampling_logits(logits_Rx1xV[:, 0], selection, selection_state)
            )
            # A key of its own purpose: had the proposal the key of the acceptance test, the two would be correlated and
            # the result biased.
            keys_R = purpose_keys(selection, selection_state, PROPOSING)
            token_R = jax.vmap(jax.random.categorical)(keys_R, log_q_RxV).astype(jnp.int32)
            return (cache, token_R, token_selection.advance(token_R, selection, selection_state)), Proposal(
                token_R, log_q_RxV
            )

        # The draft's own selection state is thrown away: the accepted tokens decide the state after the pass.
        (cache, last_R, _), drawn = jax.lax.scan(propose_one, (state, last_R, selection_state), length=self.count)
        # The cache takes the last proposal too: if all are kept, the next proposals follow it.
        _, cache = self.decode(last_R[:, None], cache, live_R)
        assert drawn.log_q_RxGxV is not None
        tokens_RxG, log_q_RxGxV = jnp.swapaxes(drawn.tokens_RxG, 0, 1), jnp.swapaxes(drawn.log_q_RxGxV, 0, 1)
        return Proposal(tokens_RxG, log_q_RxGxV), cache

    def keep(self, state: KVCache, tokens_RxT: Array, kept_R: Array) -> KVCache:
        # Rows that are done (0 kept) added nothing.
        return state.truncate(state.lengths - jnp.where(kept_R > 0, tokens_RxT.shape[1] - kept_R, 0))


class LookupState(NamedTuple):
    """State of `PromptLookup`: tokens that each row has read and generated.

    Attributes:
      tokens_RxL: int32, long enough for all further tokens.
      lengths_R: int32, number of tokens without the newest one.
    """

    tokens_RxL: Array
    lengths_R: Array


class PromptLookup:
    """Draft by prompt lookup: proposes the tokens that followed the most recent tokens at an earlier position.

    It needs no second model, and gains much where an answer repeats its prompt. The longest match of up to `longest`
    tokens is used, of equally long ones the last.
    """

    def __init__(self, count: int, longest: int = 3):
        self.count, self.longest = count, longest

    def start(self, tokens_RxP: Array, lengths_R: Array, buffer_length: int) -> LookupState:
        """Return the initial state.

        Args:
          tokens_RxP: Prompts, of the encoder's input or the decoder's stream.
          buffer_length: Largest number of new tokens of a row.
        """
        # Room for all new tokens and for one pass that begins just before the limit.
        return LookupState(jnp.pad(tokens_RxP, ((0, 0), (0, buffer_length + self.count + 1))), lengths_R)

    def propose(
        self,
        state: LookupState,
        last_R: Array,
        live_R: Array,
        selection: SelectionParams,
        selection_state: SelectionState,
    ) -> tuple[Proposal, LookupState]:
        tokens_RxL, lengths_R = state
        rows, length = tokens_RxL.shape
        tokens_RxL = tokens_RxL.at[jnp.arange(rows), lengths_R].set(last_R)
        # For each position p, count how many of the tokens before and at p equal the row's newest tokens: the token
        # `back` positions before the newest one is compared with the one `back` positions before p.
        matches_RxL = jnp.ones((rows, length), bool)
        match_length_RxL = jnp.zeros((rows, length), jnp.int32)
        for back in range(self.longest):
            recent_Rx1 = jnp.take_along_axis(tokens_RxL, jnp.maximum(lengths_R - back, 0)[:, None], axis=1)
            shifted_RxL = jnp.pad(tokens_RxL, ((0, 0), (back, 0)), constant_values=-1)[:, :length]
            matches_RxL &= (shifted_RxL == recent_Rx1) & (lengths_R >= back)[:, None]
            match_length_RxL += matches_RxL
        # The longest match wins, of equally long ones the last. The newest token itself is excluded.
        position_L = jnp.arange(length)
        score_RxL = jnp.where(position_L < lengths_R[:, None], match_length_RxL * length + position_L, -1)
        best_R = jnp.argmax(score_RxL, axis=1)
        # A match near the end proposes padding. That costs nothing but a rejection.
        next_RxG = jnp.minimum(best_R[:, None] + 1 + jnp.arange(self.count), length - 1)
        return Proposal(jnp.take_along_axis(tokens_RxL, next_RxG, axis=1), None), state

    def keep(self, state: LookupState, tokens_RxT: Array, kept_R: Array) -> LookupState:
        rows, length = state.tokens_RxL.shape
        index_T = jnp.arange(tokens_RxT.shape[1])
        # Tokens that are not kept get a position after the buffer, and are dropped by the scatter.
        position_RxT = jnp.where(index_T < kept_R[:, None], state.lengths_R[:, None] + index_T, length)
        tokens_RxL = state.tokens_RxL.at[jnp.arange(rows)[:, None], position_RxT].set(tokens_RxT, mode="drop")
        return LookupState(tokens_RxL, state.lengths_R + kept_R)
