"""Geometry of histograms: bars in a square of 1000 x 1000, y downwards, which the page scales."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from t5x_like.data.inspection.goodness_of_fit import Fit
from t5x_like.data.inspection.store_statistics import LengthSummary
from t5x_like.reports.charts import EXTENT, Scale, Tick, ticks
from t5x_like.utils import formatting

_AIR = 1.06
_FEWEST_BINS = 16


@dataclasses.dataclass(frozen=True)
class HistogramBar:
    """Bar from the x axis upwards. `text` is its tooltip."""

    x: float
    width: float
    height: float
    text: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """Geometry and texts of a histogram.

    Attributes:
      value: Text beside the title.
      expected: SVG path of the expected counts, or "".
      label: Description of the figure for screen readers.
    """

    title: str
    value: str
    note: str
    css: str
    bars: tuple[HistogramBar, ...]
    expected: str
    x_ticks: tuple[Tick, ...]
    label: str


def histogram(title: str, lengths: LengthSummary, *, note: str = "", css: str = "", log: bool = False) -> Figure:
    """Return a histogram of lengths, with their median beside the title."""
    low, high = float(lengths.edges_H[0]), float(lengths.edges_H[-1])
    if log:
        low = max(low, 1.0)
    elif high - low < _FEWEST_BINS:
        # Widen the axis, so that one or two lengths give narrow bars.
        low = max(low - (_FEWEST_BINS - (high - low)) // 2, 0.0)
        high = low + _FEWEST_BINS
    scale = Scale(low, max(high, low + 1), log=log)
    tallest = max(float(lengths.counts_H.max(initial=0)), 1.0) * _AIR
    bars = []
    for count, left, right in zip(
        lengths.counts_H.tolist(), lengths.edges_H[:-1].tolist(), lengths.edges_H[1:].tolist(), strict=True
    ):
        if count:
            start, stop = scale(max(left, low)), scale(max(right, low))
            what = f"{left:,.0f}" if right - left <= 1 else f"{left:,.0f} to {right - 1:,.0f}"
            bars.append(HistogramBar(start, stop - start, EXTENT * count / tallest, f"{what} tokens: {count:,}"))
    median = lengths.quantiles[2]
    marks = [value for value in ticks(scale, 6 if log else 3) if value == int(value)]
    return Figure(
        title=title,
        value=f"{median:,.0f}",
        note=note or "median",
        css=css,
        bars=tuple(bars),
        expected="",
        x_ticks=tuple(Tick(scale(value) / 10, _mark(value, log)) for value in marks),
        label=f"{title}: {lengths.count:,}, median {median:,.0f}, longest {lengths.quantiles[-1]:,.0f} tokens",
    )


def _mark(value: float, log: bool) -> str:
    """Return the text of a tick: neighbors must not be rounded to the same text, and 10.0k is shortened to 10k."""
    if not log and value < 100_000:
        return f"{value:,.0f}"
    return re.sub(r"\.0+(?=\D|$)", "", formatting.count(value))


def outcomes(title: str, fit: Fit, *, css: str = "") -> Figure:
    """Return a histogram of the outcomes of a distribution: bars of measured counts, and a line of expected counts.

    An outcome that combines several numbers has the mean of their counts.
    """
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
        bars=tuple(HistogramBar(index * width, width, heights[index], texts[index]) for index in range(count)),
        expected="".join(f"M{index * width:.1f} {top:.1f}h{width:.1f}" for index, top in enumerate(tops)),
        x_ticks=tuple(_outcome_ticks(fit.labels, width)),
        label=f"{title}: {p_value(fit.p_value)}",
    )


def _outcome_ticks(labels: Sequence[str], width: float) -> list[Tick]:
    """Return ticks of the first and the last outcome, and of as many between them as fit."""
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
"""Significance level: samples with a smaller p-value do not fit. Small enough for a page of a few dozen tests."""


def is_misfit(fit: Fit) -> bool:
    """Return True if the sample does not fit the distribution."""
    return fit.forbidden > 0 or (fit.p_value is not None and fit.p_value < MISFIT)


def p_value(value: float | None) -> str:
    """Return the text of a p-value."""
    if value is None:
        return "–"
    if value < MISFIT:
        return f"p < {MISFIT:g}"
    return f"p = {value:.2f}" if value >= 0.01 else f"p = {value:.3f}"


def quantile_row(lengths: LengthSummary) -> list[str]:
    """Return the quantiles and the mean as text."""
    return [*map(_length, lengths.quantiles), _length(round(lengths.mean, 1))]


def _length(value: float) -> str:
    if value >= 100_000:
        return formatting.count(value)
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
