"""Fit of a scaling law to losses of models of several sizes and numbers of tokens."""

from __future__ import annotations

import numpy as np

from t5x_like.planning.estimate.scaling_laws import ScalingFit
from t5x_like.utils.type_aliases import FloatArray

_EXPONENTS = np.linspace(0.05, 1.5, 30)
"""Exponents from which the best pair is refined."""


def fit_scaling(parameters_N: FloatArray, tokens_N: FloatArray, losses_N: FloatArray, source: str) -> ScalingFit:
    """Return the fit L = e + a / N**alpha + b / D**beta with the least sum of squared relative deviations.

    For given exponents, e, a and b are the solution of a non-negative least-squares problem (`scipy.optimize.nnls`).
    The exponents are the best ones of a grid, refined by the method of Nelder and Mead.

    Args:
      parameters_N, tokens_N, losses_N: Points, five or more.
      source: Where the points come from.

    Raises:
      ValueError: there are fewer points than constants, or a number is not positive.
    """
    from scipy.optimize import minimize, nnls

    points = np.array([parameters_N, tokens_N, losses_N], np.float64)
    if points.shape[1] < 5 or not (points > 0).all():
        raise ValueError(f"found {points.shape[1]} points, expected 5 or more with positive sizes, tokens and losses")
    sizes_N, read_N, losses_N = points
    # Powers of numbers near 1, so that a, b and e are of the same magnitude.
    size, read = np.exp(np.log(sizes_N).mean()), np.exp(np.log(read_N).mean())

    def solved(exponents: FloatArray) -> tuple[FloatArray, float]:
        terms = np.stack([np.ones_like(losses_N), (sizes_N / size) ** -exponents[0], (read_N / read) ** -exponents[1]])
        constants, norm = nnls(terms.T / losses_N[:, None], np.ones_like(losses_N))
        return constants, float(norm)

    def deviation(exponents: FloatArray) -> float:
        return solved(exponents)[1] if (exponents > 0).all() else np.inf

    grid = [np.array([alpha, beta]) for alpha in _EXPONENTS for beta in _EXPONENTS]
    start = min(grid, key=deviation)
    best = minimize(deviation, start, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-13, "maxiter": 2000})
    alpha, beta = map(float, best.x)
    e, a, b = map(float, solved(best.x)[0])
    return ScalingFit(e, a * size**alpha, b * read**beta, alpha, beta, source)
