"""Two or more evaluated checkpoints side by side: their metrics with intervals, their differences, samples aligned.

Reads what `eval` has left in the runs' directories. Draws of the bootstrap belong together by their numbers
(`bootstrap.draws`): where two models were evaluated on the same examples, the differences of their draws are those of
the paired bootstrap; where not, draws of one are set against other draws of the other, as independent ones are.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5x_like.config import ConfigError, DataError, Problem
from t5x_like.evaluation.asked import Reference
from t5x_like.evaluation.bootstrap import Floats, interval
from t5x_like.evaluation.held_out import HELD_OUT, held_out_draws
from t5x_like.evaluation.records import DETAILS, SAMPLES, read_evaluations, scalars

MOST = 6
"""Runs that a page can tell apart."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """An evaluated checkpoint.

    Attributes:
      values: Numbers by name, as of `records.scalars`.
      draws: Of the metrics that were drawn, [draws] each.
      examples: What the draws of a metric are over: equal for two subjects if their examples are the same.
      answers: Of each Task, its rows by index.
    """

    name: str
    path: Path
    step: int
    config: Mapping[str, Any]
    values: Mapping[str, float]
    draws: Mapping[str, Floats]
    examples: Mapping[str, Any]
    samples: Sequence[Mapping[str, str]]
    answers: Mapping[str, Sequence[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A subject's value of a metric, and how it differs from the first subject's.

    Attributes:
      verdict: "better", "worse", "" where the interval of the difference holds 0 or there is none.
    """

    value: float | None
    interval: tuple[float, float] | None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    paired: bool = False
    verdict: str = ""


@dataclasses.dataclass(frozen=True)
class MetricRow:
    name: str
    lower_is_better: bool
    cells: tuple[Cell, ...]


def read_subject(reference: Reference) -> Subject:
    """An evaluated checkpoint of a run; without a step, the newest one that is evaluated.

    Raises:
      ConfigError: the run has not been evaluated there.
      DataError: a file of the evaluation is malformed.
    """
    path = reference.path
    found = read_evaluations(path)
    step = next(iter(reference.steps), max(found, default=None))
    if step is None or step not in found:
        steps = ", ".join(map(str, found)) or "none"
        expected = f"an evaluated step: `t5x-like eval {path}" + ("`" if step is None else f" --step {step}`")
        raise ConfigError([Problem(str(path), f"steps {steps}" if found else "no evaluation", expected)])
    folder = path / DETAILS / str(step)
    rows = _lines(folder / HELD_OUT)
    draws: dict[str, Floats] = dict(held_out_draws(rows))
    examples: dict[str, Any] = {name: _digests(rows, name) for name in draws}
    answers = {}
    for task in found[step].get("tasks", {}):
        answers[task] = _lines(folder / f"{task}.jsonl")
        document = _document(folder / f"{task}.metrics.json", {})
        for metric, values in document.get("draws", {}).items():
            name = f"{task}/{metric}"
            draws[name] = np.array([_finite(value) for value in values])
            examples[name] = [(row.get("inputs"), json.dumps(row.get("target"))) for row in answers[task]]
    samples = _document(path / SAMPLES, [])
    newest = step == max(found)
    return Subject(
        name=f"{_document(path / 'config.json', {}).get('name') or path.name}, step {step:,}",
        path=path,
        step=step,
        config=_document(path / "config.json", {}),
        values=scalars(found[step]),
        draws=draws,
        examples=examples,
        samples=[sample for sample in samples if isinstance(sample, dict)] if newest else [],
        answers=answers,
    )


def compare(subjects: Sequence[Subject]) -> list[MetricRow]:
    """All metrics of all subjects, in the order in which they come; perplexity, which says what the loss says, is left
    out."""
    names = dict.fromkeys(name for subject in subjects for name in subject.values)
    return [
        MetricRow(name, lower_is_better(name), tuple(_cell(name, subjects[0], subject) for subject in subjects))
        for name in names
        if not name.startswith("perplexity/")
    ]


