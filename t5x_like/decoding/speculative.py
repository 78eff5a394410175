"""Speculative decoding: a draft proposes several tokens, the model reads all of them in one pass and keeps some.

Token x is kept with probability min(1, p(x) / q(x)), where p is the model's distribution and q the draft's; at the
first that is not, one is drawn from what p has more than q, and behind the last one more from p. So every pass gives at
least one token, and what comes out is distributed as without a draft (Leviathan et al. 2023, "Fast Inference from
Transformers via Speculative Decoding"; Chen et al. 2023). Greedy rows have all probability on one token, and come out
token for token the same. Settings of sampling, penalties and constraints hold for p and q alike, after each token.

Rows keep different numbers of tokens: each row's cache is rolled back to what it kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config import ConfigError, Problem
from t5x_like.decoding import choosing
from t5x_like.decoding.choosing import Rules, State
from t5x_like.decoding.drafts import (
    ACCEPTING,
    REPLACING,
    Decode,
    Draft,
    ModelDraft,
    PromptLookup,
    Proposal,
    purpose_keys,
)
from t5x_like.decoding.loop import read_prompts
from t5x_like.decoding.ready import decoding_model
from t5x_like.models.cache import Cache
from t5x_like.models.model import Model
from t5x_like.program import Program

Tree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Speculation:
    """How tokens are proposed.

    Attributes:
      tokens: Proposed for each pass of the model.
      draft: A smaller model of the same vocabulary and its parameters, on the same mesh; None: what followed the same
        tokens before, in the prompt or the answer.
      longest_match: Tokens that are compared for that, at most.
    """

    tokens: int = 4
    draft: tuple[Program, Tree] | None = None
    longest_match: int = 3

    def require(self, program: Program) -> None:
        """Raises ConfigError where `draft` cannot propose for `program`."""
        problems = []
        if self.tokens < 1:
            problems.append(Problem("draft tokens", str(self.tokens), "at least 1"))
        if self.draft is not None:
            own, other = program.run.model, self.draft[0].run.model
            for name in ("architecture", "vocab_size", "start_id", "eos_ids", "pad_id"):
                if getattr(own, name) != getattr(other, name):
                    problems.append(Problem(f"the draft's {name}", str(getattr(other, name)), str(getattr(own, name))))
            if self.draft[0].mesh != program.mesh:
                problems.append(Problem("the draft's mesh", str(self.draft[0].mesh.shape), str(program.mesh.shape)))
        if problems:
            raise ConfigError(problems)


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
        uniform_R = jax.vmap(jax.random.uniform)(purpose_keys(rules, choosers[place], ACCEPTING))
        ratio_R = (jnp.take_along_axis(log_p[place], token_Rx1, 1) - jnp.take_along_axis(log_q_RxV, token_Rx1, 1))[:, 0]
        kept_R &= uniform_R < jnp.exp(jnp.minimum(ratio_R, 0.0))
        accepted_R += kept_R
        behind.append(residual(log_p[place], log_q_RxV))
    behind.append(log_p[count])
    last_RxV = jnp.take_along_axis(jnp.stack(behind, axis=1), accepted_R[:, None, None], axis=1)[:, 0]
    keys_R = purpose_keys(rules, _select(choosers, accepted_R), REPLACING)
    return accepted_R, jax.vmap(jax.random.categorical)(keys_R, last_RxV).astype(jnp.int32), choosers


def residual(log_p: Array, log_q: Array) -> Array:
    """Logits [..., V] of what p has more than q, from which the token is drawn that takes a rejected one's place.

    Where p is q but for rounding nothing is left; a rejection, which has probability 0 then, would draw from p.
    """
    more = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0)
    return jnp.where(jnp.sum(more, axis=-1, keepdims=True) > 0, jnp.log(more), log_p)


def _select(states: list[State], index_R: Array) -> State:
    """Of each row the state with its index."""

    def select(*leaves: Array) -> Array:
        stacked = jnp.stack(leaves)
        return stacked[index_R, jnp.arange(index_R.size)]

    return jax.tree.map(select, *states)


@functools.partial(
    jax.jit, static_argnums=(0, 2), static_argnames=("count", "longest_match", "cells", "bidirectional", "cache_dtype")
)
def speculate_batch(
    program: Program,
    params: Tree,
    draft_program: Program | None,
    draft_params: Tree,
    batch: Mapping[str, Array],
    rules: Rules,
    *,
    count: int,
    longest_match: int,
    cells: int,
    bidirectional: bool,
    cache_dtype: str | None,
) -> tuple[Array, Array, Array]:
    """New tokens [R, N] with zeros behind a row's end, their numbers [R], and the model's passes over proposals [R]."""
    config = program.run.model
    tokens_RxP, lengths_R = batch["tokens"], batch["lengths"]

    def read(model: Model) -> tuple[Array, Cache]:
        return read_prompts(
            model,
            tokens_RxP,
            lengths_R,
            cells,
            bidirectional=bidirectional,
            widest_step=count + 1,
            cache_dtype=cache_dtype,
        )

    def step(model: Model) -> Decode:
        return lambda tokens, cache, counts: model.decode(tokens, cache, counts_B=counts)

    with program.activations():
        model = decoding_model(program, params)
        logits_RxV, cache = read(model)
        if draft_program is None:
            lookup = PromptLookup(count, longest_match)
            draft: Draft = lookup
            draft_state: Tree = lookup.start(tokens_RxP, lengths_R, cells)
        else:
            smaller = decoding_model(draft_program, draft_params)
            draft, draft_state = ModelDraft(step(smaller), count), read(smaller)[1]
        if config.encoder is not None:
            tokens_RxP, lengths_R = jnp.full_like(tokens_RxP[:, :1], config.start_id), jnp.ones_like(lengths_R)
        result = decode_speculatively(
            step(model),
            logits_RxV,
            cache,
            rules=rules,
            chooser=choosing.start(rules, tokens_RxP, lengths_R, logits_RxV.shape[-1]),
            ends=lambda tokens: jnp.isin(tokens, jnp.array(config.eos_ids, jnp.int32)),
            draft=draft,
            draft_state=draft_state,
            limits_R=batch["limits"],
            cells=cells,
        )
        whole = NamedSharding(program.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint((result.tokens_RxN, result.made_R, result.passes_R), whole)
