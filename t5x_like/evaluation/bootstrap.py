"""How far a metric would move with other examples of the same kind: bootstrap intervals (Efron 1979), by percentiles.

The examples of draw number k depend on k and on how many examples there are, and on nothing else. So the draws of two
models over the same examples belong together, and their differences have the interval of the paired bootstrap (Koehn
2004).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

DRAWS = 1000
LEVEL = 0.95
Floats = npt.NDArray[np.float64]


def draws(examples: int, count: int = DRAWS) -> Iterator[npt.NDArray[np.int64]]:
    """The examples of each draw: [examples] places, with repetition."""
    for number in range(count):
        yield np.random.default_rng([examples, number]).integers(examples, size=examples)


def interval(values: Sequence[float] | Floats, level: float = LEVEL) -> tuple[float, float] | None:
    """The central `level` of the draws that are finite; None for fewer than 20 of them, which say too little."""
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if len(finite) < 20:
        return None
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def of_metric(
    metric: Callable[[Sequence[Any], Sequence[Any]], Mapping[str, Any]],
    targets: Sequence[Any],
    outputs: Sequence[Any],
    *,
    count: int = DRAWS,
    seconds: float = 5.0,
    fewest: int = 40,
) -> dict[str, list[float]]:
    """Any metric on each draw of examples, by the metric's names.

    Args:
      seconds: Of processor time, after which no draw but the `fewest` first ones is begun: a slow metric gets fewer.

    Returns:
      What is no number is left out; a draw for which the metric has no value is nan.
    """
    found: dict[str, list[float]] = {}
    begun = time.process_time()
    for number, places in enumerate(draws(len(targets), count)):
        if number >= fewest and time.process_time() - begun > seconds:
            break
        try:
            values = metric([targets[i] for i in places], [outputs[i] for i in places])
        except Exception:  # A user's own function: of a draw of one class only, say.
            values = {}
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        for name in {*found, *numbers}:
            series = found.setdefault(name, [math.nan] * number)
            series.append(numbers.get(name, math.nan))
    return found


def of_ratio(sums_N: Floats, weights_N: Floats, *, count: int = DRAWS) -> Floats:
    """sum of sums / sum of weights on each draw [count]: a mean loss, or bits over bytes."""
    values = np.full(count, np.nan)
    for number, places in enumerate(draws(len(sums_N), count)):
        weight = weights_N[places].sum()
        values[number] = sums_N[places].sum() / weight if weight else np.nan
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
