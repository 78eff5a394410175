"""Metrics as (sum, weight): adding over steps, parts and processes never changes what the mean means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Mean(NamedTuple):
    """A weighted mean that is not divided yet. A pytree; `sum` and `weight` are scalars of any array library."""

    sum: Any
    weight: Any


def add(a: Mapping[str, Mean], b: Mapping[str, Mean]) -> dict[str, Mean]:
    """The metrics of both. A name that only one of them has is kept as it is."""
    total = dict(a)
    for name, mean in b.items():
        before = total.get(name)
        total[name] = mean if before is None else Mean(before.sum + mean.sum, before.weight + mean.weight)
    return total


def value(mean: Mean) -> float:
    """sum / weight; nan where nothing was counted. Waits for the device if the arrays are still being computed."""
    weight = float(mean.weight)
    return float(mean.sum) / weight if weight else float("nan")
