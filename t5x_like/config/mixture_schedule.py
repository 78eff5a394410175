"""Mixture schedule: the shares of corpora, and integer numbers of rows per objective and corpus that follow from rates.

A mixture consists of equal periods, in which every objective has a fixed number of rows. So the shares are
exact over each period, and the rows of a step follow by arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import assert_never

from t5x_like.config.data import CorpusMixingConfig, DataConfig
from t5x_like.config.objectives import Objective

MAX_ROWS_PER_BLOCK = 100
_MAX_EXACT_SUM = 1000
"""Largest sum that is tried for an exact proportion."""
_MAX_BLOCKS = 1_000_000


def integer_proportions(rates: Sequence[float], most: int = MAX_ROWS_PER_BLOCK) -> tuple[int, ...]:
    """Return integers in proportion to the rates, at least one for each rate above 0.

    They are exactly proportional if integers with a sum of at most `most` can be; otherwise they sum to `most` and are
    rounded by largest remainders.
    """
    total = sum(rates)
    shares = [rate / total for rate in rates]
    for size in range(1, min(most, _MAX_EXACT_SUM) + 1):
        # The smallest exact sum is best: blocks are then short, and little text is left over at the end of an epoch.
        counts = [round(share * size) for share in shares]
        exact = all(abs(share * size - count) < 1e-9 for share, count in zip(shares, counts, strict=True))
        if exact and all(count or not rate for count, rate in zip(counts, rates, strict=True)):
            return tuple(counts)
    counts = [max(int(share * most), 1 if share > 0 else 0) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - shares[index] * most)
    # Largest remainders: the rates that were rounded down most get one more.
    for index in by_remainder[: max(most - sum(counts), 0)]:
        counts[index] += 1
    return tuple(counts)


def blocks_per_period(rates: Sequence[float], most: int | None) -> tuple[int, ...]:
    """Return the number of blocks that a period takes from each corpus.

    The period is long enough for the smallest share to be right to 5 %: a corpus of a rare language must not be read a
    hundred times because a period is too short for its share.

    Args:
      rates: Rates of blocks, by corpus.
      most: Maximum number of blocks in a period, since the unused part of a phase's last period is not read. None:
        the phase has no end.
    """
    least = min(rate for rate in rates if rate > 0) / sum(rates)
    needed = min(math.ceil(20 / least), _MAX_BLOCKS, _MAX_BLOCKS if most is None else most)
    return integer_proportions(rates, max(needed, _MAX_EXACT_SUM))


@dataclasses.dataclass(frozen=True)
class Phase:
    """Rates that apply from a step on.

    Attributes:
      objectives, corpora: Rates of all objectives and of all corpora, by name.
      temperature: Temperature of the shares of corpora by size.
    """

    start_step: int
    objectives: Mapping[str, float]
    corpora: Mapping[str, float]
    temperature: float = 1.0


def phases(data: DataConfig) -> tuple[Phase, ...]:
    """Return the phases of the mixture, the first of which starts at step 0.

    Each `RatePhaseConfig` changes the rates that it names and keeps the others.
    """
    objectives = {objective.name: objective.rate for objective in data.objectives}
    corpora = {share.name: share.rate for share in data.sources}
    temperature = data.corpus_mixing.temperature
    result = [Phase(0, objectives, corpora, temperature)]
    for change in data.rate_schedule:
        objectives = {**objectives, **dict(change.objectives)}
        corpora = {**corpora, **dict(change.corpora)}
        temperature = temperature if change.temperature is None else change.temperature
        result.append(Phase(change.start_step, objectives, corpora, temperature))
    return tuple(result)


def row_tokens(objective: Objective, data: DataConfig) -> int:
    """Return the number of raw tokens of text in a row of this objective."""
    window = objective.raw_window_length(data.layout, data.inputs_length, data.targets_length)
    return window * objective.windows_per_row


def row_loss_tokens(objective: Objective, data: DataConfig) -> float:
    """Return the mean number of scored tokens in a row of this objective."""
    window = objective.raw_window_length(data.layout, data.inputs_length, data.targets_length)
    return objective.expected_loss_tokens(window) * objective.windows_per_row


def rows_per_block(objectives: Sequence[Objective], data: DataConfig, rates: Mapping[str, float]) -> tuple[int, ...]:
    """Return the number of rows of each objective in a block.

    A block is consecutive text that is cut into rows in the proportions of the mixture.

    Args:
      objectives: Objectives of one corpus.
      data: Configuration with the lengths of the rows and the unit of the rates (`rate_unit`).
      rates: Current rates by objective name.
    """
    per_row = {
        "example": lambda objective: 1.0,
        "token": lambda objective: float(row_tokens(objective, data)),
        "loss_token": lambda objective: row_loss_tokens(objective, data),
    }[data.rate_unit]
    return integer_proportions([rates[objective.name] / per_row(objective) for objective in objectives])


def corpus_rates(mixing: CorpusMixingConfig, phase: Phase, tokens: Mapping[str, int]) -> list[float]:
    """Return the relative shares of the rows, in the order of the phase's corpora.

    Args:
      mixing: Strategy and its parameters.
      phase: Rates in force, by corpus, and the temperature. A strategy that uses sizes multiplies its shares by the
        rates.
      tokens: Number of tokens, by corpus.
    """
    match mixing.strategy:
        case "rates":
            return list(phase.corpora.values())
        case "proportional":
            by_size = proportional(tokens, phase.temperature, mixing.maximum_tokens)
        case "unimax":
            assert mixing.budget_tokens is not None
            by_size = unimax(tokens, mixing.budget_tokens, mixing.max_epochs)
        case _:
            assert_never(mixing.strategy)
    return [rate * by_size[name] for name, rate in phase.corpora.items()]


def proportional(tokens: Mapping[str, int], temperature: float, maximum: int | None) -> dict[str, float]:
    """Return T5's examples-proportional mixing rates (Raffel et al. 2020, section 3.5.2).

    The weight of a corpus is min(size, maximum) ** (1 / temperature). The rates are scaled to sum to 1.
    """
    sizes = {name: min(size, maximum or size) for name, size in tokens.items()}
    weights = {name: size ** (1.0 / temperature) for name, size in sizes.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def unimax(tokens: Mapping[str, int], budget: int, max_epochs: float) -> dict[str, float]:
    """Return the UniMax rates (Chung et al. 2023, algorithm 1), which sum to 1.

    The budget is divided evenly, starting with the smallest corpus, but no corpus gets more than `max_epochs` times its
    size. The amount that a corpus cannot take goes to the larger ones. If all corpora at `max_epochs` together are
    smaller than the budget, their rates are proportional to their sizes.
    """
    remaining = float(budget)
    allocated: dict[str, float] = {}
    ascending = sorted(tokens, key=lambda name: (tokens[name], name))
    for index, name in enumerate(ascending):
        # An even division of what is left among the corpora that have none yet. A corpus that cannot take its part
        # raises the parts of the corpora after it.
        even_share = remaining / (len(ascending) - index)
        allocated[name] = min(even_share, tokens[name] * max_epochs)
        remaining -= allocated[name]
    total = sum(allocated.values())
    return {name: allocated[name] / total for name in tokens}
