"""Metrics as (sum, weight), so that adding over steps, parts and processes gives the same weighted mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class WeightedMean(NamedTuple):
    """Weighted mean before the division. It is a pytree; `sum` and `weight` are scalars of any array library."""

    sum: Any
    weight: Any


def add(a: Mapping[str, WeightedMean], b: Mapping[str, WeightedMean]) -> dict[str, WeightedMean]:
    """Return the sums of both. A name that only one of them has is kept as it is."""
    total = dict(a)
    for name, mean in b.items():
        before = total.get(name)
        total[name] = mean if before is None else WeightedMean(before.sum + mean.sum, before.weight + mean.weight)
    return total


def compute(mean: WeightedMean) -> float:
    """Return sum / weight, or NaN for a weight of 0. This waits for the device if the arrays are being computed."""
    weight = float(mean.weight)
    return float(mean.sum) / weight if weight else float("nan")
