"""Agreement of predictions with targets, in per cent: F1 and correlations, for text metrics and for task heads."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from t5x_like.utils.type_aliases import FloatArray


def macro_f1(targets: Iterable[Any], predictions: Iterable[Any], labels: Iterable[Any]) -> float:
    """Return the mean F1 of `labels`, times 100; a label that neither occurs nor is predicted has an F1 of 0."""
    targets, predictions = list(targets), list(predictions)
    occurrences, predicted = collections.Counter(targets), collections.Counter(predictions)
    hits = collections.Counter(target for target, output in zip(targets, predictions, strict=True) if target == output)
    scores = [2 * hits[label] / max(occurrences[label] + predicted[label], 1) for label in labels]
    return 100 * float(np.mean(scores))


def pearson(x: Sequence[float] | FloatArray, y: Sequence[float] | FloatArray) -> float:
    """Return Pearson's correlation coefficient, times 100; nan if x or y is constant."""
    x_N, y_N = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if np.ptp(x_N) == 0 or np.ptp(y_N) == 0:
        return float("nan")
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    return 100 * float((x_N * y_N).sum() / np.sqrt(np.square(x_N).sum() * np.square(y_N).sum()))


def spearman(x: Sequence[float] | FloatArray, y: Sequence[float] | FloatArray) -> float:
    """Return Spearman's rank correlation, times 100, with mean ranks for ties; nan if x or y is constant."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float] | FloatArray) -> FloatArray:
    _, index_N, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index_N]
