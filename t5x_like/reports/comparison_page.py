"""Comparison of evaluated checkpoints as one HTML page without external resources."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.evaluation import comparison
from t5x_like.evaluation.bootstrap import LEVEL
from t5x_like.evaluation.comparison import EvaluatedCheckpoint, MetricCell, MetricRow
from t5x_like.reports.charts import Chart, Scale, Series, chart, draw, draw_points, series, value_scale
from t5x_like.reports.html_page import content_hash, environment, resource
from t5x_like.reports.run_data import RunFiles, evaluated, held_out_mean, read_run
from t5x_like.reports.sample_view import pieces
from t5x_like.utils import formatting
from t5x_like.utils.atomic_write import write_atomically


@dataclasses.dataclass(frozen=True)
class CellView:
    """Cell of the table of metrics: texts, and value and interval as positions in percent of the width."""

    text: str
    around: str
    difference: str
    difference_around: str
    verdict: str
    paired: bool
    value: float | None
    low: float | None
    high: float | None


def write_comparison(references: Sequence[CheckpointRef], output: Path, *, samples: int = 6) -> Path:
    """Compare evaluated checkpoints with the first of them.

    Args:
      references: Runs with steps; without a step the newest evaluated one.
      output: The HTML file.
      samples: Number of samples of each Task.

    Raises:
      ConfigError: fewer than two, more than `comparison.MAX_RUNS`, or one that is not evaluated.
      DataError: a file of an evaluation is malformed, or the page cannot be written.
    """
    each: list[CheckpointRef] = []
    for one in references:
        each += [CheckpointRef(one.path, (step,)) for step in one.steps] or [one]
    if not 2 <= len(each) <= comparison.MAX_RUNS:
        found = "1 checkpoint" if len(each) == 1 else f"{len(each)} checkpoints"
        raise ConfigError([ConfigProblem("MODEL", found, f"2 to {comparison.MAX_RUNS} to compare")])
    subjects = [comparison.read_checkpoint(reference) for reference in each]
    repeated = [
        name for name, count in Counter(f"{one.path.resolve()}:{one.step}" for one in subjects).items() if count > 1
    ]
    if repeated:
        raise ConfigError(
            [ConfigProblem("MODEL", f"{name} more than once", "different checkpoints") for name in repeated]
        )
    page = render(subjects, samples=samples)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror or error})") from None
    return output


def render(subjects: Sequence[EvaluatedCheckpoint], *, samples: int = 6) -> str:
    """Return the HTML page."""
    rows = comparison.compare(subjects)
    style = resource("run_report.css") + resource("comparison.css")
    held_out = [
        {**sample, "inputs": pieces(sample["inputs"]), "targets": pieces(sample["targets"])}
        for sample in comparison.aligned_samples(subjects)
    ]
    runs = _runs(subjects)
    for sample in held_out:
        sample["predictions"] = [None if said is None else pieces(said) for said in sample["predictions"]]
    return (
        environment()
        .get_template("comparison.html")
        .render(
            subjects=subjects,
            style=Markup(style),
            style_hash=content_hash(style),
            level=f"{100 * LEVEL:.0f} %",
            groups=_groups(rows),
            verdicts=_verdicts(subjects, rows),
            curves=_curves(subjects, runs),
            curve_numbers=list(runs),
            same_mixture=len({str(files.objectives) for files in runs.values()}) == 1,
            held_out=held_out,
            answers=comparison.aligned_answers(subjects, samples),
            differences=comparison.configuration_differences(subjects),
        )
    )


def _runs(subjects: Sequence[EvaluatedCheckpoint]) -> dict[int, RunFiles]:
    """Return the files of each run by the number of its first checkpoint, without models that are not runs."""
    first_of_path: dict[Path, int] = {}
    for number, subject in enumerate(subjects):
        first_of_path.setdefault(subject.path.resolve(), number)
    files = {number: read_run(subjects[number].path) for number in first_of_path.values()}
    return {number: found for number, found in files.items() if found.records}


def _curves(subjects: Sequence[EvaluatedCheckpoint], runs: Mapping[int, RunFiles]) -> list[Chart]:
    """Return charts with a curve of each run; none of a metric that fewer than two runs have."""
    steps = [record["step"] for files in runs.values() for record in (*files.records, *files.evaluations)]
    x = Scale(0.0, float(max(steps, default=1)) or 1.0)
    charts: list[Chart] = []

    def add(key: str, title: str, note: str, curves: Mapping[int, Series], *, noisy: bool) -> None:
        found = {number: curve for number, curve in curves.items() if len(curve.finite)}
        if len(found) < 2:
            return
        y = value_scale(list(found.values()))
        line = draw if noisy else draw_points
        lines = [line(curve, subjects[number].name, f"s{number}", x, y) for number, curve in found.items()]
        charts.append(chart(key, title, lines, x, y, note=note, css="wide", tick_count=5))

    losses = {number: series(files.records, "loss") for number, files in runs.items()}
    add("loss", "Training loss", "cross-entropy per loss token in nats", losses, noisy=True)
    held_out = {number: held_out_mean(files) for number, files in runs.items()}
    add("held-out", "Held-out loss of the mixture", "cross-entropy per loss token in nats", held_out, noisy=False)
    # Numbers of different texts are not drawn together.
    if len({str(subjects[number].held_out) for number in runs}) == 1:
        bits = {number: evaluated(files, "prefix_lm", "bits_per_byte") for number, files in runs.items()}
        add("bits", "Bits per byte of held-out text", "", bits, noisy=False)
    return charts


def _groups(rows: Sequence[MetricRow]) -> list[tuple[str, list[tuple[MetricRow, list[CellView]]]]]:
    """Return the metrics by title: those of held-out text, then those of each Task."""
    groups: dict[str, list[tuple[MetricRow, list[CellView]]]] = {}
    for row in rows:
        first = row.name.partition("/")[0]
        is_held_out = first in ("loss", "accuracy") or row.name.endswith(("bits_per_byte", "bits_per_byte_bound"))
        groups.setdefault("Held-out text" if is_held_out else first, []).append((row, _bars(row.cells)))
    return list(groups.items())


def _bars(cells: Sequence[MetricCell]) -> list[CellView]:
    ends = [end for cell in cells for end in (cell.value, *(cell.interval or ())) if _is_number(end)]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    margin = (high - low) * 0.04 or 1.0

    def position(value: float | None) -> float | None:
        return 100 * (value - low + margin) / (high - low + 2 * margin) if value is not None else None

    return [
        CellView(
            text="–" if cell.value is None else formatting.number(cell.value),
            around=_interval(cell.interval),
            difference=_difference(cell),
            difference_around=_interval(cell.difference_interval, sign="+"),
            verdict=cell.verdict,
            paired=cell.paired,
            value=position(cell.value),
            low=None if cell.interval is None else position(cell.interval[0]),
            high=None if cell.interval is None else position(cell.interval[1]),
        )
        for cell in cells
    ]


def _difference(cell: MetricCell) -> str:
    if cell.other_text:
        return "other text"
    return "" if cell.difference is None else f"{cell.difference:+.4g}"


def _verdicts(subjects: Sequence[EvaluatedCheckpoint], rows: Sequence[MetricRow]) -> list[tuple[int, int, int, int]]:
    """Return (subject, better, worse, undecided) for all but the first, over metrics with an interval."""
    found = []
    for number in range(1, len(subjects)):
        cells = [row.cells[number] for row in rows if row.cells[number].difference_interval is not None]
        better, worse = (sum(cell.verdict == word for cell in cells) for word in ("better", "worse"))
        found.append((number, better, worse, len(cells) - better - worse))
    return found


def _interval(ends: tuple[float, float] | None, sign: str = "") -> str:
    return "" if ends is None else f"{ends[0]:{sign}.4g} to {ends[1]:{sign}.4g}"


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