def lower_is_better(name: str) -> bool:
    """Of losses and bits; what a Task reports is taken for the better the higher it is, unless its name says loss."""
    words = name.lower().replace("/", " ").replace("_", " ").split()
    return any(word in ("loss", "bits", "perplexity", "error", "wer", "cer") for word in words)


def _cell(name: str, first: Subject, subject: Subject) -> Cell:
    value, base = subject.values.get(name), first.values.get(name)
    own = subject.draws.get(name)
    drawn = None if own is None else interval(own)
    if subject is first or value is None or base is None:
        return Cell(value, drawn)
    theirs = first.draws.get(name)
    if own is None or theirs is None:
        return Cell(value, drawn, value - base)
    paired = first.examples.get(name) == subject.examples.get(name)
    count = min(len(own), len(theirs))
    differences = own[:count] - (theirs[:count] if paired else theirs[:count][::-1])
    around = interval(differences)
    verdict = ""
    if around is not None and (around[0] > 0 or around[1] < 0):
        verdict = "better" if (around[1] < 0) == lower_is_better(name) else "worse"
    return Cell(value, drawn, value - base, around, paired, verdict)


def aligned_samples(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """Held-out samples that more than one subject has: denoiser, inputs, targets, and each one's prediction or None."""
    tables = [
        {(str(s.get("denoiser")), str(s.get("inputs")), str(s.get("targets"))): str(s.get("prediction")) for s in one}
        for one in (subject.samples for subject in subjects)
    ]
    keys = dict.fromkeys(key for table in tables for key in table)
    return [
        {"denoiser": key[0], "inputs": key[1], "targets": key[2], "predictions": [table.get(key) for table in tables]}
        for key in keys
        if sum(key in table for table in tables) > 1
    ]


def aligned_answers(subjects: Sequence[Subject], count: int) -> dict[str, list[dict[str, Any]]]:
    """Of each Task that more than one subject has on the same examples: the first `count` examples to which they say
    different things, or else the first ones."""
    found: dict[str, list[dict[str, Any]]] = {}
    for task in dict.fromkeys(name for subject in subjects for name in subject.answers):
        tables = [{row.get("index"): row for row in subject.answers.get(task, ())} for subject in subjects]
        rows = []
        for index in dict.fromkeys(index for table in tables for index in table):
            there = [table.get(index) for table in tables]
            known = [row for row in there if row is not None]
            same = {(row.get("inputs"), json.dumps(row.get("target"))) for row in known}
            if len(known) < 2 or len(same) > 1:
                continue
            said = [None if row is None else _said(row) for row in there]
            rows.append(
                {
                    "index": index,
                    "inputs": str(known[0].get("inputs", "")),
                    "targets": _text(known[0].get("target")),
                    "predictions": said,
                    "differs": len({one for one in said if one is not None}) > 1,
                }
            )
        rows.sort(key=lambda row: not row["differs"])
        if rows:
            found[task] = rows[:count]
    return found


def configuration_differences(subjects: Sequence[Subject]) -> list[tuple[str, list[str]]]:
    """(field, its value for each subject) where the runs' configurations differ."""
    flat = [dict(_flat(subject.config)) for subject in subjects]
    names = dict.fromkeys(name for one in flat for name in one)
    rows = [(name, [one.get(name, "–") for one in flat]) for name in names if name not in ("name", "schema_version")]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [
            pair for key, child in value.items() for pair in _flat(child, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, "none" if value is None else value if isinstance(value, str) else json.dumps(value))]


def _said(row: Mapping[str, Any]) -> str:
    for key in ("output", "prediction", "score"):
        if key in row:
            return _text(row[key])
    return ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _digests(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Any]:
    wanted: Callable[[str], bool] = (
        (lambda name: name.rpartition("/")[2] == "prefix_lm")
        if metric.endswith("bits_per_byte")
        else (lambda name: f"loss/{name}" == metric)
    )
    return [row.get("digest") for row in rows if wanted(str(row["objective"]))]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: found no JSON lines ({error}); evaluate the step again") from None
    return [row for row in rows if isinstance(row, dict)]


def _document(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: found no JSON ({error}); evaluate the step again") from None


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
