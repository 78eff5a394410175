"""What is drawn from the held-out rows of an evaluation: mean losses, and bits per byte. Knows no jax."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.evaluation import bootstrap

HELD_OUT = "held_out.jsonl"
PREFIX_LM = "prefix_lm"
"""The objective of the windows whose first half is given."""


def held_out_intervals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bootstrap intervals over the rows, by the names of `records.scalars`."""
    found: dict[str, Any] = {}
    for name, values in held_out_draws(rows).items():
        found[name] = bootstrap.interval(values)
    return found


def held_out_draws(rows: Sequence[Mapping[str, Any]]) -> dict[str, bootstrap.Floats]:
    """The loss of each objective ("loss/NAME") and "bits_per_byte", on each draw of the rows [draws]."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(str(row["objective"]), []).append(row)
    drawn = {}
    for name, some in by_name.items():
        sums, tokens, sizes = (np.array([float(row[key]) for row in some]) for key in ("loss", "tokens", "bytes"))
        if name.rpartition("/")[2] == PREFIX_LM:
            drawn[name.replace(PREFIX_LM, "bits_per_byte")] = bootstrap.of_ratio(sums, sizes) / math.log(2)
        else:
            drawn[f"loss/{name}"] = bootstrap.of_ratio(sums, tokens)
    return drawn
