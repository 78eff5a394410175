"""The next token from a row of logits: greedy, or drawn from the tokens that the settings leave.

The processors, in this order, which is that of transformers:

  repetition penalty   on the raw logits of tokens that the row has read or said (`choosing` knows them)
  allowed tokens       what a mask or a constraint forbids gets minus infinity (`restrict`)
  temperature          divides the logits
  top-k                of equal logits the lower id counts as more likely
  top-p                of the probabilities that top-k leaves, made to add up to 1
  min-p                relative to the most likely token, so that it does not matter what is left out before

Pure functions on arrays. A draw is keyed by (seed, row, position) alone, so that a row's text does not depend on the
rows that happen to be decoded beside it. Nothing is sorted: thresholds are found bit by bit, with one reduction over
the vocabulary for each of the 32 bits of a float, which costs little where the vocabulary is split over devices too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.config import ConfigError, Problem


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
      temperature: Divides the logits; 0 takes the most likely token and ignores top_k, top_p and min_p.
      top_k: Draw among the k most likely tokens only; of equal logits the lower id counts as more likely.
      top_p: Draw among the fewest most likely tokens whose probabilities (after temperature and top_k) add up to at
        least p; Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
      min_p: Draw among the tokens that are at least p times as probable as the most likely one; Nguyen et al. 2024,
        "Turning Up the Heat".
      repetition_penalty: Logits of tokens that the decoder has read or said are divided by it where they are above 0
        and multiplied where they are below; Keskar et al. 2019, "CTRL", equation of section 4.1, in the form that
        transformers gives it for negative logits. 1 changes nothing. It holds for greedy decoding as well.

    Raises:
      ConfigError: a value out of range; all of them are listed.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(Problem("temperature", repr(self.temperature), "0 (greedy) or more"))
        if self.top_k is not None and not 1 <= self.top_k < 2**31:
            expected = "at least 1 and below 2**31"
            problems.append(Problem("top_k", repr(self.top_k), expected, "leave it out for all tokens"))
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            problems.append(Problem("top_p", repr(self.top_p), "above 0 and at most 1"))
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            problems.append(Problem("min_p", repr(self.min_p), "from 0 to 1"))
        if not 0.0 < self.repetition_penalty < float("inf"):
            problems.append(Problem("repetition_penalty", repr(self.repetition_penalty), "above 0", "1 is no penalty"))
        if problems:
            raise ConfigError(problems)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def rows(self, count: int) -> RowSampling:
        """The same for each of `count` rows; what is not asked for is not computed."""

        def full(value: float | None, dtype: Any = np.float32) -> jax.Array | None:
            # On the host: a compiled function takes it like any other array, and places it on its mesh.
            return None if value is None else cast(jax.Array, np.full(count, value, dtype))

        return RowSampling(
            temperature_R=None if self.greedy else full(self.temperature),
            top_k_R=full(self.top_k, np.int32),
            top_p_R=full(self.top_p),
            min_p_R=full(self.min_p or None),
            penalty_R=None if self.repetition_penalty == 1.0 else full(self.repetition_penalty),
        )


class RowSampling(NamedTuple):
    """`Sampling` of R rows, each with its own values: a pytree of arrays [R], or None where no row asks for it.

    Attributes:
      temperature_R: float32, 0 for a greedy row; None: all rows are greedy, and the three below are not read.
      top_k_R: int32; a number of at least the vocabulary's size changes nothing.
      top_p_R: float32; 1 changes nothing.
      min_p_R: float32; 0 changes nothing.
      penalty_R: float32; 1 changes nothing.
    """

    temperature_R: jax.Array | None = None
    top_k_R: jax.Array | None = None
    top_p_R: jax.Array | None = None
    min_p_R: jax.Array | None = None
    penalty_R: jax.Array | None = None


def restrict(logits: jax.Array, allowed_V: jax.Array) -> jax.Array:
    """The logits [..., V] in float32, minus infinity where `allowed_V` (or [..., V]) is False."""
    return jnp.where(allowed_V, logits.astype(jnp.float32), -jnp.inf)


def penalize(logits_RxV: jax.Array, seen_RxV: jax.Array, penalty_R: jax.Array) -> jax.Array:
    """float32 logits after the repetition penalty; `seen_RxV` marks the tokens that it is for."""
    logits = logits_RxV.astype(jnp.float32)
    penalty_Rx1 = penalty_R[:, None]
    return jnp.where(seen_RxV, jnp.where(logits < 0, logits * penalty_Rx1, logits / penalty_Rx1), logits)


def warp(logits_RxV: jax.Array, sampling: RowSampling) -> jax.Array:
    """What softmax makes the distribution of that a token is drawn from: logits over the temperature, minus infinity
    outside the support, which has at least one token.

    Args:
      logits_RxV: float32; minus infinity excludes a token.
      sampling: With temperatures. A greedy row keeps its most likely token alone, the lowest id of equal ones.
    """
    assert sampling.temperature_R is not None
    greedy_R = sampling.temperature_R == 0
    temperature_R = jnp.where(greedy_R, 1.0, sampling.temperature_R)
    scaled = logits_RxV / temperature_R[:, None]
    if sampling.top_k_R is not None:
        scaled = jnp.where(_most_likely(scaled, sampling.top_k_R), scaled, -jnp.inf)
    if sampling.top_p_R is not None:
        scaled = jnp.where(_nucleus(scaled, sampling.top_p_R), scaled, -jnp.inf)
    if sampling.min_p_R is not None:
        least_R = jnp.max(scaled, axis=-1) + jnp.log(sampling.min_p_R)
        scaled = jnp.where(scaled >= least_R[:, None], scaled, -jnp.inf)
    best_R = most_likely(logits_RxV)
    is_best_RxV = jax.lax.broadcasted_iota(best_R.dtype, scaled.shape, 1) == best_R[:, None]
    return jnp.where(greedy_R[:, None] & ~is_best_RxV, -jnp.inf, scaled)


def draw_keys(seed: jax.Array, rows_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """One key per row for the token at `positions_B`, a function of (seed, row, position) and of nothing else.

    Args:
      seed: uint32, of all rows or [B].
    """

    def key(seed: jax.Array, row: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)

    return jax.vmap(key)(jnp.broadcast_to(seed, rows_B.shape), rows_B, positions_B)


def choose(logits_BxV: jax.Array, keys_B: jax.Array, sampling: Sampling | RowSampling) -> jax.Array:
    """Token ids [B], int32, for logits in float32; `keys_B` is not read when sampling is greedy. A penalty has been
    applied before."""
    rows = sampling.rows(len(logits_BxV)) if isinstance(sampling, Sampling) else sampling
    if rows.temperature_R is None:
        return most_likely(logits_BxV)
    noise_BxV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BxV.shape[1:], jnp.float32))(keys_B)
    return most_likely(warp(logits_BxV, rows) + noise_BxV)


def most_likely(logits_xV: jax.Array) -> jax.Array:
    """int32, the id of the largest logit, the lowest of equal ones: `argmax` by two reductions that a processor's wide
    registers can do, which takes XLA on CPU a tenth of the time. 0 where a logit is NaN."""
    largest = jnp.max(logits_xV, axis=-1, keepdims=True)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits_xV.shape, logits_xV.ndim - 1)
    found = jnp.min(jnp.where(logits_xV == largest, ids, logits_xV.shape[-1]), axis=-1)
    return jnp.where(found == logits_xV.shape[-1], 0, found)


def _most_likely(logits_RxV: jax.Array, count_R: jax.Array) -> jax.Array:
    """bool [R, V]: the `count_R` largest logits, of equal ones those of lower ids."""
    order_RxV = _order(logits_RxV)
    least_R = _last_threshold(lambda least_R: jnp.sum(order_RxV >= least_R[:, None], axis=-1) >= count_R, len(count_R))
    above_RxV, equal_RxV = order_RxV > least_R[:, None], order_RxV == least_R[:, None]
    return above_RxV | _first(equal_RxV, count_R - jnp.sum(above_RxV, axis=-1))


def _nucleus(logits_RxV: jax.Array, p_R: jax.Array) -> jax.Array:
    """bool [R, V]: the fewest largest logits whose softmax adds up to `p_R`, of equal ones those of lower ids."""
    order_RxV = _order(logits_RxV)
    probability_RxV = jax.nn.softmax(logits_RxV, axis=-1)

    def mass_R(these_RxV: jax.Array) -> jax.Array:
        return jnp.sum(probability_RxV, axis=-1, where=these_RxV)

    least_R = _last_threshold(lambda least_R: mass_R(order_RxV >= least_R[:, None]) >= p_R, len(p_R))
    above_RxV, equal_RxV = order_RxV > least_R[:, None], order_RxV == least_R[:, None]
    each_R = jnp.max(probability_RxV, axis=-1, where=equal_RxV, initial=0.0)
    missing_R = jnp.ceil((p_R - mass_R(above_RxV)) / jnp.maximum(each_R, jnp.finfo(jnp.float32).tiny))
    # Rounding may leave nothing missing; the most likely token stays whatever it does.
    needed_R = jnp.clip(missing_R, 1, logits_RxV.shape[-1]).astype(jnp.int32)
    # Of p = 1 rounding must not decide. Near it, all probabilities can add up to less: then all are above 0.
    return above_RxV | _first(equal_RxV, needed_R) | (p_R >= 1)[:, None]


def _order(x: jax.Array) -> jax.Array:
    """uint32 that are ordered as these float32 are; -0.0 counts as 0.0."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _last_threshold(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """uint32 [rows]: the largest number for which `holds`, which is True up to some number; 0 where it is never."""

    def settle(index: jax.Array, found_R: jax.Array) -> jax.Array:
        tried_R = found_R | (jnp.uint32(1) << (jnp.uint32(31) - index.astype(jnp.uint32)))
        return jnp.where(holds(tried_R), tried_R, found_R)

    return jax.lax.fori_loop(0, 32, settle, jnp.zeros(rows, jnp.uint32))


def _first(chosen_RxV: jax.Array, count_R: jax.Array) -> jax.Array:
    """The first `count_R` of each row's chosen ones."""
    return chosen_RxV & (jnp.cumsum(chosen_RxV, axis=-1) <= count_R[:, None])
