"""Mixtures of objectives that are in use, as presets."""

from __future__ import annotations

from t5x_like.config.objectives import Mode, Objective, PrefixLM, SpanCorruption


def ul2(*, uniform: bool = True, t5_exact: bool = False) -> tuple[Objective, ...]:
    """UL2's seven denoisers (Tay et al. 2022, table 1) with its mode tokens.

    Args:
      uniform: One seventh each, as in the paper's listing; otherwise R, X and S get .4, .4 and .2 of the examples.
      t5_exact: T5's own span placement.
    """
    table: tuple[tuple[Mode, float, float], ...] = (
        ("R", 3.0, 0.15),
        ("R", 8.0, 0.15),
        ("X", 3.0, 0.5),
        ("X", 8.0, 0.5),
        ("X", 64.0, 0.15),
        ("X", 64.0, 0.5),
    )
    rate = {"R": 1.0, "X": 1.0, "S": 1.0} if uniform else {"R": 0.2, "X": 0.1, "S": 0.2}
    spans = tuple(
        SpanCorruption(
            name=f"{mode}_{mean:g}_{density:g}",
            rate=rate[mode],
            mean_noise_span_length=mean,
            noise_density=density,
            mode=mode,
            t5_exact=t5_exact,
        )
        for mode, mean, density in table
    )
    return (*spans, PrefixLM(name="S", rate=rate["S"], mode="S"))
