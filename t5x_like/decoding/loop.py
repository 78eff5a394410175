"""The compiled loop: a token for every row, a step of the model on these, until all rows are done.

What a token is chosen by is the caller's: `choose` maps logits and a state of its own to tokens, and the loop carries
that state beside the cache. Nothing goes to the host between the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.models.cache import Cache
from t5x_like.models.model import Model

Tree = Any
Choose = Callable[[Array, Tree], tuple[Array, Array, Tree]]
"""(logits [R, V], state) -> (tokens int32 [R], whether a row ends with its token bool [R], state)."""


class Decoded(NamedTuple):
    """Rows that are being decoded, or are done. A pytree of fixed shapes.

    Attributes:
      steps: int32 scalar, tokens that the rows have made that are not done.
      tokens_RxN: int32, 0 behind a row's last token.
      last_R: int32, the tokens that were chosen last, which the cache has not got yet.
      done_R: bool.
      cache: Of the tokens before `last_R`.
      chooser: The state of `choose`.
    """

    steps: Array
    tokens_RxN: Array
    last_R: Array
    done_R: Array
    cache: Cache
    chooser: Tree


def read_prompts(
    model: Model,
    tokens_RxP: Array,
    lengths_R: Array,
    new_tokens: int,
    *,
    bidirectional: bool = False,
    widest_step: int = 1,
    cache_dtype: str | None = None,
) -> tuple[Array, Cache]:
    """Logits [R, V] of the first new token, and a cache that has room for `new_tokens`.

    Args:
      tokens_RxP: What the encoder reads, or the beginning of the decoder's stream with its start token; padded on the
        right, so that token p of a row is at position p.
      lengths_R: Tokens of each row; rows that only fill the batch have 0, and what they take does not matter.
      bidirectional: In a single stream, the prompt's tokens see each other.
      widest_step, cache_dtype: As in `Model.init_cache`.
    """
    rows, length = tokens_RxP.shape
    if model.config.encoder is None:
        cache = model.start_decoding(None, None, rows, length + new_tokens, widest_step=widest_step, dtype=cache_dtype)
        return model.prefill(tokens_RxP, lengths_R, cache, bidirectional=bidirectional)
    valid_RxP = (jnp.arange(length) < lengths_R[:, None]).astype(jnp.int32)
    encoded = model.encode(tokens_RxP, segment_ids=valid_RxP)
    cache = model.start_decoding(encoded, valid_RxP, rows, 1 + new_tokens, widest_step=widest_step, dtype=cache_dtype)
    logits_Rx1xV, cache = model.decode(jnp.full((rows, 1), model.config.start_id, jnp.int32), cache)
    return logits_Rx1xV[:, 0], cache


def decode_rows(
    model: Model,
    logits_RxV: Array,
    cache: Cache,
    *,
    choose: Choose,
    chooser: Tree,
    limits_R: Array,
    cells: int,
) -> Decoded:
    """Chooses tokens until each row has ended or has as many as its limit.

    Args:
      logits_RxV: Of the first token, with the cache that has all before it: from `read_prompts`.
      chooser: The state of `choose` before the first token.
      limits_R: int32, at most `cells`; rows with 0 are done at once.
      cells: Of the result, N.
    """

    def append(now: Decoded, logits_RxV: Array) -> Decoded:
        token_R, ends_R, chooser = choose(logits_RxV, now.chooser)
        token_R = jnp.where(now.done_R, 0, token_R)
        steps = now.steps + 1
        return Decoded(
            steps=steps,
            tokens_RxN=jax.lax.dynamic_update_slice(now.tokens_RxN, token_R[:, None], (0, now.steps)),
            last_R=token_R,
            done_R=now.done_R | ends_R | (steps >= limits_R),
            cache=now.cache,
            chooser=chooser,
        )

    def step(now: Decoded) -> Decoded:
        live_R = (~now.done_R).astype(jnp.int32)
        logits_Rx1xV, cache = model.decode(now.last_R[:, None], now.cache, counts_B=live_R)
        return append(now._replace(cache=cache), logits_Rx1xV[:, 0])

    nothing = Decoded(
        steps=jnp.int32(0),
        tokens_RxN=jnp.zeros((limits_R.size, cells), jnp.int32),
        last_R=jnp.zeros_like(limits_R),
        done_R=limits_R < 1,
        cache=cache,
        chooser=chooser,
    )
    return jax.lax.while_loop(lambda now: ~jnp.all(now.done_R), step, append(nothing, logits_RxV))
