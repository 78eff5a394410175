"""Calibration of predicted probabilities, and the table of true against predicted labels."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.errors import DataError

BINS = 15
"""Bins of the expected calibration error, as in Guo et al. 2017."""


def calibration(targets: Sequence[Any], predictions: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return how well probabilities agree with the frequencies of the labels.

    Args:
      targets: The true label of each example.
      predictions: The probability of each label.

    Returns:
      ece: the expected calibration error (Guo et al. 2017), in per cent: the mean over examples of the difference
        between accuracy and mean probability of the predicted label in `BINS` bins of equal width, closed on the right.
      brier: the mean squared difference of the probabilities from 1 for the true label and 0 for the others, summed
        over labels.
      nll: the mean negative log-probability of the true label, in nats.

    Raises:
      DataError: a true label has no probability.
    """
    names = list(predictions[0])
    missing = {str(target) for target in targets} - {*names}
    if missing or any(set(prediction) != {*names} for prediction in predictions):
        found = f"the labels {', '.join(sorted(missing))}" if missing else "probabilities of different labels"
        raise DataError(f"found {found}, expected a probability for each label in each prediction: {', '.join(names)}")
    p_NxC = np.array([[prediction[name] for name in names] for prediction in predictions], np.float64)
    true_N = np.array([names.index(str(target)) for target in targets])
    confidence_N, is_right_N = p_NxC.max(1), p_NxC.argmax(1) == true_N
    bin_N = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence_N)
    gaps = [abs((is_right_N[bin_N == index] - confidence_N[bin_N == index]).sum()) for index in range(BINS)]
    rows = np.arange(len(true_N))
    one_hot_NxC = np.eye(len(names))[true_N]
    return {
        "ece": 100 * float(np.sum(gaps) / len(true_N)),
        "brier": float(np.square(p_NxC - one_hot_NxC).sum(1).mean()),
        "nll": float(-np.log(np.maximum(p_NxC[rows, true_N], np.finfo(np.float64).tiny)).mean()),
    }


def confusion(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, Any]:
    """Return {"labels": names, "counts": rows}: row i, column j counts the examples of label i predicted as label j."""
    labels = sorted({*map(str, targets), *map(str, predictions)})
    counts = collections.Counter(zip(map(str, targets), map(str, predictions), strict=True))
    return {"labels": labels, "counts": [[counts[true, said] for said in labels] for true in labels]}
