"""Arithmetic of span lengths that are drawn until a number of tokens is covered (BART, GLM), and of cut spans."""

from __future__ import annotations

import functools
import math

Probabilities = tuple[float, ...]
"""Probabilities of 0, 1, 2, ..."""


def expected_cuts(noise: int, spans: float, length: int) -> float:
    """Return the mean number of spans that the ends of the window cut, where the mask is rotated by a uniform offset.

    A span is cut if the window begins directly after a masked token that another masked token follows. There are
    noise - spans such tokens among the `length` tokens of the window.
    """
    return (noise - spans) / length


@functools.lru_cache
def poisson(mean: float, at_least: int = 0) -> Probabilities:
    """Return the Poisson distribution, conditioned on values of `at_least` or more.

    The tail that cannot change a sum in double precision is cut off.
    """
    most = math.ceil(mean + 12 * math.sqrt(mean) + 12)
    # In logarithms: mean**k and k! overflow for a mean in the hundreds.
    weights = [math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) if k >= at_least else 0.0 for k in range(most)]
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def expected_draws(probabilities: Probabilities, total: int) -> float:
    """Return the mean number of draws until their sum reaches `total`; the probability of 0 must be 0."""
    # The table is computed for the next power of two, so that few tables are cached.
    return _draws_by_total(probabilities, 1 << total.bit_length())[total]


@functools.lru_cache
def _draws_by_total(probabilities: Probabilities, most: int) -> tuple[float, ...]:
    """Return `expected_draws` for the totals 0, 1, ... `most`, by the renewal equation."""
    mean_N = [0.0]
    for total in range(1, most + 1):
        # With the last draw of length k, the draws before it covered total - k: m(t) = 1 + sum_k p_k m(t - k).
        lengths = range(1, min(len(probabilities), total + 1))
        mean_N.append(1 + math.fsum(probabilities[k] * mean_N[total - k] for k in lengths))
    return tuple(mean_N)


def max_draws(probabilities: Probabilities, total: int) -> int:
    """Return the number of draws for which a window is sized.

    It is four standard deviations above the mean number of draws until their sum reaches `total`. Where they do not
    reach it, the last draw takes the rest: with a mean of 3, as in BART and GLM, this happens in at most one window of
    ten thousand.
    """
    mean = sum(k * share for k, share in enumerate(probabilities))
    variance = sum(k * k * share for k, share in enumerate(probabilities)) - mean**2
    # The number of draws is about normal with mean total / mean and variance total * variance / mean^3 (renewal
    # theory).
    return math.ceil(total / mean + 4 * math.sqrt(total * variance / mean**3)) + 1
