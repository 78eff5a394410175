"""Fit of a scaling law: constants that are known are recovered, from exact losses and from noisy ones."""

from __future__ import annotations

import numpy as np
import pytest

from t5x_like.planning.estimate.scaling_fit import fit_scaling
from t5x_like.planning.estimate.scaling_laws import BESIROGLU, HOFFMANN, ScalingFit

LARGE = np.meshgrid(np.geomspace(5e7, 1e10, 6), np.geomspace(1e9, 3e11, 6))
SMALL = np.meshgrid([78e3, 263e3, 554e3, 951e3], [332e3, 663e3, 1.33e6])
"""Sizes and tokens of the study of scaling."""
OF_BYTES = ScalingFit(1.2, 40.0, 300.0, 0.35, 0.45, "made up")


@pytest.mark.parametrize(("law", "points"), [(HOFFMANN, LARGE), (BESIROGLU, LARGE), (OF_BYTES, SMALL)])
def test_known_constants_are_recovered(law: ScalingFit, points: list[np.ndarray]) -> None:
    sizes, tokens = (values.ravel() for values in points)
    losses = np.array([law.loss(n, d) for n, d in zip(sizes, tokens, strict=True)])
    found = fit_scaling(sizes, tokens, losses, "a test")
    for field in ("e", "a", "b", "alpha", "beta"):
        assert getattr(found, field) == pytest.approx(getattr(law, field), rel=0.01), field


def test_noise_of_a_few_thousandths_moves_the_exponents_little() -> None:
    sizes, tokens = (values.ravel() for values in LARGE)
    rng = np.random.default_rng(0)
    losses = np.array([BESIROGLU.loss(n, d) for n, d in zip(sizes, tokens, strict=True)])
    found = fit_scaling(sizes, tokens, losses * (1 + 0.002 * rng.normal(size=losses.size)), "a test")
    assert (found.alpha, found.beta) == pytest.approx((BESIROGLU.alpha, BESIROGLU.beta), abs=0.06)
    assert found.loss(7e10, 1.4e12) == pytest.approx(BESIROGLU.loss(7e10, 1.4e12), rel=0.02)


def test_losses_without_an_effect_of_size_have_none() -> None:
    sizes, tokens = (values.ravel() for values in SMALL)
    found = fit_scaling(sizes, tokens, 2.0 + 500 / tokens**0.5, "a test")
    assert found.a / sizes.min() ** found.alpha < 1e-3 * found.loss(sizes.min(), tokens.min())


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="found 4 points, expected 5 or more"):
        fit_scaling(np.ones(4), np.ones(4), np.ones(4), "a test")
