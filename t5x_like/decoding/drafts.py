"""What proposes tokens for `speculative`: a smaller model, or what followed the same tokens before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.decoding import choosing
from t5x_like.decoding.choosing import Rules, State
from t5x_like.decoding.sampling import draw_keys
from t5x_like.models.cache import Cache

Tree = Any
Decode = Callable[[Array, Cache, Array], tuple[Array, Cache]]
"""(tokens [R, T], a cache, how many of the T are a row's [R]) -> (logits [R, T, V], the cache with them)."""

# What a key is drawn for, so that no two draws at one position share their numbers.
PROPOSING, ACCEPTING, REPLACING = range(1, 4)


class Proposal(NamedTuple):
    """Attributes:
    tokens_RxG: int32.
    log_q_RxGxV: float32, log-probabilities that each token was drawn with; None where the draft draws nothing: all of
      its probability is on its token.
    """

    tokens_RxG: Array
    log_q_RxGxV: Array | None


class Draft(Protocol):
    """What proposes tokens. Its state is a pytree that the loop carries."""

    def propose(self, state: Tree, last_R: Array, live_R: Array, rules: Rules, chooser: State) -> tuple[Proposal, Tree]:
        """Args:
        last_R: The token behind those that the state knows.
        live_R: int32, 0 for rows that are done.
        chooser: Of `choosing`, before the first proposed token.
        """

    def keep(self, state: Tree, tokens_RxT: Array, kept_R: Array) -> Tree:
        """The state of rows that go on behind `kept_R` of the T = G + 1 tokens `last_R` and those proposed."""


def purpose_keys(rules: Rules, chooser: State, purpose: int) -> Array:
    """A key of each row for its next token, for one purpose."""
    keys_R = draw_keys(rules.seeds_R, rules.rows_R, chooser.made_R)
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys_R)


class ModelDraft:
    """A smaller model with the same vocabulary. Its state is its cache, made for steps of G + 1 that are undone."""

    def __init__(self, decode: Decode, count: int):
        self.decode, self.count = decode, count

    def propose(
        self, state: Cache, last_R: Array, live_R: Array, rules: Rules, chooser: State
    ) -> tuple[Proposal, Cache]:
        def propose_one(carry: tuple[Cache, Array, State], _: None) -> tuple[tuple[Cache, Array, State], Proposal]:
            cache, token_R, chooser = carry
            logits_Rx1xV, cache = self.decode(token_R[:, None], cache, live_R)
            log_q_RxV = jax.nn.log_softmax(choosing.distribution(logits_Rx1xV[:, 0], rules, chooser))
            keys_R = purpose_keys(rules, chooser, PROPOSING)
            token_R = jax.vmap(jax.random.categorical)(keys_R, log_q_RxV).astype(jnp.int32)
            return (cache, token_R, choosing.advance(token_R, rules, chooser)), Proposal(token_R, log_q_RxV)

        (cache, last_R, _), drawn = jax.lax.scan(propose_one, (state, last_R, chooser), length=self.count)
        # The last token as well: if all are kept, the next proposals follow it.
        _, cache = self.decode(last_R[:, None], cache, live_R)
        assert drawn.log_q_RxGxV is not None
        tokens_RxG, log_q_RxGxV = jnp.swapaxes(drawn.tokens_RxG, 0, 1), jnp.swapaxes(drawn.log_q_RxGxV, 0, 1)
        return Proposal(tokens_RxG, log_q_RxGxV), cache

    def keep(self, state: Cache, tokens_RxT: Array, kept_R: Array) -> Cache:
        return state.rolled_back(state.lengths - jnp.where(kept_R > 0, tokens_RxT.shape[1] - kept_R, 0))


class Stream(NamedTuple):
    """The state of `PromptLookup`: what each row has read and said.

    Attributes:
      tokens_RxL: int32, L with room for all that will come.
      lengths_R: int32, without the newest token.
    """

    tokens_RxL: Array
    lengths_R: Array


class PromptLookup:
    """Proposes what followed the same tokens before, in the prompt or in what has been said: no second model, and much
    gained where an answer repeats its prompt. The longest match of up to `longest` tokens counts, of equal ones the
    last."""

    def __init__(self, count: int, longest: int = 3):
        self.count, self.longest = count, longest

    def start(self, tokens_RxP: Array, lengths_R: Array, cells: int) -> Stream:
        """Args:
        tokens_RxP: The prompt, of an encoder's or of the decoder's stream.
        cells: Tokens that a row will say, at most.
        """
        return Stream(jnp.pad(tokens_RxP, ((0, 0), (0, cells + self.count + 1))), lengths_R)

    def propose(
        self, state: Stream, last_R: Array, live_R: Array, rules: Rules, chooser: State
    ) -> tuple[Proposal, Stream]:
        tokens_RxL, lengths_R = state
        rows, cells = tokens_RxL.shape
        tokens_RxL = tokens_RxL.at[jnp.arange(rows), lengths_R].set(last_R)
        matches_RxL = jnp.ones((rows, cells), bool)
        matched_RxL = jnp.zeros((rows, cells), jnp.int32)
        for back in range(self.longest):
            # The token `back` cells before the newest, beside those as far before each place.
            wanted_Rx1 = jnp.take_along_axis(tokens_RxL, jnp.maximum(lengths_R - back, 0)[:, None], axis=1)
            there_RxL = jnp.pad(tokens_RxL, ((0, 0), (back, 0)), constant_values=-1)[:, :cells]
            matches_RxL &= (there_RxL == wanted_Rx1) & (lengths_R >= back)[:, None]
            matched_RxL += matches_RxL
        places_L = jnp.arange(cells)
        score_RxL = jnp.where(places_L < lengths_R[:, None], matched_RxL * cells + places_L, -1)
        found_R = jnp.argmax(score_RxL, axis=1)
        next_RxG = jnp.minimum(found_R[:, None] + 1 + jnp.arange(self.count), cells - 1)
        return Proposal(jnp.take_along_axis(tokens_RxL, next_RxG, axis=1), None), state

    def keep(self, state: Stream, tokens_RxT: Array, kept_R: Array) -> Stream:
        rows, cells = state.tokens_RxL.shape
        place_T = jnp.arange(tokens_RxT.shape[1])
        cell_RxT = jnp.where(place_T < kept_R[:, None], state.lengths_R[:, None] + place_T, cells)
        tokens_RxL = state.tokens_RxL.at[jnp.arange(rows)[:, None], cell_RxT].set(tokens_RxT, mode="drop")
        return Stream(tokens_RxL, state.lengths_R + kept_R)
