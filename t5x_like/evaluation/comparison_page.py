"""The comparison of evaluated checkpoints as one HTML page that loads nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from t5x_like.config import ConfigError, DataError, Problem
from t5x_like.evaluation import comparison
from t5x_like.evaluation.asked import Reference
from t5x_like.evaluation.bootstrap import LEVEL
from t5x_like.evaluation.comparison import Cell, MetricRow, Subject
from t5x_like.monitoring import formats
from t5x_like.monitoring.pages import content_hash, environment, resource, write_page
from t5x_like.monitoring.samples import pieces

_TEMPLATES = Path(__file__).parent / "page_template"


@dataclasses.dataclass(frozen=True)
class Bar:
    """A cell as it is drawn, in per cent of the width: an interval and the value in it."""

    text: str
    around: str
    difference: str
    difference_around: str
    verdict: str
    paired: bool
    value: float | None
    low: float | None
    high: float | None


def write_comparison(references: Sequence[Reference], output: Path, *, samples: int = 6) -> Path:
    """Compares evaluated checkpoints, the others with the first.

    Args:
      references: Runs, by their newest evaluated step if none is named.
      samples: Of each Task.

    Raises:
      ConfigError: fewer than two, too many to tell apart, or one that is not evaluated.
      DataError: a file of an evaluation is malformed, or the page cannot be written.
    """
    each: list[Reference] = []
    for one in references:
        each += [Reference(one.path, (step,)) for step in one.steps] or [one]
    if not 2 <= len(each) <= comparison.MOST:
        raise ConfigError([Problem("RUN", f"{len(each)} checkpoints", f"2 to {comparison.MOST} to compare")])
    page = render([comparison.read_subject(reference) for reference in each], samples=samples)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return write_page(output, page)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror or error})") from None


def render(subjects: Sequence[Subject], *, samples: int = 6) -> str:
    """The page as text."""
    rows = comparison.compare(subjects)
    style = resource("report.css") + resource("comparison.css", _TEMPLATES)
    held_out = [
        {**sample, "inputs": pieces(sample["inputs"]), "targets": pieces(sample["targets"])}
        for sample in comparison.aligned_samples(subjects)
    ]
    for sample in held_out:
        sample["predictions"] = [None if said is None else pieces(said) for said in sample["predictions"]]
    return (
        environment(_TEMPLATES)
        .get_template("comparison.html")
        .render(
            subjects=subjects,
            style=Markup(style),
            style_hash=content_hash(style),
            level=f"{100 * LEVEL:.0f} %",
            groups=_groups(rows),
            verdicts=_verdicts(subjects, rows),
            held_out=held_out,
            answers=comparison.aligned_answers(subjects, samples),
            differences=comparison.configuration_differences(subjects),
        )
    )


def _groups(rows: Sequence[MetricRow]) -> list[tuple[str, list[tuple[MetricRow, list[Bar]]]]]:
    """Metrics under a title each: the held-out text's, then those of each Task."""
    groups: dict[str, list[tuple[MetricRow, list[Bar]]]] = {}
    for row in rows:
        first = row.name.partition("/")[0]
        is_held_out = first in ("loss", "accuracy") or row.name.endswith("bits_per_byte")
        groups.setdefault("Held-out text" if is_held_out else first, []).append((row, _bars(row.cells)))
    return list(groups.items())


def _bars(cells: Sequence[Cell]) -> list[Bar]:
    ends = [end for cell in cells for end in (cell.value, *(cell.interval or ())) if _is_number(end)]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    margin = (high - low) * 0.04 or 1.0

    def place(value: float | None) -> float | None:
        return 100 * (value - low + margin) / (high - low + 2 * margin) if value is not None else None

    return [
        Bar(
            text="–" if cell.value is None else formats.number(cell.value),
            around=_interval(cell.interval),
            difference="" if cell.difference is None else f"{cell.difference:+.4g}",
            difference_around=_interval(cell.difference_interval, sign="+"),
            verdict=cell.verdict,
            paired=cell.paired,
            value=place(cell.value),
            low=None if cell.interval is None else place(cell.interval[0]),
            high=None if cell.interval is None else place(cell.interval[1]),
        )
        for cell in cells
    ]


def _verdicts(subjects: Sequence[Subject], rows: Sequence[MetricRow]) -> list[tuple[int, int, int, int]]:
    """(subject, better, worse, not told apart) for each but the first, over the metrics whose difference has an
    interval."""
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
