"""Goodness of fit of counts whose outcomes depend on each other.

The spans of one example sum to its number of noise tokens, so their lengths are not independent. The statistic is
therefore d' C+ d, where d is the measured minus the expected counts and C+ is the pseudo-inverse of their covariance.
For independent draws it equals Pearson's statistic. For large samples it has the chi-square distribution with rank(C)
degrees of freedom.
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
    """Comparison of a sample with its expected distribution.

    Attributes:
      subject: Description of what was counted.
      labels: Names of the K outcomes.
      measured, expected: [K] counts.
      p_value: Probability of a sample that fits no better if the distribution is correct. It is 1 if there is only one
        possible outcome, 0 if the sample contains an impossible outcome, and None if no distribution is known.
      forbidden: Number of examples that are impossible under the distribution.
      widths: [K] number of values that each outcome stands for.
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
        """True if there is more than one possible outcome, so that a sample can fit well or badly."""
        return int((self.expected > 0).sum()) > 1 or self.forbidden > 0


def multinomial(
    subject: str, labels: tuple[str, ...], measured: Floats, probabilities: Floats, forbidden: int = 0
) -> Fit:
    """Compare counts of independent draws with the probabilities of their outcomes."""
    total = measured.sum()
    # Covariance of multinomial counts. Its rank is one less than the number of outcomes, which sum to `total`.
    covariance = total * (np.diag(probabilities) - np.outer(probabilities, probabilities))
    return compare(subject, labels, measured, total * probabilities, covariance, forbidden)


def compare(
    subject: str,
    labels: tuple[str, ...],
    measured: npt.NDArray[Any],
    expected: npt.NDArray[Any],
    covariance: npt.NDArray[Any],
    forbidden: int = 0,
    widths: Floats | None = None,
) -> Fit:
    """Compare counts with their expectation and covariance; see `Fit`."""
    difference = measured - expected
    scale = np.sqrt(np.maximum(np.diag(covariance), 0))
    # An outcome without variance contributes nothing, unless the sample deviates there: then the sample is impossible.
    impossible = bool((np.abs(difference[scale == 0]) > 1e-6 * max(float(expected.sum()), 1.0)).any())
    # Relative to the largest scale: what rounding leaves of a zero variance must not be divided by.
    varies = scale > 1e-9 * max(float(scale.max(initial=0.0)), 1e-300)
    p_value = 1.0
    if forbidden or impossible:
        p_value = 0.0
    elif varies.any():
        # The correlation matrix is better conditioned than the covariance. Its eigenvectors with eigenvalues above 0
        # give the pseudo-inverse and the rank.
        unit = scale[varies]
        values, vectors = np.linalg.eigh(covariance[np.ix_(varies, varies)] / np.outer(unit, unit))
        kept = values > 1e-9 * values.max()
        statistic = float((((vectors.T @ (difference[varies] / unit))[kept]) ** 2 / values[kept]).sum())
        # Imported on use: every objective imports this module, and training needs no p-values. `chdtrc` is the survival
        # function of the chi-square distribution, which `scipy.stats.chi2.sf` calls.
        from scipy.special import chdtrc

        p_value = float(chdtrc(int(kept.sum()), statistic))
    return Fit(subject, labels, np.asarray(measured, np.float64), expected, p_value, forbidden, widths)


def combined(p_values: Iterable[float]) -> float:
    """Return the probability of a smallest p-value at most as small if all distributions are correct.

    It is 1 - (1 - min p)^n (Šidák).
    """
    values = list(p_values)
    # `expm1` and `log1p` keep p-values near 0, which 1 - (1 - p)^n would round away.
    return -math.expm1(len(values) * math.log1p(-min(values))) if values and min(values) < 1 else 1.0
