"""From rates to whole numbers: how many rows of a period each objective gets.

A mixture is made of equal periods, in which every objective has a fixed number of rows ("slots"). So the shares are
exact over each period, and which rows a step has is arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from t5x_like.config.data import DataConfig
from t5x_like.config.lengths import expected_loss_tokens, raw_window_length, windows_per_row
from t5x_like.config.objectives import Objective

MOST_SLOTS = 100
_MOST_EXACT = 1000
"""Sums that are tried for an exact proportion."""
_MOST_SUPERBLOCKS = 1_000_000


def slots(rates: Sequence[float], most: int = MOST_SLOTS) -> tuple[int, ...]:
    """Whole numbers in proportion to the rates: exactly if a sum of at most `most` can be, or else the nearest that sum
    to `most` (largest remainders), at least one for each rate above 0."""
    total = sum(rates)
    shares = [rate / total for rate in rates]
    for size in range(1, min(most, _MOST_EXACT) + 1):
        counts = [round(share * size) for share in shares]
        exact = all(abs(share * size - count) < 1e-9 for share, count in zip(shares, counts, strict=True))
        if exact and all(count or not rate for count, rate in zip(counts, rates, strict=True)):
            return tuple(counts)
    counts = [max(int(share * most), 1 if share > 0 else 0) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - shares[index] * most)
    for index in by_remainder[: max(most - sum(counts), 0)]:
        counts[index] += 1
    return tuple(counts)


def superblocks(rates: Sequence[float], most: int | None) -> tuple[int, ...]:
    """Superblocks that a period takes from each corpus: as many as it needs that the smallest share is right to 5 %.

    A corpus of a rare language must not be read a hundred times because a period is too short for its share.

    Args:
      rates: Of superblocks, by corpus.
      most: Of a period; what a phase does not use of its last one is not read. None: the phase has no end.
    """
    least = min(rate for rate in rates if rate > 0) / sum(rates)
    needed = min(math.ceil(20 / least), _MOST_SUPERBLOCKS, _MOST_SUPERBLOCKS if most is None else most)
    return slots(rates, max(needed, _MOST_EXACT))


@dataclasses.dataclass(frozen=True)
class Phase:
    """Rates in force from a step on.

    Attributes:
      objectives, corpora: Rates by name, of all that there are.
    """

    start_step: int
    objectives: Mapping[str, float]
    corpora: Mapping[str, float]


def phases(data: DataConfig) -> tuple[Phase, ...]:
    """The phases of the mixture, the first from step 0 on; each `RatePhase` changes what it names."""
    objectives = {objective.name: objective.rate for objective in data.objectives}
    corpora = {share.name: share.rate for share in data.sources}
    found = [Phase(0, objectives, corpora)]
    for change in data.schedule:
        objectives = {**objectives, **dict(change.objectives)}
        corpora = {**corpora, **dict(change.corpora)}
        found.append(Phase(change.start_step, objectives, corpora))
    return tuple(found)


def row_tokens(objective: Objective, data: DataConfig) -> int:
    """Raw tokens that a row of this objective takes from the text."""
    window = raw_window_length(objective, data.layout, data.inputs_length, data.targets_length)
    return window * windows_per_row(objective)


def row_loss_tokens(objective: Objective, data: DataConfig) -> float:
    """Mean number of scored tokens of a row of this objective."""
    window = raw_window_length(objective, data.layout, data.inputs_length, data.targets_length)
    return expected_loss_tokens(objective, window) * windows_per_row(objective)


def pattern(objectives: Sequence[Objective], data: DataConfig, rates: Mapping[str, float]) -> tuple[int, ...]:
    """Rows of each objective in a superblock: a stretch of text that is cut in the proportions of the mixture.

    Args:
      objectives: Of one corpus.
      data: Says how long their rows are and what the rates are shares of (`rates_by`).
      rates: By name, in force.
    """
    per_row = {
        "example": lambda objective: 1.0,
        "token": lambda objective: float(row_tokens(objective, data)),
        "loss_token": lambda objective: row_loss_tokens(objective, data),
    }[data.rates_by]
    return slots([rates[objective.name] / per_row(objective) for objective in objectives])
