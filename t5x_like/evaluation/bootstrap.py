"""Bootstrap percentile intervals of metrics (Efron 1979, "Bootstrap Methods: Another Look at the Jackknife").

The resampled examples of draw k are a function of k and the number of examples. The draws of two models over the same
examples are therefore paired, and their differences give the interval of the paired bootstrap (Koehn 2004, "Statistical
Significance Tests for Machine Translation Evaluation").
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.utils.type_aliases import FloatArray

DRAWS = 1000
LEVEL = 0.95


def draws(examples: int, count: int = DRAWS) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the indices of each draw: [examples], drawn with replacement."""
    for number in range(count):
        yield np.random.default_rng([examples, number]).integers(examples, size=examples)


def interval(values: Sequence[float] | FloatArray, level: float = LEVEL) -> tuple[float, float] | None:
    """Return the central `level` of the finite values, or None if there are fewer than 20 finite values."""
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if len(finite) < 20:
        return None
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def metric_draws(
    metric: Callable[[Sequence[Any], Sequence[Any]], Mapping[str, Any]],
    targets: Sequence[Any],
    outputs: Sequence[Any],
    *,
    count: int = DRAWS,
    seconds: float = 5.0,
    fewest: int = 40,
) -> dict[str, list[float]]:
    """Return the values of a metric on each draw of examples, by the metric's names.

    Args:
      metric: Maps targets and outputs to values by name.
      count: Number of draws.
      seconds: Processor time after which no further draw is begun, except for the first `fewest`: slow metrics get
        fewer draws.
      fewest: Smallest number of draws.

    Returns:
      Values [draws] by name. Values that are not numbers are left out; a draw without a value is nan.
    """
    values_of: dict[str, list[float]] = {}
    begun = time.process_time()
    for number, indices in enumerate(draws(len(targets), count)):
        if number >= fewest and time.process_time() - begun > seconds:
            break
        try:
            values = metric([targets[i] for i in indices], [outputs[i] for i in indices])
        except Exception:  # A user's own function may fail, e.g. on a draw with examples of a single class.
            values = {}
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        for name in {*values_of, *numbers}:
            series = values_of.setdefault(name, [math.nan] * number)
            series.append(numbers.get(name, math.nan))
    return values_of


def ratio_draws(sums_N: FloatArray, weights_N: FloatArray, *, count: int = DRAWS) -> FloatArray:
    """Return the sum of sums over the sum of weights on each draw [count], e.g. a mean loss or bits per byte."""
    values = np.full(count, np.nan)
    for number, indices in enumerate(draws(len(sums_N), count)):
        weight = weights_N[indices].sum()
        values[number] = sums_N[indices].sum() / weight if weight else np.nan
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
