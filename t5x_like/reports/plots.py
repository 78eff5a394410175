"""Curves of a run as a PNG image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from t5x_like.reports.charts import Series, decimate, series, smooth
from t5x_like.reports.run_data import baseline_values, held_out_mean, read_run

_INK, _QUIET, _RULE, _HELD_OUT = "#22242a", "#6a6e77", "#e5e2da", "#b4462f"
_MODES = {"R": "#2c6cb0", "X": "#bb5a22", "S": "#2f8060"}
_ALONE = "#2c5f9e"


def write_curves_png(run_dir: Path, path: Path) -> Path:
    """Draw the loss, the loss of each denoiser, and bits per byte with the baselines.

    Args:
      run_dir: A run directory; curves whose files do not exist are omitted.
      path: The PNG file.

    Returns:
      `path`.

    Raises:
      FileNotFoundError: `run_dir` is no directory.
      OSError: the picture cannot be written.
    """
    files = read_run(run_dir)
    figure = Figure(figsize=(12, 3.6), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    bars = baseline_values(files.evaluation)
    widths = [1.0, 1.0, 0.8] if bars else [1.0, 1.0]
    axes = figure.subplots(1, len(widths), width_ratios=widths)

    losses = axes[0]
    _style(losses, "Loss of the mixture, nats per loss token")
    _curve(losses, series(files.records, "loss"), _ALONE, "training")
    held_out = held_out_mean(files)
    if len(held_out):
        losses.plot(held_out.steps, held_out.values, "o-", color=_HELD_OUT, ms=3.5, lw=0.8, label="held-out")
    if losses.get_legend_handles_labels()[0]:
        losses.legend(frameon=False, fontsize=9, labelcolor=_INK)

    denoisers = axes[1]
    _style(denoisers, "Loss of each denoiser")
    ends = []
    for name, objective in files.objectives.items():
        curve = series(files.records, f"loss/{name}").finite
        if len(curve):
            color = _MODES.get(str(objective.get("mode")), _ALONE)
            _curve(denoisers, curve, color, name, raw=False)
            ends.append((float((smooth(curve) or curve).values[-1]), name, color))
    _end_labels(denoisers, sorted(ends))

    if bars:
        _bars(axes[2], bars)
    figure.savefig(path, format="png")
    return path


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_INK, pad=10)
    axes.grid(axis="y", color=_RULE, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=_QUIET)
    axes.set_xlabel("step", fontsize=9, color=_QUIET)


def _curve(axes: Any, curve: Series, color: str, label: str, *, raw: bool = True) -> None:
    trend = smooth(curve)
    measured = decimate(curve)
    if trend is None:
        axes.plot(measured.steps, measured.values, ".-", color=color, lw=1.5, ms=3, label=label)
        return
    if raw:
        axes.plot(measured.steps, measured.values, color=color, lw=0.7, alpha=0.35)
    axes.plot(trend.steps, trend.values, color=color, lw=1.6, label=label)


def _end_labels(axes: Any, ends: list[tuple[float, str, str]]) -> None:
    """Write names at the right ends of the curves, moved apart so that they do not overlap."""
    low, high = axes.get_ylim()
    apart = (high - low) * 0.05
    heights = [value for value, _, _ in ends]
    for _ in range(100):
        for below in range(len(heights) - 1):
            missing = apart - (heights[below + 1] - heights[below])
            if missing > 0:
                heights[below] -= missing / 2
                heights[below + 1] += missing / 2
    for height, (_, name, color) in zip(heights, ends, strict=True):
        at = (1.0, height)
        axes.annotate(name, at, xycoords=("axes fraction", "data"), va="center", fontsize=8, color=color)


def _bars(axes: Any, bars: list[tuple[str, float, bool]]) -> None:
    _style(axes, "Bits per byte of held-out text")
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_xlabel("")
    names, values, is_own = zip(*reversed(bars), strict=True)
    colors = [_HELD_OUT if own else "#d9d6ce" for own in is_own]
    drawn = axes.barh(names, values, color=colors, height=0.55)
    axes.bar_label(drawn, fmt="%.2f", padding=4, fontsize=9, color=_INK)
    axes.tick_params(axis="y", labelcolor=_INK)
