"""Log-probabilities of tokens, and of the most likely tokens at their positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

MAX_TOP_LOGPROBS = 20
"""Number of most likely tokens that are kept at a position."""


class Logprobs(NamedTuple):
    """Arrays for any number of positions: the distribution is the softmax of the model's logits, before temperature,
    penalties and the restriction to allowed tokens.

    Attributes:
      token: float32 [...], log-probability in nats of the token at each position.
      top: float32 [..., K], the K highest log-probabilities, descending.
      top_ids: int32 [..., K], their tokens.
    """

    token: Any
    top: Any
    top_ids: Any


class TokenLogprob(NamedTuple):
    """Log-probability of one token.

    Attributes:
      token: Id.
      logprob: In nats; None for a token that the model does not predict.
      top: (id, log-probability) of the most likely tokens at this position, descending.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def logprobs_of(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    """Return the log-probabilities of `tokens` [...] under logits [..., V]."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    at_token = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    top, top_ids = jax.lax.top_k(logits, min(MAX_TOP_LOGPROBS, logits.shape[-1]))
    # One subtraction for both, so that a token that is the most likely one has exactly its log-probability.
    return Logprobs(at_token - log_z, top - log_z[..., None], top_ids)


def no_logprobs(tokens: jax.Array, vocab_size: int) -> Logprobs:
    """Return zeros in the shapes of `logprobs_of`."""
    shape = (*tokens.shape, min(MAX_TOP_LOGPROBS, vocab_size))
    return Logprobs(jnp.zeros(tokens.shape), jnp.zeros(shape), jnp.zeros(shape, jnp.int32))


def on_host(tokens: npt.NDArray[np.int32], logprobs: Logprobs) -> list[TokenLogprob]:
    """Return the entries of N tokens [N] from NumPy arrays [N] and [N, K]."""
    return [
        TokenLogprob(token, logprob, tuple(zip(top_ids, top, strict=True)))
        for token, logprob, top, top_ids in zip(
            tokens.tolist(), logprobs.token.tolist(), logprobs.top.tolist(), logprobs.top_ids.tolist(), strict=True
        )
    ]
