"""Speculative decoding: a draft proposes several tokens, the model reads all of them in one pass and keeps some.

Token x is kept with probability min(1, p(x) / q(x)), where p is the model's distribution and q the draft's; at the
first that is not, one is drawn from what p has more than q, and behind the last one more from p. So every pass gives at
least one token, and what comes out is distributed as without a draft (Leviathan et al. 2023, "Fast Inference from
Transformers via Speculative Decoding"; Chen et al. 2023). Greedy rows have all probability on one token, and come out
token for token the same. Settings of sampling, penalties and constraints hold for p and q alike, after each token.

Rows keep different numbers of tokens: each row's cache is rolled back to what it kept.
"""

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
_PROPOSING, _ACCEPTING, _REPLACING = range(1, 4)


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


class Speculated(NamedTuple):
    """Rows that are being decoded, or are done. A pytree of fixed shapes.

    Attributes:
      tokens_RxN: int32, 0 behind a row's last token.
      made_R: int32, tokens of each row.
      last_R: int32, the newest of them, which the caches have not got yet.
      done_R: bool.
      passes_R: int32, how often the model has read a row's proposals.
      cache: Of the tokens before `last_R`.
      chooser: Of `choosing`, behind `last_R`.
      draft: The draft's state.
    """

    tokens_RxN: Array
    made_R: Array
    last_R: Array
    done_R: Array
    passes_R: Array
    cache: Cache
    chooser: State
    draft: Tree


def decode_speculatively(
    decode: Decode,
    logits_RxV: Array,
    cache: Cache,
    *,
    rules: Rules,
    chooser: State,
    ends: Callable[[Array], Array],
    draft: Draft,
    draft_state: Tree,
    limits_R: Array,
    cells: int,
) -> Speculated:
    """Decodes until each row has ended or has as many tokens as its limit.

    Args:
      decode: The model's step.
      logits_RxV: Of the first token, with the cache that has all before it; the cache was made for steps of G + 1.
      ends: int32 tokens [...] -> bool [...], whether generated text ends with them.
      draft_state: Of the draft, which has read the same prompts.
      limits_R: int32, at most `cells`; rows with 0 are done at once.
      cells: Of the result, N.
    """
    token_R, stopped_R, chooser = choosing.choose(logits_RxV, rules, chooser)
    done_R = limits_R < 1
    begun = Speculated(
        tokens_RxN=jnp.zeros((limits_R.size, cells), jnp.int32).at[:, 0].set(jnp.where(done_R, 0, token_R)),
        made_R=jnp.where(done_R, 0, 1),
        last_R=token_R,
        done_R=done_R | ends(token_R) | stopped_R | (limits_R <= 1),
        passes_R=jnp.zeros_like(limits_R),
        cache=cache,
        chooser=chooser,
        draft=draft_state,
    )

    def step(now: Speculated) -> Speculated:
        live_R = (~now.done_R).astype(jnp.int32)
        proposal, draft_state = draft.propose(now.draft, now.last_R, live_R, rules, now.chooser)
        tokens_RxT = jnp.concatenate([now.last_R[:, None], proposal.tokens_RxG], axis=1)
        logits_RxTxV, cache = decode(tokens_RxT, now.cache, live_R * tokens_RxT.shape[1])
        accepted_R, final_R, choosers = _verify(logits_RxTxV, proposal, rules, now.chooser)

        # The kept proposals and the token behind them, up to the first that ends the row.
        count = tokens_RxT.shape[1]
        place_T = jnp.arange(count)
        of_row = jnp.pad(proposal.tokens_RxG, ((0, 0), (0, 1)))
        emitted_RxT = jnp.where(place_T == accepted_R[:, None], final_R[:, None], of_row)
        before = _select(choosers, accepted_R)
        after = choosing.advance(final_R, rules, before)
        stopped_RxT = jnp.stack([choosing.found_stop(one) for one in choosers[1:]] + [jnp.zeros_like(now.done_R)], 1)
        stopped_RxT = jnp.where(place_T == accepted_R[:, None], choosing.found_stop(after)[:, None], stopped_RxT)
        over_RxT = ends(emitted_RxT) | stopped_RxT | (now.made_R[:, None] + place_T + 1 >= limits_R[:, None])
        earlier_RxT = jnp.cumsum(over_RxT, axis=1) - over_RxT
        is_new_RxT = (place_T <= accepted_R[:, None]) & (earlier_RxT == 0) & ~now.done_R[:, None]
        # What is not new goes behind the last cell, and is dropped.
        cell_RxT = jnp.where(is_new_RxT, now.made_R[:, None] + place_T, cells)
        rows = jnp.arange(limits_R.size)[:, None]
        return Speculated(
            tokens_RxN=now.tokens_RxN.at[rows, cell_RxT].set(emitted_RxT, mode="drop"),
            made_R=now.made_R + jnp.sum(is_new_RxT, axis=1),
            last_R=final_R,
            done_R=now.done_R | jnp.any(over_RxT & is_new_RxT, axis=1),
            passes_R=now.passes_R + live_R,
            cache=cache.rolled_back(now.cache.lengths + live_R * (1 + accepted_R)),
            chooser=after,
            draft=draft.keep(draft_state, tokens_RxT, live_R * (1 + accepted_R)),
        )

    return jax.lax.while_loop(lambda now: ~jnp.all(now.done_R), step, begun)


