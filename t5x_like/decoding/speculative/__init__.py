"""Speculative decoding: a draft proposes several tokens, the model reads all of them in one pass and keeps some.

A proposed token x is accepted with probability min(1, p(x) / q(x)), where p is the model's distribution and q the
draft's. The first rejected token is replaced by a draw from the normalized positive part of p - q, and if all tokens
are accepted, one more is drawn from p. Every pass thus yields at least one token, and the result has the same
distribution as without a draft (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding";
Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling"). Greedy rows have all
probability on one token, and get the same tokens. Sampling settings, penalties and constraints apply to p and q alike,
after each token.

Rows accept different numbers of tokens, so each row's cache is truncated to its own length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.decoding import token_selection
from t5x_like.decoding.decode_loop import read_prompts
from t5x_like.decoding.inference_params import decoding_model
from t5x_like.decoding.speculative.drafts import (
    ACCEPTING,
    REPLACING,
    Decode,
    Draft,
    ModelDraft,
    PromptLookup,
    Proposal,
    purpose_keys,
)
from t5x_like.decoding.token_selection import NOT_FINITE, SelectionParams, SelectionState
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.models.kv_cache import KVCache
from t5x_like.models.model import Model
from t5x_like.program import Program
from t5x_like.utils.type_aliases import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Speculation:
    """Settings of speculation.

    Attributes:
      tokens: Number of tokens that are proposed for each pass of the model.
      draft: Smaller model of the same vocabulary and its parameters, on the same mesh. None: prompt lookup.
      longest_match: Largest number of tokens that prompt lookup compares.
    """

    tokens: int = 4
    draft: tuple[Program, PyTree] | None = None
    longest_match: int = 3

    def require(self, program: Program) -> None:
        """Check that the draft fits the model.

        Raises:
          ConfigError: the draft cannot propose tokens for `program`.
        """
        problems = []
        if self.tokens < 1:
            problems.append(ConfigProblem("draft tokens", str(self.tokens), "at least 1"))
        if self.draft is not None:
            target, draft = program.run.model, self.draft[0].run.model
            for name in ("architecture", "vocab_size", "decoder_start_token_id", "eos_ids", "pad_token_id"):
                if getattr(target, name) != getattr(draft, name):
                    problems.append(
                        ConfigProblem(f"the draft's {name}", str(getattr(draft, name)), str(getattr(target, name)))
                    )
            if self.draft[0].mesh != program.mesh:
                problems.append(
                    ConfigProblem("the draft's mesh", str(self.draft[0].mesh.shape), str(program.mesh.shape))
                )
        if problems:
            raise ConfigError(problems)


class SpeculativeState(NamedTuple):
    """State of the loop for R rows, some of them done. A pytree of fixed shapes.

    Attributes:
      tokens_RxN: int32, new tokens; 0 after a row's last token, which is `NOT_FINITE` if its logits are not finite.
      num_new_R: int32, number of new tokens of each row.
      last_R: int32, newest token of each row; the caches do not contain it yet.
      done_R: bool, True for rows that have ended.
      passes_R: int32, number of the model's passes over each row's proposals.
      cache: Keys and values of all tokens before `last_R`.
      selection_state: Selection state after `last_R`.
      draft: State of the draft.
    """

    tokens_RxN: Array
    num_new_R: Array
    last_R: Array
    done_R: Array
    passes_R: Array
    cache: KVCache
    selection_state: SelectionState
    draft: PyTree


def decode_speculatively(
    decode: Decode,
    logits_RxV: Array,
    cache: KVCache,
    *,
    selection: SelectionParams,
    selection_state: SelectionState,
    ends: Callable[[Array], Array],
    draft: Draft,
    draft_state: PyTree,
    limits_R: Array,
    buffer_length: int,
) -> SpeculativeState:
    """Decode until each row has ended or has reached its limit.

    Args:
      decode: Step of the model.
      logits_RxV: Logits of the first new token.
      cache: Keys and values of all tokens before it; created for steps of G + 1 tokens.
      selection_state: Selection state before the first new token.
      ends: Maps int32 tokens [...] to bool [...], True for tokens that end a text.
      draft_state: State of the draft, which has read the same prompts.
      limits_R: int32, largest number of new tokens of each row, at most `buffer_length`. Rows with 0 are done at once.
      buffer_length: Length N of the result.
    """
    token_R, stopped_R, selection_state = token_selection.select_tokens(logits_RxV, selection, selection_state)
    done_R = limits_R < 1
    invalid_R = token_selection.not_finite(logits_RxV)
    first_R = jnp.where(done_R, 0, jnp.where(invalid_R, NOT_FINITE, token_R))
    initial = SpeculativeState(
        tokens_RxN=jnp.zeros((limits_R.size, buffer_length), jnp.int32).at[:, 0].set(first_R),
        num_new_R=jnp.where(done_R, 0, 1),
        last_R=token_R,
        done_R=done_R | invalid_R | ends(token_R) | stopped_R | (limits_R <= 1),
        passes_R=jnp.zeros_like(limits_R),
        cache=cache,
        selection_state=selection_state,
        draft=draft_state,
    )

    def step(state: SpeculativeState) -> SpeculativeState:
        live_R = (~state.done_R).astype(jnp.int32)
        proposal, draft_state = draft.propose(state.draft, state.last_R, live_R, selection, state.selection_state)
        # The model reads the newest token and the G proposals: T = G + 1 tokens, whose logits predict each
        # proposal and the token after the last one.
        tokens_RxT = jnp.concatenate([state.last_R[:, None], proposal.tokens_RxG], axis=1)
        # Rows that are done have a count of 0: their tokens are not added to the cache.
        logits_RxTxV, cache = decode(tokens_RxT, state.cache, live_R * tokens_RxT.shape[1])
        accepted_R, final_R, selection_states = _verify(logits_RxTxV, proposal, selection, state.selection_state)

        # New tokens of this pass: the accepted proposals and the final token, up to the first that ends the row.
        index_T = jnp.arange(tokens_RxT.shape[1])
        is_final_RxT = index_T == accepted_R[:, None]
        proposed_RxT = jnp.pad(proposal.tokens_RxG, ((0, 0), (0, 1)))
        emitted_RxT = jnp.where(is_final_RxT, final_R[:, None], proposed_RxT)
        # Logits t decide on token t. Those after the final token are of no token.
        invalid_RxT = token_selection.not_finite(logits_RxTxV)
        emitted_RxT = jnp.where(invalid_RxT, NOT_FINITE, emitted_RxT)
        # Penalties and constraints depend on the tokens before, so there is one selection state per number of accepted
        # tokens.
        before_final = _take_state(selection_states, accepted_R)
        after_final = token_selection.advance(final_R, selection, before_final)
        stopped_RxT = jnp.stack(
            [token_selection.found_stop(after) for after in selection_states[1:]] + [jnp.zeros_like(state.done_R)], 1
        )
        stopped_RxT = jnp.where(is_final_RxT, token_selection.found_stop(after_final)[:, None], stopped_RxT)
        at_limit_RxT = state.num_new_R[:, None] + index_T + 1 >= limits_R[:, None]
        ends_RxT = ends(emitted_RxT) | stopped_RxT | at_limit_RxT | invalid_RxT
        # Accepted tokens after an end of text are not emitted, although model and draft agree on them.
        num_ends_before_RxT = jnp.cumsum(ends_RxT, axis=1) - ends_RxT
        is_new_RxT = (index_T <= accepted_R[:, None]) & (num_ends_before_RxT == 0) & ~state.done_R[:, None]
        # Tokens that are not new get a position after the buffer, and are dropped by the scatter.
        position_RxT = jnp.where(is_new_RxT, state.num_new_R[:, None] + index_T, buffer_length)
        rows = jnp.arange(limits_R.size)[:, None]
        num_read_R = live_R * (1 + accepted_R)
        return SpeculativeState(
            tokens_RxN=state.tokens_RxN.at[rows, position_RxT].set(emitted_RxT, mode="drop"),
            num_new_R=state.num_new_R + jnp.sum(is_new_RxT, axis=1),
            last_R=final_R,
            done_R=state.done_R | jnp.any(ends_RxT & is_new_RxT, axis=1),
            passes_R=state.passes_R + live_R,
            # The pass wrote T tokens into the cache; only the newest token and the accepted proposals remain.
            cache=cache.truncate(state.cache.lengths + num_read_R),
            selection_state=after_final,
            draft=draft.keep(draft_state, tokens_RxT, num_read_R),
        )

    return jax.lax.while_loop(lambda state: ~jnp.all(state.done_R), step, initial)


def _verify(
    logits_RxTxV: Array, proposal: Proposal, selection: SelectionParams, selection_state: SelectionState
) -> tuple[Array, Array, list[SelectionState]]:
    """Accept or reject the proposed tokens.

    Returns:
      The number of accepted tokens of each row [R], the token after them [R], and the selection states before each of
      the T tokens.
    """
    tokens_RxG, log_q_RxGxV = proposal
    count = tokens_RxG.shape[1]
    selection_states, log_p = [selection_state], []
    for index in range(count + 1):
        logits_RxV = token_selection.sampling_logits(logits_RxTxV[:, index], selection, selection_states[-1])
        # p is the distribution after temperature, truncation, penalties and constraints. The draft's q went through the
        # same settings, or the ratio p / q would compare different distributions.
        log_p.append(jax.nn.log_softmax(logits_RxV))
        if index < count:
            selection_states.append(token_selection.advance(tokens_RxG[:, index], selection, selection_states[-1]))

    accepted_so_far_R = jnp.ones(len(tokens_RxG), bool)
    num_accepted_R = jnp.zeros(len(tokens_RxG), jnp.int32)
    # Distribution of the final token for each number of accepted tokens.
    final_logits = []
    for index in range(count):
        token_Rx1 = tokens_RxG[:, index, None]
        log_q_RxV = (
            # A deterministic draft has q = 1 on its token: it is accepted with probability p.
            jnp.where(jnp.arange(log_p[0].shape[-1]) == token_Rx1, 0.0, -jnp.inf)
            if log_q_RxGxV is None
            else log_q_RxGxV[:, index]
        )
        uniform_R = jax.vmap(jax.random.uniform)(purpose_keys(selection, selection_states[index], ACCEPTING))
        ratio_R = (jnp.take_along_axis(log_p[index], token_Rx1, 1) - jnp.take_along_axis(log_q_RxV, token_Rx1, 1))[:, 0]
        # `&=`: after the first rejection no later token counts. A token that p excludes has ratio minus infinity and is
        # never accepted, since uniform numbers are at least 0.
        accepted_so_far_R &= uniform_R < jnp.exp(jnp.minimum(ratio_R, 0.0))
        num_accepted_R += accepted_so_far_R
        # Computed for every number of accepted tokens, and one selected per row: shapes do not depend on the result.
        final_logits.append(residual(log_p[index], log_q_RxV))
    # All proposals are accepted: a further token is drawn from p itself.
    final_logits.append(log_p[count])
    final_RxV = jnp.take_along_axis(jnp.stack(final_logits, axis=1), num_accepted_R[:, None, None], axis=1)[:, 0]
    # The key follows from the position of the final token, which differs between rows.
    keys_R = purpose_keys(selection, _take_state(selection_states, num_accepted_R), REPLACING)
    final_R = jax.vmap(jax.random.categorical)(keys_R, final_RxV).astype(jnp.int32)
    return num_accepted_R, final_R, selection_states


def residual(log_p: Array, log_q: Array) -> Array:
    """Return the logits [..., V] of the positive part of p - q, from which a rejected token's replacement is drawn.

    Where p equals q up to rounding, the positive part is zero everywhere. A rejection then has probability 0; p is
    returned to avoid a distribution without support.
    """
    difference = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0)
    return jnp.where(jnp.sum(difference, axis=-1, keepdims=True) > 0, jnp.log(difference), log_p)


def _take_state(states: list[SelectionState], index_R: Array) -> SelectionState:
    """Return for each row its state in the list entry `index_R`."""

    def select(*leaves: Array) -> Array:
        stacked = jnp.stack(leaves)
        return stacked[index_R, jnp.arange(index_R.size)]

    return jax.tree.map(select, *states)


@functools.partial(
    jax.jit,
    static_argnums=(0, 2),
    static_argnames=("count", "longest_match", "buffer_length", "bidirectional", "cache_dtype"),
)
def speculate_batch(
    program: Program,
    params: PyTree,
    draft_program: Program | None,
    draft_params: PyTree,
    batch: Mapping[str, Array],
    selection: SelectionParams,
    *,
    count: int,
    longest_match: int,
    buffer_length: int,
    bidirectional: bool,
    cache_dtype: str | None,
) -> tuple[Array, Array, Array]:
    """Decode a batch of prompts.

    Args:
      draft_program, draft_params: Draft model; None for prompt lookup.
      batch: "tokens" [R, P], "lengths" [R] and "limits" [R], as `read_prompts` and `decode_rows` take them.
      count: Number G of tokens per proposal.
      longest_match: See `Speculation`.
      buffer_length: Length N of the result.

    Returns:
      New tokens [R, N] with zeros after a row's end, their numbers [R], and the numbers of the model's passes over
      proposals [R], replicated on all devices.
    """
    config = program.run.model
    tokens_RxP, lengths_R = batch["tokens"], batch["lengths"]

    def read(model: Model) -> tuple[Array, KVCache]:
        return read_prompts(
            model,
            tokens_RxP,
            lengths_R,
            buffer_length,
            bidirectional=bidirectional,
            widest_step=count + 1,
            cache_dtype=cache_dtype,
        )

    def step(model: Model) -> Decode:
        return lambda tokens, cache, counts: model.decode(tokens, cache, counts_B=counts)

    with program.mesh_context():
        model = decoding_model(program, params)
        logits_RxV, cache = read(model)
        if draft_program is None:
            lookup = PromptLookup(count, longest_match)
            draft: Draft = lookup
            draft_state: PyTree = lookup.start(tokens_RxP, lengths_R, buffer_length)
        else:
            draft_model = decoding_model(draft_program, draft_params)
            draft, draft_state = ModelDraft(step(draft_model), count), read(draft_model)[1]
        # The selection counts what the decoder has read, which is the start token alone.
        if config.encoder is not None:
            tokens_RxP, lengths_R = (
                jnp.full_like(tokens_RxP[:, :1], config.decoder_start_token_id),
                jnp.ones_like(lengths_R),
            )
        result = decode_speculatively(
            step(model),
            logits_RxV,
            cache,
            selection=selection,
            selection_state=token_selection.initial_state(selection, tokens_RxP, lengths_R, logits_RxV.shape[-1]),
            ends=lambda tokens: jnp.isin(tokens, jnp.array(config.eos_ids, jnp.int32)),
            draft=draft,
            draft_state=draft_state,
            limits_R=batch["limits"],
            buffer_length=buffer_length,
        )
        replicated = NamedSharding(program.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint((result.tokens_RxN, result.num_new_R, result.passes_R), replicated)
