"""Geometry of curves and bars: from metric values to the numbers of a drawing.

A plot is a square of 1000 x 1000, y downwards, which the page scales. Values that are not finite break a line. Curves
of any length are reduced to a few hundred points that keep the extremes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.utils import formatting

EXTENT = 1000.0
MAX_BUCKETS = 300
MIN_TO_SMOOTH = 50
_LARGEST = float(np.finfo(np.float32).max)
"""Metrics are float32. Larger values are treated as infinite, because their sums and differences would be."""


@dataclasses.dataclass(frozen=True)
class Series:
    """Metric by step: two float64 arrays of the same length, steps ascending; values may be NaN or infinite."""

    name: str
    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> Series:
        keep = is_finite(self.values)
        return Series(self.name, self.steps[keep], self.values[keep])

    def __len__(self) -> int:
        return len(self.steps)


def is_finite(values: np.ndarray) -> np.ndarray:
    """Return a mask of the values that can be drawn."""
    return np.abs(values) <= _LARGEST


def series(records: Iterable[Mapping[str, Any]], name: str) -> Series:
    """Return the metric `name` of the records that have it as a number."""
    found = [(record["step"], record[name]) for record in records if _is_number(record.get(name))]
    table = np.asarray(found, dtype=np.float64).reshape(-1, 2)
    return Series(name, table[:, 0], table[:, 1])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def smooth(curve: Series, *, log: bool = False) -> Series | None:
    """Return the trend of a noisy curve, or None if there are too few points.

    The window is Gaussian, centered so that the trend does not lag, and narrow at the start, where a loss falls
    steeply. The trend has the breaks of the curve. With `log`, for positive values on a logarithmic axis, logarithms
    are averaged.
    """
    finite = curve.finite
    if len(finite) < MIN_TO_SMOOTH:
        return None
    buckets = np.array_split(np.arange(len(finite)), min(len(finite), 4 * MAX_BUCKETS))
    steps = np.array([finite.steps[bucket].mean() for bucket in buckets])
    measured = np.log10(finite.values) if log else finite.values
    values = np.array([measured[bucket].mean() for bucket in buckets])
    widest = max(len(values) / 100, 1.0)
    trend = np.empty_like(values)
    for index in range(len(values)):
        width = min(widest, (index + 1) / 3)
        reach = math.ceil(3 * width)
        near = slice(max(index - reach, 0), index + reach + 1)
        window = np.exp(-0.5 * ((np.arange(len(values))[near] - index) / width) ** 2)
        trend[index] = np.average(values[near], weights=window)
    if log:
        trend = 10.0**trend
    breaks = np.unique(np.searchsorted(steps, curve.steps[~is_finite(curve.values)]))
    breaks = breaks[(breaks > 0) & (breaks < len(steps))]
    steps, trend = np.insert(steps, breaks, steps[breaks]), np.insert(trend, breaks, np.nan)
    return decimate(Series(curve.name, steps, trend))


def decimate(curve: Series, buckets: int = MAX_BUCKETS) -> Series:
    """Return at most 2 * buckets + 2 points: the ends, and the minimum and maximum of each bucket, in order.

    A value that is not finite is kept as a break, once per bucket.
    """
    if len(curve) <= 2 * buckets:
        return curve
    keep = {0, len(curve) - 1}
    for bucket in np.array_split(np.arange(len(curve)), buckets):
        values = curve.values[bucket]
        finite = is_finite(values)
        if finite.any():
            keep.add(int(bucket[np.where(finite, values, np.inf).argmin()]))
            keep.add(int(bucket[np.where(finite, values, -np.inf).argmax()]))
        if not finite.all():
            keep.add(int(bucket[finite.argmin()]))
    index = sorted(keep)
    return Series(curve.name, curve.steps[index], curve.values[index])


@dataclasses.dataclass(frozen=True)
class Scale:
    """Map from the values of an axis to [0, EXTENT]. `log` requires positive values."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return EXTENT * (value - low) / (high - low)


def value_scale(curves: Sequence[Series], *, from_zero: bool = False) -> Scale:
    """Return an axis for all finite values of `curves`, with a margin; logarithmic if they span two decades.

    With `from_zero`, for speeds and shares, it starts at zero.
    """
    values = np.concatenate([np.zeros(0), *(curve.finite.values for curve in curves)])
    if not len(values):
        return Scale(0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if from_zero and low >= 0:
        return Scale(0.0, 1.06 * high or 1.0)
    if low > 0 and high / low > 100:
        return Scale(low / 1.2, high * 1.2, log=True)
    air = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low - air, high + air) if low < 0 or low - air > 0 else Scale(0.0, high + air)


def ticks(scale: Scale, count: int) -> list[float]:
    """Return about `count` round numbers within the axis."""
    if scale.log:
        powers = range(math.ceil(math.log10(scale.low)), math.floor(math.log10(scale.high)) + 1)
        stride = max(math.ceil(len(powers) / count), 1)
        return [10.0**power for power in powers][::stride]
    rough = (scale.high - scale.low) / max(count, 1)
    if not (rough > 0 and math.isfinite(rough)):
        return []
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= 0.75 * rough)
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def path(curve: Series, x: Scale, y: Scale) -> str:
    """Return SVG path data of a line; a value that is not finite, or not on the axis, breaks it.

    A point between two breaks becomes a line of length 0, which round caps draw as a dot.
    """
    parts: list[str] = []
    drawn: list[str] = []

    def flush() -> None:
        if drawn:
            parts.append("M" + "L".join(drawn) + ("h0" if len(drawn) == 1 else ""))
            drawn.clear()

    for step, value, finite in zip(curve.steps, curve.values, is_finite(curve.values), strict=True):
        if not finite or (y.log and value <= 0):
            flush()
        else:
            drawn.append(f"{x(step):.1f} {EXTENT - y(value):.1f}")
    flush()
    return "".join(parts)