def _verify(logits_RxTxV: Array, proposal: Proposal, rules: Rules, chooser: State) -> tuple[Array, Array, list[State]]:
    """How many proposed tokens each row keeps, the token behind them, and the states before each of the T tokens."""
    tokens_RxG, log_q_RxGxV = proposal
    count = tokens_RxG.shape[1]
    choosers, log_p = [chooser], []
    for place in range(count + 1):
        log_p.append(jax.nn.log_softmax(choosing.distribution(logits_RxTxV[:, place], rules, choosers[-1])))
        if place < count:
            choosers.append(choosing.advance(tokens_RxG[:, place], rules, choosers[-1]))

    kept_R = jnp.ones(len(tokens_RxG), bool)
    accepted_R = jnp.zeros(len(tokens_RxG), jnp.int32)
    behind = []
    for place in range(count):
        token_Rx1 = tokens_RxG[:, place, None]
        log_q_RxV = (
            jnp.where(jnp.arange(log_p[0].shape[-1]) == token_Rx1, 0.0, -jnp.inf)
            if log_q_RxGxV is None
            else log_q_RxGxV[:, place]
        )
        uniform_R = jax.vmap(jax.random.uniform)(_keys(rules, choosers[place], _ACCEPTING))
        ratio_R = (jnp.take_along_axis(log_p[place], token_Rx1, 1) - jnp.take_along_axis(log_q_RxV, token_Rx1, 1))[:, 0]
        kept_R &= uniform_R < jnp.exp(jnp.minimum(ratio_R, 0.0))
        accepted_R += kept_R
        behind.append(residual(log_p[place], log_q_RxV))
    behind.append(log_p[count])
    last_RxV = jnp.take_along_axis(jnp.stack(behind, axis=1), accepted_R[:, None, None], axis=1)[:, 0]
    keys_R = _keys(rules, _select(choosers, accepted_R), _REPLACING)
    return accepted_R, jax.vmap(jax.random.categorical)(keys_R, last_RxV).astype(jnp.int32), choosers


def residual(log_p: Array, log_q: Array) -> Array:
    """Logits [..., V] of what p has more than q, from which the token is drawn that takes a rejected one's place.

    Where p is q but for rounding nothing is left; a rejection, which has probability 0 then, would draw from p.
    """
    more = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0)
    return jnp.where(jnp.sum(more, axis=-1, keepdims=True) > 0, jnp.log(more), log_p)


def _keys(rules: Rules, chooser: State, purpose: int) -> Array:
    keys_R = draw_keys(rules.seeds_R, rules.rows_R, chooser.made_R)
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys_R)


def _select(states: list[State], index_R: Array) -> State:
    """Of each row the state with its index."""

    def select(*leaves: Array) -> Array:
        stacked = jnp.stack(leaves)
        return stacked[index_R, jnp.arange(index_R.size)]

    return jax.tree.map(select, *states)


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
            keys_R = _keys(rules, chooser, _PROPOSING)
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
