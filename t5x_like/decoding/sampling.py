"""Sampling: the next token from a row of logits, greedily or drawn from a truncated distribution.

The processors apply in this order, which is that of transformers:

  repetition penalty   on the raw logits of tokens that the row has read or generated (see `token_selection`)
  allowed tokens       minus infinity for tokens that a mask or a constraint forbids (`restrict`)
  temperature          divides the logits
  top-k                of equal logits the lower id counts as more likely
  top-p                on the probabilities that top-k leaves, renormalized
  min-p                relative to the most likely token, so the tokens removed before do not matter

All functions are pure functions on arrays. The key of a draw is a function of (seed, row, position) alone, so a row's
text does not depend on the rows that are decoded beside it. Nothing is sorted: thresholds are found bit by bit, with
one reduction over the vocabulary for each of the 32 bits of a float. That is fast also where the vocabulary is split
over devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.errors import ConfigError, ConfigProblem


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings.

    Attributes:
      temperature: Divisor of the logits. 0 selects the most likely token and ignores top_k, top_p and min_p.
      top_k: Draw among the k most likely tokens only. Of tokens with equal logits the lower id counts as more likely.
      top_p: Draw among the fewest most likely tokens whose probabilities (after temperature and top_k) add up to at
        least p; Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
      min_p: Draw among the tokens that are at least p times as probable as the most likely one; Nguyen et al. 2024,
        "Turning Up the Heat".
      repetition_penalty: Factor for logits of tokens that the decoder has read or generated: positive logits are
        divided by it, negative ones multiplied. Keskar et al. 2019, "CTRL", equation of section 4.1, with the form of
        transformers for negative logits. 1 has no effect. It also applies to greedy decoding.

    Raises:
      ConfigError: values out of range, all of them listed.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(ConfigProblem("temperature", repr(self.temperature), "0 (greedy) or more"))
        if self.top_k is not None and not 1 <= self.top_k < 2**31:
            expected = "at least 1 and below 2**31"
            problems.append(ConfigProblem("top_k", repr(self.top_k), expected, "leave it out for all tokens"))
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            problems.append(ConfigProblem("top_p", repr(self.top_p), "above 0 and at most 1"))
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            problems.append(ConfigProblem("min_p", repr(self.min_p), "from 0 to 1"))
        if not 0.0 < self.repetition_penalty < float("inf"):
            problems.append(
                ConfigProblem("repetition_penalty", repr(self.repetition_penalty), "above 0", "1 is no penalty")
            )
        if problems:
            raise ConfigError(problems)

    @property
    def greedy(self) -> bool:
        """True if the most likely token is taken instead of a draw."""
        return self.temperature == 0.0

    def for_rows(self, count: int) -> RowSampling:
        """Return these settings for each of `count` rows. Settings without effect are None, and are not compiled."""

        def full(value: float | None, dtype: Any = np.float32) -> jax.Array | None:
            # The array stays on the host: the compiled function that receives it places it on its mesh.
            return None if value is None else cast(jax.Array, np.full(count, value, dtype))

        return RowSampling(
            temperature_R=None if self.greedy else full(self.temperature),
            top_k_R=full(self.top_k, np.int32),
            top_p_R=full(self.top_p),
            min_p_R=full(self.min_p or None),
            penalty_R=None if self.repetition_penalty == 1.0 else full(self.repetition_penalty),
        )


class RowSampling(NamedTuple):
    """Sampling settings of R rows, each with its own values: a pytree of arrays [R], or None where no row uses one.

    Attributes:
      temperature_R: float32, 0 for a greedy row. None: all rows are greedy, and the next three are not read.
      top_k_R: int32; the size of the vocabulary or more has no effect.
      top_p_R: float32; 1 has no effect.
      min_p_R: float32; 0 has no effect.
      penalty_R: float32, repetition penalty; 1 has no effect.
    """

    temperature_R: jax.Array | None = None
    top_k_R: jax.Array | None = None
    top_p_R: jax.Array | None = None
    min_p_R: jax.Array | None = None
    penalty_R: jax.Array | None = None


def restrict(logits: jax.Array, allowed_V: jax.Array) -> jax.Array:
    """Return the logits [..., V] in float32, minus infinity where `allowed_V` ([V] or [..., V]) is False."""
    return jnp.where(allowed_V, logits.astype(jnp.float32), -jnp.inf)


def apply_repetition_penalty(logits_RxV: jax.Array, seen_RxV: jax.Array, penalty_R: jax.Array) -> jax.Array:
    """Return float32 logits after the repetition penalty on the tokens that `seen_RxV` marks."""
    logits = logits_RxV.astype(jnp.float32)
    penalty_Rx1 = penalty_R[:, None]
    return jnp.where(seen_RxV, jnp.where(logits < 0, logits * penalty_Rx1, logits / penalty_Rx1), logits)


def warp(logits_RxV: jax.Array, sampling: RowSampling) -> jax.Array:
    """Return the logits of the distribution that a token is drawn from: logits divided by the temperature, and minus
    infinity outside the support, which has at least one token.

    Args:
      logits_RxV: float32; minus infinity excludes a token.
      sampling: Settings with temperatures. The support of a greedy row is its most likely token, of equally likely ones
        that with the lowest id.
    """
    assert sampling.temperature_R is not None
    greedy_R = sampling.temperature_R == 0
    # No division by 0 for greedy rows; the last line overwrites their result.
    temperature_R = jnp.where(greedy_R, 1.0, sampling.temperature_R)
    scaled = logits_RxV / temperature_R[:, None]
    if sampling.top_k_R is not None:
        scaled = jnp.where(_top_k_mask(scaled, sampling.top_k_R), scaled, -jnp.inf)
    if sampling.top_p_R is not None:
        # After top-k: the softmax of the remaining logits renormalizes them.
        scaled = jnp.where(_top_p_mask(scaled, sampling.top_p_R), scaled, -jnp.inf)
    if sampling.min_p_R is not None:
        # p_i >= min_p * p_max, in logarithms: logit_i >= logit_max + log(min_p). No softmax is needed.
        threshold_R = jnp.max(scaled, axis=-1) + jnp.log(sampling.min_p_R)
        scaled = jnp.where(scaled >= threshold_R[:, None], scaled, -jnp.inf)
    best_R = argmax_token(logits_RxV)
    is_best_RxV = jax.lax.broadcasted_iota(best_R.dtype, scaled.shape, 1) == best_R[:, None]
    return jnp.where(greedy_R[:, None] & ~is_best_RxV, -jnp.inf, scaled)


def draw_keys(seed: jax.Array, rows_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Return one key per row for the token at `positions_B`, a function of (seed, row, position) only.

    Args:
      seed: uint32, one for all rows or [B].
    """

    def key(seed: jax.Array, row: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)

    return jax.vmap(key)(jnp.broadcast_to(seed, rows_B.shape), rows_B, positions_B)