def dots(curve: Series, x: Scale, y: Scale) -> str:
    """Return SVG path data of separate points, to be stroked with round caps."""
    finite = curve.finite
    return "".join(
        f"M{x(step):.1f} {EXTENT - y(value):.1f}h0" for step, value in zip(finite.steps, finite.values, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Tick:
    position: float
    """Position in percent of the axis, from the left or from the top."""
    text: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """Horizontal bar with label and value.

    Attributes:
      percent: Length in percent of the width.
      css: Class of the bar.
      note: Text beside the value.
    """

    label: str
    value: str
    percent: float
    css: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Line:
    """Geometry of a curve. `shown` are the values that the pointer reads."""

    label: str
    css: str
    raw: str
    line: str
    dots: str
    shown: Series


@dataclasses.dataclass(frozen=True)
class Chart:
    """Geometry and texts of a plot, and the data for the page's script."""

    key: str
    title: str
    note: str
    unit: str
    css: str
    lines: tuple[Line, ...]
    references: tuple[Tick, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x: Scale
    y: Scale
    latest: str
    label: str

    def data(self) -> dict[str, Any]:
        """Return the data for the script: axes, and the points of each curve."""
        return {
            "key": self.key,
            "unit": self.unit,
            "x": [self.x.low, self.x.high],
            "y": [self.y.low, self.y.high],
            "log": self.y.log,
            "curves": [
                {
                    "label": line.label,
                    "steps": [round(float(step), 3) for step in line.shown.steps],
                    "values": [float(f"{value:.6g}") for value in line.shown.values],
                }
                for line in self.lines
            ],
        }


def draw(curve: Series, label: str, css: str, x: Scale, y: Scale, *, noisy: bool = True) -> Line:
    """Return a training curve; a noisy one has its trend in front of the measured values."""
    trend = smooth(curve, log=y.log) if noisy else None
    measured = decimate(curve)
    raw = path(measured, x, y)
    if trend is None:
        points = dots(measured, x, y) if len(measured) < 3 else ""
        return Line(label, css, "", raw, points, _on_axis(measured, y))
    return Line(label, css, raw, path(trend, x, y), "", _on_axis(trend, y))


def draw_points(curve: Series, label: str, css: str, x: Scale, y: Scale) -> Line:
    """Return a curve of few exact measurements: connected points."""
    measured = decimate(curve)
    return Line(label, css, "", path(measured, x, y), dots(measured, x, y), _on_axis(measured, y))


def _on_axis(curve: Series, y: Scale) -> Series:
    finite = curve.finite
    keep = finite.values > 0 if y.log else np.ones(len(finite), bool)
    return Series(curve.name, finite.steps[keep], finite.values[keep])


def chart(
    key: str,
    title: str,
    lines: Sequence[Line],
    x: Scale,
    y: Scale,
    *,
    note: str = "",
    unit: str = "number",
    css: str = "",
    tick_count: int = 3,
    references: Mapping[str, float] | None = None,
) -> Chart:
    """Return a chart of curves.

    Args:
      key: Name within the page.
      title: Title of the chart.
      lines: Curves for the axes `x` and `y`.
      x: Axis of steps.
      y: Axis of values.
      note: Text beside the title.
      unit: Format of values: a key of UNITS.
      css: Class of the figure.
      tick_count: Approximate number of ticks on the y axis.
      references: Values of horizontal lines by name.
    """
    write = UNITS[unit]
    steps = ticks(x, 5 if "wide" in css else 2)
    shown = next((line.shown for line in lines if len(line.shown)), None)
    latest = write(float(shown.values[-1])) if shown is not None else "–"
    label = title
    if shown is not None:
        first, last = (f"{write(float(shown.values[i]))} at step {formatting.count(shown.steps[i])}" for i in (0, -1))
        label = f"{title}: from {first} to {last}"
    return Chart(
        key=key,
        title=title,
        note=note,
        unit=unit,
        css=css,
        lines=tuple(lines),
        references=tuple(Tick(_top(y, value), name) for name, value in (references or {}).items()),
        x_ticks=tuple(Tick(x(step) / 10, _short(formatting.count(step))) for step in steps if step == int(step)),
        y_ticks=tuple(Tick(_top(y, value), _short(write(value))) for value in ticks(y, tick_count)),
        x=x,
        y=y,
        latest=latest,
        label=label,
    )


def _top(y: Scale, value: float) -> float:
    return (EXTENT - y(value)) / 10


def _short(text: str) -> str:
    """Remove unnecessary zeros of a number on an axis: 1.50k is 1.5k, 42.0 % is 42 %, 1.00e-04 is 1e-4."""
    text = re.sub(r"\.(\d*?)0+(?=\D|$)", lambda match: f".{match[1]}" if match[1] else "", text)
    return re.sub(r"e([+-])0", r"e\1", text)


UNITS = {
    "number": formatting.number,
    "count": formatting.count,
    "percent": formatting.percent,
    "seconds": formatting.duration,
}
"""Format of values by unit; the page's script has the same four."""
