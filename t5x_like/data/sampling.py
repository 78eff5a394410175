"""How corpora share the rows: by given rates, by their sizes, or as evenly as their sizes allow."""

from __future__ import annotations

from collections.abc import Mapping

from t5x_like.config.data import SamplingConfig


def corpus_rates(sampling: SamplingConfig, rates: Mapping[str, float], tokens: Mapping[str, int]) -> list[float]:
    """Shares of the rows, in the order of `rates`.

    Args:
      sampling: The law.
      rates: By name, in force; where the law goes by size, factors on what it gives.
      tokens: Of each corpus.
    """
    if sampling.law == "rates":
        return list(rates.values())
    if sampling.law == "proportional":
        by_size = proportional(tokens, sampling.temperature, sampling.maximum_tokens)
    else:
        assert sampling.budget_tokens is not None
        by_size = unimax(tokens, sampling.budget_tokens, sampling.max_epochs)
    return [rate * by_size[name] for name, rate in rates.items()]


def proportional(tokens: Mapping[str, int], temperature: float, maximum: int | None) -> dict[str, float]:
    """T5's mixing (Raffel et al. 2020, section 3.5.2): min(size, maximum) ** (1 / temperature), scaled to sum to 1."""
    sizes = {name: min(size, maximum or size) for name, size in tokens.items()}
    weights = {name: size ** (1.0 / temperature) for name, size in sizes.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def unimax(tokens: Mapping[str, int], budget: int, max_epochs: float) -> dict[str, float]:
    """UniMax (Chung et al. 2023, algorithm 1): the budget is shared out evenly, from the smallest corpus on, but none
    gets more than `max_epochs` of its size; what it cannot take goes to the larger ones. Shares sum to 1.

    Where even all corpora at `max_epochs` do not make up the budget, they share in proportion to their sizes.
    """
    left = float(budget)
    given: dict[str, float] = {}
    ascending = sorted(tokens, key=lambda name: (tokens[name], name))
    for index, name in enumerate(ascending):
        even = left / (len(ascending) - index)
        given[name] = min(even, tokens[name] * max_epochs)
        left -= given[name]
    total = sum(given.values())
    return {name: given[name] / total for name in tokens}
