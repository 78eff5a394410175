"""Compiled functions of continuous batching: they read prompts into slots, decode a token per slot, and free slots.

The state of all slots is one pytree of fixed shapes that stays on the device. The settings of requests are arrays with
one value per slot, so that a new request does not compile a new program.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy.typing as npt

from t5x_like.decoding import token_selection
from t5x_like.decoding.decode_loop import read_prompts
from t5x_like.decoding.inference_params import decoding_model
from t5x_like.decoding.sampling import RowSampling
from t5x_like.decoding.token_logprobs import Logprobs, logprobs_of, no_logprobs
from t5x_like.decoding.token_selection import NOT_FINITE, SelectionParams, SelectionState
from t5x_like.models.kv_cache import KVCache
from t5x_like.models.model import Model
from t5x_like.program import Program
from t5x_like.utils.type_aliases import PyTree


class SlotState(NamedTuple):
    """State on the device of S slots, in use or free. A pytree of fixed shapes.

    Attributes:
      cache: Keys and values of the tokens before `last_S`.
      last_S: int32, newest token of each slot.
      remaining_S: int32, largest number of further tokens of each slot; 0 for a slot that is free or done.
      sampling: Sampling settings of each slot.
      seeds_S, rows_S: Seed and row number of each slot's draws.
      selection_state: Selection state of each slot, without automata and stop strings.
      logprobs_S: bool, True for a slot whose request asks for log-probabilities.
    """

    cache: KVCache
    last_S: jax.Array
    remaining_S: jax.Array
    sampling: RowSampling
    seeds_S: jax.Array
    rows_S: jax.Array
    selection_state: SelectionState
    logprobs_S: jax.Array


class NewTokens(NamedTuple):
    """New tokens of R prompts, arrays [R], or of S slots in some steps, arrays [steps, S].

    Attributes:
      tokens: int32, `NOT_FINITE` for a token without finite logits.
      is_new: bool, True where there is a token: the slot was in use.
      ended: bool, True where the token ends its request.
      logprobs: Log-probabilities of the tokens; zeros where no request of a step asks for them.
    """

    tokens: jax.Array
    is_new: jax.Array
    ended: jax.Array
    logprobs: Logprobs


@dataclasses.dataclass(frozen=True)
class SlotSettings:
    """Static argument of the compiled functions. Programs compare by identity.

    Attributes:
      program: A program whose model has a decoder.
      max_prompt_length: Largest number of tokens of a prompt.
      max_new_tokens: Largest number of new tokens of a request.
      steps_per_sync: Number of tokens per slot of one call of `decode_slots`.
      bidirectional, cache_dtype: See `generate_tokens`.
    """

    program: Program
    max_prompt_length: int
    max_new_tokens: int
    steps_per_sync: int
    bidirectional: bool
    cache_dtype: str | None


def _row_sampling(arrays: dict[str, jax.Array]) -> RowSampling:
    return RowSampling(*(arrays[name] for name in ("temperature", "top_k", "top_p", "min_p", "penalty")))


def _prefill(
    settings: SlotSettings, model: Model, allowed_V: jax.Array, arrays: dict[str, jax.Array]
) -> tuple[SlotState, NewTokens]:
    """Read prompts and select their first tokens.

    Returns:
      The state of as many slots as there are rows, and the first tokens.
    """
    model_config = model.config
    tokens, lengths = arrays["tokens"], arrays["lengths"]
    # The cache has the same length for prompts of every bucket, so that rows can be copied into slots.
    unused = settings.max_prompt_length + 1 - tokens.shape[1] if model_config.encoder is None else 0
    logits, cache = read_prompts(
        model,
        tokens,
        lengths,
        settings.max_new_tokens + unused,
        bidirectional=settings.bidirectional,
        cache_dtype=settings.cache_dtype,
    )
    if cache.cross is not None:
        cache = _pad_encoder(cache, settings.max_prompt_length)
    # The repetition penalty counts what the decoder has read: the prompt, or in an encoder-decoder the start token
    # alone.
    decoder_tokens, decoder_lengths = tokens, lengths
    if model_config.encoder is not None:
        decoder_tokens = jnp.full((tokens.shape[0], 1), model_config.decoder_start_token_id, jnp.int32)
        decoder_lengths = jnp.ones_like(lengths)
    sampling = _row_sampling(arrays)
    selection = SelectionParams(allowed_V, sampling, arrays["seeds"], arrays["rows"])
    state = token_selection.initial_state(selection, decoder_tokens, decoder_lengths, model_config.vocab_size)
    # The prefill already has the logits of the first new token. Rows that only fill the batch have a limit of 0 and are
    # not live.
    live = arrays["limits"] > 0
    token, invalid, state = _select(logits, selection, state, live)
    ended = jnp.isin(token, jnp.array(model_config.eos_ids, jnp.int32)) | (arrays["limits"] <= 1) | invalid
    remaining = jnp.where(ended, 0, arrays["limits"] - 1)
    rows = SlotState(cache, token, remaining, sampling, arrays["seeds"], arrays["rows"], state, arrays["logprobs"])
    logprobs = _logprobs(logits, token, live & arrays["logprobs"])
    return rows, NewTokens(jnp.where(invalid, NOT_FINITE, token), jnp.ones_like(ended), ended, logprobs)


def _select(
    logits_RxV: jax.Array, selection: SelectionParams, state: SelectionState, live_R: jax.Array
) -> tuple[jax.Array, jax.Array, SelectionState]:
    """Return the next tokens, True where their logits are not finite, and the state after them.

    All slots share one program, which must handle every setting. Branches at run time skip the work that no live row
    needs: first the truncation by top-k, top-p and min-p, then the draws.
    """
    sampling = selection.sampling
    assert sampling.temperature_R is not None and sampling.top_k_R is not None and sampling.top_p_R is not None
    assert sampling.min_p_R is not None
    draws_R = live_R & (sampling.temperature_R > 0)
    truncates_R = draws_R & (
        (sampling.top_k_R < logits_RxV.shape[-1]) | (sampling.top_p_R < 1) | (sampling.min_p_R > 0)
    )

    def select(sampling: RowSampling) -> tuple[jax.Array, SelectionState]:
        token_R, _, new_state = token_selection.select_tokens(logits_RxV, selection._replace(sampling=sampling), state)
        return token_R, new_state

    # A repetition penalty changes greedy decoding too, so all three branches apply it.
    greedy = RowSampling(penalty_R=sampling.penalty_R)
    untruncated = greedy._replace(temperature_R=sampling.temperature_R)
    token_R, new_state = jax.lax.cond(
        # Truncation finds its thresholds with 32 reductions over the vocabulary: by far the most expensive part of a
        # step on small models.
        jnp.any(truncates_R),
        lambda: select(sampling),
        lambda: jax.lax.cond(jnp.any(draws_R), lambda: select(untruncated), lambda: select(greedy)),
    )
    return token_R, live_R & token_selection.not_finite(logits_RxV), new_state


def _logprobs(logits_RxV: jax.Array, token_R: jax.Array, wanted_R: jax.Array) -> Logprobs:
    """Return the log-probabilities of tokens, computed in a step in which a row asks for them."""
    return jax.lax.cond(
        jnp.any(wanted_R),
        lambda: logprobs_of(logits_RxV, token_R),
        lambda: no_logprobs(token_R, logits_RxV.shape[-1]),
    )


def _pad_encoder(cache: KVCache, length: int) -> KVCache:
    """Return the cache with the encoder's keys and values padded to `length` positions."""
    assert cache.cross is not None and cache.encoder_segment_ids is not None
    missing = length - cache.encoder_segment_ids.shape[1]

    def pad(leaf: jax.Array) -> jax.Array:
        # Keys, values and their scales all have the slots at axis 2; the padded ones are hidden by segment id 0.
        return jnp.pad(leaf, [(0, missing) if axis == 2 else (0, 0) for axis in range(leaf.ndim)])

    return cache._replace(
        cross=jax.tree.map(pad, cache.cross),
        encoder_segment_ids=jnp.pad(cache.encoder_segment_ids, ((0, 0), (0, missing))),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill_slots(
    settings: SlotSettings, params: PyTree, slots: SlotState, allowed_V: jax.Array, arrays: dict[str, jax.Array]
) -> tuple[SlotState, NewTokens]:
    """Read prompts into the slots `arrays["slots"]`, and return the slots and the first token of each prompt."""
    with settings.program.mesh_context():
        rows, first_tokens = _prefill(settings, decoding_model(settings.program, params), allowed_V, arrays)
        index = arrays["slots"]
        # Every leaf of the state has the slot as dimension 0, so one scatter per leaf replaces all that the slot's
        # former request left: cache, settings, counters.
        return jax.tree.map(lambda old, new: old.at[index].set(new, mode="drop"), slots, rows), first_tokens


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_slots(
    settings: SlotSettings, params: PyTree, slots: SlotState, allowed_V: jax.Array
) -> tuple[SlotState, NewTokens]:
    """Decode `steps_per_sync` tokens for each slot in use."""
    with settings.program.mesh_context():
        model = decoding_model(settings.program, params)
        selection = SelectionParams(allowed_V, slots.sampling, slots.seeds_S, slots.rows_S)
        eos_ids = jnp.array(model.config.eos_ids, jnp.int32)

        def decode_one(slots: SlotState, _: None) -> tuple[SlotState, NewTokens]:
            # Free slots are computed as well, since shapes are fixed, but add nothing to their cache (count 0).
            live_S = slots.remaining_S > 0
            logits, cache = model.decode(slots.last_S[:, None], slots.cache, counts_B=live_S.astype(jnp.int32))
            token_S, invalid_S, selection_state = _select(logits[:, 0], selection, slots.selection_state, live_S)
            ended_S = live_S & (jnp.isin(token_S, eos_ids) | (slots.remaining_S == 1) | invalid_S)
            # A slot that ends within the scan is idle for the rest of it: the cost of a synchronization every
            # `steps_per_sync` tokens.
            remaining_S = jnp.where(live_S & ~ended_S, slots.remaining_S - 1, 0)
            slots = slots._replace(
                cache=cache, last_S=token_S, remaining_S=remaining_S, selection_state=selection_state
            )
            logprobs = _logprobs(logits[:, 0], token_S, live_S & slots.logprobs_S)
            return slots, NewTokens(jnp.where(invalid_S, NOT_FINITE, token_S), live_S, ended_S, logprobs)

        return jax.lax.scan(decode_one, slots, length=settings.steps_per_sync)


@functools.partial(jax.jit, donate_argnums=0)
def free_slots(slots: SlotState, freed_S: jax.Array) -> SlotState:
    # The cache keeps its contents, which the next prefill overwrites.
    return slots._replace(remaining_S=jnp.where(freed_S, 0, slots.remaining_S))


def empty_slots(settings: SlotSettings, arrays: dict[str, npt.NDArray[Any]]) -> SlotState:
    """Return free slots with the shapes that prompts have after `_prefill`; `arrays` has a row per slot."""
    program = settings.program
    allowed_V = jnp.ones(program.run.model.vocab_size, bool)

    def prefill(params: PyTree) -> SlotState:
        return _prefill(settings, program.model(params), allowed_V, jax.tree.map(jnp.asarray, arrays))[0]

    # The state has the shapes of a prefill of all slots, whatever the architecture; nothing is computed for them.
    shapes = jax.eval_shape(prefill, program.abstract_params)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
