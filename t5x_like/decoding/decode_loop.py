"""Compiled decoding loop: select a token for every row, run the model on these tokens, until all rows are done.

The caller decides how tokens are selected: `choose` maps logits and a state to tokens, and the loop carries that state
beside the cache. No data is transferred to the host between two tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.models.kv_cache import KVCache
from t5x_like.models.model import Model
from t5x_like.utils.type_aliases import PyTree

Choose = Callable[[Array, PyTree], tuple[Array, Array, PyTree]]
"""(logits [R, V], state) -> (tokens int32 [R], bool [R] True where the row ends with its token, new state)."""


class DecodeState(NamedTuple):
    """State of the loop for R rows, some of them done. A pytree of fixed shapes.

    Attributes:
      steps: int32 scalar, number of tokens of the rows that are not done.
      tokens_RxN: int32, new tokens; 0 after a row's last token.
      last_R: int32, most recently selected token of each row; the cache does not contain it yet.
      done_R: bool, True for rows that have ended.
      cache: Keys and values of all tokens before `last_R`.
      selection_state: State of `choose`.
    """

    steps: Array
    tokens_RxN: Array
    last_R: Array
    done_R: Array
    cache: KVCache
    selection_state: PyTree


def read_prompts(
    model: Model,
    tokens_RxP: Array,
    lengths_R: Array,
    new_tokens: int,
    *,
    bidirectional: bool = False,
    widest_step: int = 1,
    cache_dtype: str | None = None,
) -> tuple[Array, KVCache]:
    """Run the prefill: read all prompts in one pass.

    Args:
      tokens_RxP: The encoder's input, or the beginning of the decoder's stream with its start token. Rows are padded on
        the right, so that token p of a row is at position p.
      lengths_R: Number of tokens of each row. Rows that only fill the batch have 0; their tokens are ignored.
      new_tokens: Number of further tokens that the cache can hold.
      bidirectional: In a decoder, the prompt's tokens attend to each other in both directions (prefix LM).
      widest_step, cache_dtype: See `Model.init_cache`.

    Returns:
      Logits [R, V] of the first new token, and the cache.
    """
    rows, length = tokens_RxP.shape
    if model.config.encoder is None:
        cache = model.start_decoding(None, None, rows, length + new_tokens, widest_step=widest_step, dtype=cache_dtype)
        return model.prefill(tokens_RxP, lengths_R, cache, bidirectional=bidirectional)
    # Segment ids and not the padding id: a prompt may contain the id that pads it.
    valid_RxP = (jnp.arange(length) < lengths_R[:, None]).astype(jnp.int32)
    encoded = model.encode(tokens_RxP, segment_ids=valid_RxP)
    # The decoder's own prompt is the start token, which takes one position of the cache.
    cache = model.start_decoding(encoded, valid_RxP, rows, 1 + new_tokens, widest_step=widest_step, dtype=cache_dtype)
    logits_Rx1xV, cache = model.decode(jnp.full((rows, 1), model.config.decoder_start_token_id, jnp.int32), cache)
    return logits_Rx1xV[:, 0], cache


def decode_rows(
    model: Model,
    logits_RxV: Array,
    cache: KVCache,
    *,
    choose: Choose,
    selection_state: PyTree,
    limits_R: Array,
    buffer_length: int,
) -> DecodeState:
    """Select tokens until each row has ended or has reached its limit.

    Args:
      logits_RxV: Logits of the first new token, from `read_prompts`.
      cache: Keys and values of all tokens before it, from `read_prompts`.
      selection_state: State of `choose` before the first token.
      limits_R: int32, largest number of new tokens of each row, at most `buffer_length`. Rows with 0 are done at once.
      buffer_length: Length N of the result.
    """

    def select(state: DecodeState, logits_RxV: Array) -> DecodeState:
        token_R, ends_R, selection_state = choose(logits_RxV, state.selection_state)
        # Rows that are done go on drawing tokens, which must not appear in the result.
        token_R = jnp.where(state.done_R, 0, token_R)
        steps = state.steps + 1
        return DecodeState(
            steps=steps,
            # All live rows have the same number of new tokens, so that the write is one slice and no scatter.
            tokens_RxN=jax.lax.dynamic_update_slice(state.tokens_RxN, token_R[:, None], (0, state.steps)),
            last_R=token_R,
            done_R=state.done_R | ends_R | (steps >= limits_R),
            cache=state.cache,
            selection_state=selection_state,
        )

    def step(state: DecodeState) -> DecodeState:
        # Rows that are done add nothing to their cache (count 0), but are computed: shapes are fixed.
        live_R = (~state.done_R).astype(jnp.int32)
        logits_Rx1xV, cache = model.decode(state.last_R[:, None], state.cache, counts_B=live_R)
        # The order "model, then selection" leaves the newest token outside the cache, as `last_R` says.
        return select(state._replace(cache=cache), logits_Rx1xV[:, 0])

    initial = DecodeState(
        steps=jnp.int32(0),
        tokens_RxN=jnp.zeros((limits_R.size, buffer_length), jnp.int32),
        last_R=jnp.zeros_like(limits_R),
        done_R=limits_R < 1,
        cache=cache,
        selection_state=selection_state,
    )
    # The first token comes from the prefill's logits, so N tokens take N - 1 steps of the model.
    return jax.lax.while_loop(lambda state: ~jnp.all(state.done_R), step, select(initial, logits_RxV))