def sample(logits_BxV: jax.Array, keys_B: jax.Array, sampling: Sampling | RowSampling) -> jax.Array:
    """Return token ids [B], int32, drawn by the Gumbel-max trick or, where sampling is greedy, of the largest logit.

    Args:
      logits_BxV: float32, after the repetition penalty.
      keys_B: Not read where all rows are greedy.
    """
    rows = sampling.for_rows(len(logits_BxV)) if isinstance(sampling, Sampling) else sampling
    if rows.temperature_R is None:
        return argmax_token(logits_BxV)
    noise_BxV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BxV.shape[1:], jnp.float32))(keys_B)
    # Gumbel-max: argmax(logits + Gumbel noise) has the distribution softmax(logits). Greedy rows have one finite logit,
    # which wins whatever the noise.
    return argmax_token(warp(logits_BxV, rows) + noise_BxV)


def argmax_token(logits_xV: jax.Array) -> jax.Array:
    """Return the int32 id of the largest logit, of equal ones the lowest id, and 0 where a logit is NaN.

    This is `argmax` by two reductions that vectorize, which takes XLA on CPU a tenth of the time.
    """
    largest = jnp.max(logits_xV, axis=-1, keepdims=True)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits_xV.shape, logits_xV.ndim - 1)
    token = jnp.min(jnp.where(logits_xV == largest, ids, logits_xV.shape[-1]), axis=-1)
    return jnp.where(token == logits_xV.shape[-1], 0, token)


