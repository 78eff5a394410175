"""How well counts fit a law whose outcomes depend on each other.

Spans of one example sum to its noise tokens, so that their lengths are not independent. The statistic is therefore
d' C+ d with d the measured less the expected counts and C their covariance, which for independent draws is Pearson's.
It has the chi-square distribution with rank(C) degrees of freedom for large samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A sample beside its law.

    Attributes:
      subject: What was counted.
      labels: Of the K outcomes.
      measured, expected: [K] counts.
      p_value: Probability of a sample that fits no better, if the law holds; 1 where it allows one outcome only, 0
        where the sample has what it forbids, None where no distribution is known.
      forbidden: Examples that the law does not allow at all.
      widths: [K] numbers that each outcome stands for.
    """

    subject: str
    labels: tuple[str, ...]
    measured: Floats
    expected: Floats
    p_value: float | None
    forbidden: int = 0
    widths: Floats | None = None

    @property
    def has_choice(self) -> bool:
        """Whether the law allows more than one outcome, so that a sample can fit it well or badly."""
        return int((self.expected > 0).sum()) > 1 or self.forbidden > 0


def multinomial(subject: str, labels: tuple[str, ...], measured: Floats, law: Floats, forbidden: int = 0) -> Fit:
    """Counts of independent draws beside the probabilities of their outcomes."""
    total = measured.sum()
    return compare(subject, labels, measured, total * law, total * (np.diag(law) - np.outer(law, law)), forbidden)


def compare(
    subject: str,
    labels: tuple[str, ...],
    measured: npt.NDArray[Any],
    expected: npt.NDArray[Any],
    covariance: npt.NDArray[Any],
    forbidden: int = 0,
    widths: Floats | None = None,
) -> Fit:
    """Counts beside their expectation and covariance under the law; see `Fit`."""
    difference = measured - expected
    scale = np.sqrt(np.maximum(np.diag(covariance), 0))
    # What cannot vary has no say, unless it does vary.
    impossible = bool((np.abs(difference[scale == 0]) > 1e-6 * max(float(expected.sum()), 1.0)).any())
    varies = scale > 1e-9 * max(float(scale.max(initial=0.0)), 1e-300)
    p_value = 1.0
    if forbidden or impossible:
        p_value = 0.0
    elif varies.any():
        unit = scale[varies]
        values, vectors = np.linalg.eigh(covariance[np.ix_(varies, varies)] / np.outer(unit, unit))
        kept = values > 1e-9 * values.max()
        statistic = float((((vectors.T @ (difference[varies] / unit))[kept]) ** 2 / values[kept]).sum())
        p_value = chi_square_tail(statistic, int(kept.sum()))
    return Fit(subject, labels, np.asarray(measured, np.float64), expected, p_value, forbidden, widths)


def chi_square_tail(statistic: float, freedom: int) -> float:
    """Probability that a chi-square variable with `freedom` degrees exceeds `statistic`: the regularised upper
    incomplete gamma function Q(freedom / 2, statistic / 2), by its series or its continued fraction (Abramowitz and
    Stegun 6.5.29 and 6.5.31)."""
    a, x = freedom / 2, statistic / 2
    if x <= 0:
        return 1.0
    front = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        n = a
        while term > 1e-16 * total:
            n += 1
            term *= x / n
            total += term
        return max(1 - front * total, 0.0)
    # Lentz's evaluation from the front.
    tiny = 1e-300
    b = x + 1 - a
    c, d = 1 / tiny, 1 / b
    value = d
    for i in range(1, 10_000):
        step = -i * (i - a)
        b += 2
        d = 1 / (step * d + b or tiny)
        c = b + step / c or tiny
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return min(front * value, 1.0)


def combined(p_values: Iterable[float]) -> float:
    """The probability of a smallest p-value at least as small, if all laws hold: 1 - (1 - min p)^n (Šidák)."""
    values = list(p_values)
    return -math.expm1(len(values) * math.log1p(-min(values))) if values and min(values) < 1 else 1.0
