"""The next token from a row of logits: greedy, or drawn after temperature, top-k and top-p.

Pure functions on arrays. A draw is keyed by (seed, row, position) alone, so that a row's text does not depend on the
rows that happen to be decoded beside it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from t5x_like.config import ConfigError, Problem


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
      temperature: Divides the logits; 0 takes the most likely token and ignores the two others.
      top_k: Draw among the k most likely tokens only; of equal logits the lower id counts as more likely.
      top_p: Draw among the fewest most likely tokens whose probabilities (after temperature and top_k) add up to at
        least p; Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".

    Raises:
      ConfigError: a value out of range; all of them are listed.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(Problem("temperature", repr(self.temperature), "0 (greedy) or more"))
        if self.top_k is not None and self.top_k < 1:
            problems.append(Problem("top_k", repr(self.top_k), "at least 1", "leave it out for all tokens"))
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            problems.append(Problem("top_p", repr(self.top_p), "above 0 and at most 1"))
        if problems:
            raise ConfigError(problems)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def restrict(logits: jax.Array, allowed_V: jax.Array) -> jax.Array:
    """The logits [..., V] in float32, minus infinity where `allowed_V` is False."""
    return jnp.where(allowed_V, logits.astype(jnp.float32), -jnp.inf)


def candidates(logits_BxV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """The tokens that may be drawn, most likely first.

    Args:
      logits_BxV: float32; minus infinity excludes a token.
      sampling: With a temperature above 0.

    Returns:
      Logits over the temperature, minus infinity outside the support, and token ids, both [B, K] with K = top_k or V.
      At least one token of a row is in its support.
    """
    vocabulary = logits_BxV.shape[-1]
    scaled_BxV = logits_BxV / sampling.temperature
    top_k = min(sampling.top_k or vocabulary, vocabulary)
    if top_k == vocabulary and sampling.top_p is None:
        return scaled_BxV, jnp.broadcast_to(jnp.arange(vocabulary), scaled_BxV.shape)
    scaled_BxK, ids_BxK = jax.lax.top_k(scaled_BxV, top_k)
    if sampling.top_p is not None:
        probability_BxK = jax.nn.softmax(scaled_BxK, axis=-1)
        before_BxK = jnp.cumsum(probability_BxK, axis=-1) - probability_BxK
        # The first token stays whatever rounding makes of its `before`, which is 0.
        scaled_BxK = jnp.where(before_BxK < sampling.top_p, scaled_BxK, -jnp.inf)
    return scaled_BxK, ids_BxK


def draw_keys(seed: jax.Array, rows_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """One key per row for the token at `positions_B`, a function of (seed, row, position) and of nothing else."""

    def key(row: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)

    return jax.vmap(key)(rows_B, positions_B)


def choose(logits_BxV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Token ids [B], int32, for logits in float32; `keys_B` is not read when sampling is greedy."""
    if sampling.greedy:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    scaled_BxK, ids_BxK = candidates(logits_BxV, sampling)
    choice_B = jax.vmap(jax.random.categorical)(keys_B, scaled_BxK)
    return jnp.take_along_axis(ids_BxK, choice_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