def _top_k_mask(logits_RxV: jax.Array, count_R: jax.Array) -> jax.Array:
    """Return bool [R, V], True for the `count_R` largest logits, of equal ones those with lower ids."""
    bits_RxV = _ordered_bits(logits_RxV)
    threshold_R = _largest_threshold(
        lambda threshold_R: jnp.sum(bits_RxV >= threshold_R[:, None], axis=-1) >= count_R, len(count_R)
    )
    above_RxV, equal_RxV = bits_RxV > threshold_R[:, None], bits_RxV == threshold_R[:, None]
    return above_RxV | _first_true(equal_RxV, count_R - jnp.sum(above_RxV, axis=-1))


def _top_p_mask(logits_RxV: jax.Array, p_R: jax.Array) -> jax.Array:
    """Return bool [R, V], True for the fewest largest logits whose probabilities add up to `p_R` (top-p, nucleus).

    Of equal logits those with lower ids are taken first.
    """
    bits_RxV = _ordered_bits(logits_RxV)
    probability_RxV = jax.nn.softmax(logits_RxV, axis=-1)

    def mass_R(mask_RxV: jax.Array) -> jax.Array:
        return jnp.sum(probability_RxV, axis=-1, where=mask_RxV)

    threshold_R = _largest_threshold(lambda threshold_R: mass_R(bits_RxV >= threshold_R[:, None]) >= p_R, len(p_R))
    above_RxV, equal_RxV = bits_RxV > threshold_R[:, None], bits_RxV == threshold_R[:, None]
    # Logits at the threshold are all equal: as many are taken as their common probability needs to fill the rest of p.
    each_R = jnp.max(probability_RxV, axis=-1, where=equal_RxV, initial=0.0)
    missing_R = jnp.ceil((p_R - mass_R(above_RxV)) / jnp.maximum(each_R, jnp.finfo(jnp.float32).tiny))
    # Rounding may give 0 missing tokens; the most likely token is always kept.
    needed_R = jnp.clip(missing_R, 1, logits_RxV.shape[-1]).astype(jnp.int32)
    # For p = 1 all tokens are kept, independently of rounding. For p slightly below 1, all probabilities may add up to
    # less than p: then no threshold holds, and all tokens are above the 0 that is returned.
    return above_RxV | _first_true(equal_RxV, needed_R) | (p_R >= 1)[:, None]


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Map float32 to uint32 such that the order is kept; -0.0 counts as 0.0."""
    # IEEE floats of one sign are ordered as their bits are: negative ones are inverted, positive ones placed above
    # them.
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """Return uint32 [rows], the largest number for which `holds`, and 0 where there is none.

    `holds` must be monotonic: True up to some number of each row, False above it. The bits of the number are determined
    from the highest to the lowest.
    """

    def try_bit(index: jax.Array, known_R: jax.Array) -> jax.Array:
        # Binary search over the 32 bits: a bit is set if the condition still holds with it.
        candidate_R = known_R | (jnp.uint32(1) << (jnp.uint32(31) - index.astype(jnp.uint32)))
        return jnp.where(holds(candidate_R), candidate_R, known_R)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(rows, jnp.uint32))


def _first_true(mask_RxV: jax.Array, count_R: jax.Array) -> jax.Array:
    """Return the mask with only the first `count_R` True values of each row."""
    return mask_RxV & (jnp.cumsum(mask_RxV, axis=-1) <= count_R[:, None])
