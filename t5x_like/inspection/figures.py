"""Histograms as geometry: bars in a square of 1000 x 1000, y downwards, which the page stretches."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from t5x_like.data.chi_square import Fit
from t5x_like.data.store_statistics import Lengths
from t5x_like.monitoring import formats
from t5x_like.monitoring.curves import EXTENT, Scale, Tick, ticks

_AIR = 1.06
_FEWEST_BINS = 16


@dataclasses.dataclass(frozen=True)
class Bar:
    """A rectangle from the ground up, and what the pointer is told of it."""

    x: float
    width: float
    height: float
    text: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """A histogram ready to be drawn.

    Attributes:
      law: SVG path of what is expected, "" without.
      value: What stands beside the title.
      label: The figure in words.
    """

    title: str
    value: str
    note: str
    css: str
    bars: tuple[Bar, ...]
    law: str
    x_ticks: tuple[Tick, ...]
    label: str


def histogram(title: str, found: Lengths, *, note: str = "", css: str = "", log: bool = False) -> Figure:
    """Lengths in bins, with their median beside the title."""
    low, high = float(found.edges_H[0]), float(found.edges_H[-1])
    if log:
        low = max(low, 1.0)
    elif high - low < _FEWEST_BINS:
        # One or two lengths are narrow bars, not walls.
        low = max(low - (_FEWEST_BINS - (high - low)) // 2, 0.0)
        high = low + _FEWEST_BINS
    scale = Scale(low, max(high, low + 1), log=log)
    tallest = max(float(found.counts_H.max(initial=0)), 1.0) * _AIR
    bars = []
    for count, left, right in zip(
        found.counts_H.tolist(), found.edges_H[:-1].tolist(), found.edges_H[1:].tolist(), strict=True
    ):
        if count:
            start, stop = scale(max(left, low)), scale(max(right, low))
            what = f"{left:,.0f}" if right - left <= 1 else f"{left:,.0f} to {right - 1:,.0f}"
            bars.append(Bar(start, stop - start, EXTENT * count / tallest, f"{what} tokens: {count:,}"))
    median = found.quantiles[2]
    marks = [value for value in ticks(scale, 6 if log else 3) if value == int(value)]
    return Figure(
        title=title,
        value=f"{median:,.0f}",
        note=note or "median",
        css=css,
        bars=tuple(bars),
        law="",
        x_ticks=tuple(Tick(scale(value) / 10, _mark(value, log)) for value in marks),
        label=f"{title}: {found.count:,}, median {median:,.0f}, longest {found.quantiles[-1]:,.0f} tokens",
    )


def _mark(value: float, log: bool) -> str:
    """A number on an axis: neighbours must not be rounded to one, and 10k is short for 10.0k."""
    if not log and value < 100_000:
        return f"{value:,.0f}"
    return re.sub(r"\.0+(?=\D|$)", "", formats.count(value))


def outcomes(title: str, fit: Fit, *, css: str = "") -> Figure:
    """Measured counts of a law's outcomes as bars, side by side, and what it expects as a line over them. An outcome
    that stands for several numbers is drawn as high as they are on average."""
    count = len(fit.labels)
    widths = np.ones(count) if fit.widths is None else fit.widths
    measured, expected = fit.measured / widths, fit.expected / widths
    tallest = max(float(measured.max(initial=0)), float(expected.max(initial=0)), 1e-9) * _AIR
    width = EXTENT / max(count, 1)
    texts = [
        f"{label}: {found:,.0f}, expected {wanted:,.1f}"
        for label, found, wanted in zip(fit.labels, fit.measured.tolist(), fit.expected.tolist(), strict=True)
    ]
    heights = (EXTENT * measured / tallest).tolist()
    tops = (EXTENT - EXTENT * expected / tallest).tolist()
    return Figure(
        title=title,
        value=p_value(fit.p_value),
        note=f"{fit.measured.sum():,.0f} counted" + (f", {fit.forbidden:,} not allowed" if fit.forbidden else ""),
        css=css + (" misfit" if is_misfit(fit) else ""),
        bars=tuple(Bar(index * width, width, heights[index], texts[index]) for index in range(count)),
        law="".join(f"M{index * width:.1f} {top:.1f}h{width:.1f}" for index, top in enumerate(tops)),
        x_ticks=tuple(_outcome_ticks(fit.labels, width)),
        label=f"{title}: {p_value(fit.p_value)}",
    )


def _outcome_ticks(labels: Sequence[str], width: float) -> list[Tick]:
    """The first and the last outcome, and of what is between them as many as have room."""
    last = len(labels) - 1
    stride = max(math.ceil(len(labels) / 5), 1)
    chosen = [index for index in range(0, last + 1, stride) if index == 0 or last - index >= stride]
    if last > 0:
        chosen.append(last)
    found = []
    for index in dict.fromkeys(chosen):
        start, dash, _ = labels[index].partition("–")
        text = f"{start} %" if labels[index].endswith("%") else start + ("+" if dash and index == last else "")
        found.append(Tick((index + 0.5) * width / 10, text))
    return found


MISFIT = 0.001
"""A p-value below which a sample is said not to fit: rare enough for a page of a few dozen of them."""


def is_misfit(fit: Fit) -> bool:
    """Whether the sample can hardly be from the law."""
    return fit.forbidden > 0 or (fit.p_value is not None and fit.p_value < MISFIT)


def p_value(value: float | None) -> str:
    """In words of a table."""
    if value is None:
        return "–"
    if value < MISFIT:
        return f"p < {MISFIT:g}"
    return f"p = {value:.2f}" if value >= 0.01 else f"p = {value:.3f}"


def quantile_row(found: Lengths) -> list[str]:
    """Quantiles and mean as text."""
    return [*map(_length, found.quantiles), _length(round(found.mean, 1))]


def _length(value: float) -> str:
    if value >= 100_000:
        return formats.count(value)
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
