"""Comparison of evaluated checkpoints: metrics with intervals, differences, and aligned samples.

The input is what `eval` has written to the run directories. Draws of the bootstrap are matched by their index
(`bootstrap.draws`). Where two models were evaluated on the same examples, the differences of their draws give the
paired bootstrap. Otherwise the draws of one model are matched with other draws of the other model, as independent
samples.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.evaluation.bootstrap import interval
from t5x_like.evaluation.per_example_loss import HELD_OUT, held_out_draws
from t5x_like.evaluation.results_store import (
    BITS_BOUND,
    BITS_OF_CONTINUATION,
    CONTINUATION,
    DETAILS,
    DIFFUSION_BOUND,
    SAMPLES,
    read_evaluations,
    scalars,
)
from t5x_like.utils.json_reader import parse_json, read_json
from t5x_like.utils.type_aliases import FloatArray

MAX_RUNS = 6
"""Largest number of runs that a page can distinguish by color."""


@dataclasses.dataclass(frozen=True)
class EvaluatedCheckpoint:
    """Evaluated checkpoint.

    Attributes:
      name: Name of the run and step.
      path: Run directory.
      step: Step of the checkpoint.
      config: Configuration of the run.
      values: Metrics by name, as in `results_store.scalars`.
      draws: Bootstrap draws [draws] of the metrics that have them.
      examples: Identity of the examples that the draws of a metric resample: equal for two checkpoints that were
        evaluated on the same examples.
      held_out: Identity of the held-out text of each corpus; see `heldout_loss.evaluate_held_out`.
      samples: Decoded samples, if the checkpoint is the newest evaluated one.
      answers: Rows of each Task.
      bounds: Names of the metrics that are upper bounds of what they are for other models.
    """

    name: str
    path: Path
    step: int
    config: Mapping[str, Any]
    values: Mapping[str, float]
    draws: Mapping[str, FloatArray]
    examples: Mapping[str, Any]
    held_out: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, str]]
    answers: Mapping[str, Sequence[Mapping[str, Any]]]
    bounds: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class MetricCell:
    """Value of a metric for one checkpoint, and its difference from the first checkpoint's.

    Attributes:
      value: Value; None if the checkpoint does not have the metric.
      interval: Bootstrap interval of the value.
      difference: Value minus the first checkpoint's.
      difference_interval: Bootstrap interval of the difference.
      paired: The interval of the difference is that of the paired bootstrap.
      verdict: "better" or "worse"; "" where the interval of the difference contains 0, where the two were not scored on
        the same examples, and where a bound leaves it open.
      other_text: The two were scored on different held-out text, so that a difference would have no meaning.
    """

    value: float | None
    interval: tuple[float, float] | None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    paired: bool = False
    verdict: str = ""
    other_text: bool = False


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """Metric with a cell for each checkpoint."""

    name: str
    lower_is_better: bool
    cells: tuple[MetricCell, ...]


def read_checkpoint(reference: CheckpointRef) -> EvaluatedCheckpoint:
    """Read an evaluated checkpoint of a run; without a step, the newest evaluated one.

    Raises:
      ConfigError: the run has not been evaluated at the step.
      DataError: a file of the evaluation is malformed.
    """
    path = reference.path
    if not path.is_dir():
        raise ConfigError([ConfigProblem(str(path), "no such directory", "the directory of an evaluated run")])
    evaluations = read_evaluations(path)
    step = next(iter(reference.steps), max(evaluations, default=None))
    if step is None or step not in evaluations:
        steps = ", ".join(map(str, evaluations)) or "none"
        expected = f"an evaluated step: `t5x-like eval {path}" + ("`" if step is None else f":{step}`")
        raise ConfigError([ConfigProblem(str(path), f"steps {steps}" if evaluations else "no evaluation", expected)])
    try:
        return _evaluated(path, step, evaluations)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        found = f"a malformed evaluation ({type(error).__name__}: {error})"
        raise DataError(f"{path / DETAILS / str(step)}: found {found}; evaluate the step again") from None


def _evaluated(path: Path, step: int, evaluations: Mapping[int, Mapping[str, Any]]) -> EvaluatedCheckpoint:
    folder, result = path / DETAILS / str(step), evaluations[step]
    rows = _lines(folder / HELD_OUT)
    draws: dict[str, FloatArray] = dict(held_out_draws(rows))
    examples: dict[str, Any] = {name: _digests(rows, name) for name in draws}
    answers = {}
    for task in result.get("tasks", {}):
        if ".." in Path(task).parts or Path(task).is_absolute():
            raise ValueError(f"the task {task!r}")
        answers[task] = _lines(folder / f"{task}.jsonl")
        document = _document(folder / f"{task}.metrics.json", {})
        for row in answers[task]:
            _require(row, {"index": int | str | None, "inputs": str | None})
        for metric, values in document.get("draws", {}).items():
            name = f"{task}/{metric}"
            draws[name] = np.array([_finite(value) for value in values])
            examples[name] = [(row.get("inputs"), json.dumps(row.get("target"))) for row in answers[task]]
    held_out = result.get("held_out", [])
    for part in held_out:
        _require(part, {"fingerprint": str, "tokenizer": str, "documents": int, "bytes": int})
    samples, config = _document(path / SAMPLES, []), _document(path / "config.json", {})
    return EvaluatedCheckpoint(
        name=f"{config.get('name') or path.name}, step {step:,}",
        path=path,
        step=step,
        config=config,
        values=scalars(result),
        draws=draws,
        examples=examples,
        held_out=held_out,
        samples=[sample for sample in samples if isinstance(sample, dict)] if step == max(evaluations) else [],
        answers=answers,
        bounds=frozenset([BITS_OF_CONTINUATION] if evaluations[step].get(CONTINUATION, {}).get("is_bound") else []),
    )


def _require(values: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Raise TypeError unless the values of these names have these types."""
    for name, expected in types.items():
        if not isinstance(values.get(name), expected):
            raise TypeError(f"{name}: found {str(values.get(name))[:80]!r}")


def compare(checkpoints: Sequence[EvaluatedCheckpoint]) -> list[MetricRow]:
    """Return all metrics of all checkpoints, without perplexity, which follows from the loss."""
    names = dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.values)
    return [
        MetricRow(
            name, lower_is_better(name), tuple(_cell(name, checkpoints[0], checkpoint) for checkpoint in checkpoints)
        )
        for name in names
        if not name.startswith("perplexity/")
    ]


def lower_is_better(name: str) -> bool:
    """Return True for losses, bits and error rates, by name. Other metrics are better the higher they are."""
    words = name.lower().replace("/", " ").replace("_", " ").split()
    return any(word in ("loss", "bits", "perplexity", "error", "wer", "cer") for word in words)


def _cell(name: str, first: EvaluatedCheckpoint, checkpoint: EvaluatedCheckpoint) -> MetricCell:
    value, base = checkpoint.values.get(name), first.values.get(name)
    draws = checkpoint.draws.get(name)
    value_interval = None if draws is None else interval(draws)
    if checkpoint is first or value is None or base is None:
        return MetricCell(value, value_interval)
    if not _same_text(name, first, checkpoint):
        return MetricCell(value, value_interval, other_text=True)
    first_draws = first.draws.get(name)
    if draws is None or first_draws is None:
        return MetricCell(value, value_interval, value - base)
    paired = first.examples.get(name) == checkpoint.examples.get(name)
    count = min(len(draws), len(first_draws))
    # Reversing the first checkpoint's draws pairs different draws, which are independent.
    differences = draws[:count] - (first_draws[:count] if paired else first_draws[:count][::-1])
    difference_interval = interval(differences)
    verdict = ""
    if paired and difference_interval is not None and (difference_interval[0] > 0 or difference_interval[1] < 0):
        verdict = "better" if (difference_interval[1] < 0) == lower_is_better(name) else "worse"
    bounds = [name in one.bounds for one in (first, checkpoint)]
    # An upper bound below an exact value is a verdict; one above it leaves open where the exact value is.
    if (verdict == "better" and bounds == [True, False]) or (verdict == "worse" and bounds == [False, True]):
        verdict = ""
    return MetricCell(value, value_interval, value - base, difference_interval, paired, verdict)


def _same_text(name: str, first: EvaluatedCheckpoint, other: EvaluatedCheckpoint) -> bool:
    """Return whether two checkpoints' values of a metric are for the same text.

    They always are for Tasks, whose examples are compared one by one. The stores of two tokenizers hold the same
    held-out text if their numbers of documents and of bytes are equal.
    """
    if any(name.startswith(f"{task}/") for task in first.answers):
        return True
    if name in first.examples and first.examples[name] == other.examples.get(name):
        return True
    if not first.held_out or len(first.held_out) != len(other.held_out):
        return False
    return all(
        one["fingerprint"] == two["fingerprint"]
        or (
            one["tokenizer"] != two["tokenizer"]
            and (one["documents"], one["bytes"]) == (two["documents"], two["bytes"])
        )
        for one, two in zip(first.held_out, other.held_out, strict=True)
    )


def aligned_samples(checkpoints: Sequence[EvaluatedCheckpoint]) -> list[dict[str, Any]]:
    """Return the held-out samples that several checkpoints have: denoiser, inputs, targets, predictions or None."""
    tables = [
        {
            (str(s.get("denoiser")), str(s.get("inputs")), str(s.get("targets"))): str(s.get("prediction"))
            for s in samples
        }
        for samples in (checkpoint.samples for checkpoint in checkpoints)
    ]
    keys = dict.fromkeys(key for table in tables for key in table)
    return [
        {"denoiser": key[0], "inputs": key[1], "targets": key[2], "predictions": [table.get(key) for table in tables]}
        for key in keys
        if sum(key in table for table in tables) > 1
    ]


def aligned_answers(checkpoints: Sequence[EvaluatedCheckpoint], count: int) -> dict[str, list[dict[str, Any]]]:
    """Return up to `count` examples of each Task that several checkpoints were evaluated on, with all predictions.

    Examples with different predictions come first.
    """
    aligned: dict[str, list[dict[str, Any]]] = {}
    for task in dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.answers):
        tables = [{row.get("index"): row for row in checkpoint.answers.get(task, ())} for checkpoint in checkpoints]
        rows = []
        for index in dict.fromkeys(index for table in tables for index in table):
            rows_of_index = [table.get(index) for table in tables]
            known = [row for row in rows_of_index if row is not None]
            examples = {(row.get("inputs"), json.dumps(row.get("target"))) for row in known}
            if len(known) < 2 or len(examples) > 1:
                continue
            predictions = [None if row is None else _prediction(row) for row in rows_of_index]
            rows.append(
                {
                    "index": index,
                    "inputs": str(known[0].get("inputs", "")),
                    "targets": _text(known[0].get("target")),
                    "predictions": predictions,
                    "differs": len({text for text in predictions if text is not None}) > 1,
                }
            )
        rows.sort(key=lambda row: not row["differs"])
        if rows:
            aligned[task] = rows[:count]
    return aligned


def configuration_differences(checkpoints: Sequence[EvaluatedCheckpoint]) -> list[tuple[str, list[str]]]:
    """Return (field, value of each checkpoint) where the configurations of the runs differ."""
    flat = [dict(_flatten(checkpoint.config)) for checkpoint in checkpoints]
    names = dict.fromkeys(name for fields in flat for name in fields)
    rows = [
        (name, [fields.get(name, "–") for fields in flat]) for name in names if name not in ("name", "schema_version")
    ]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [
            pair for key, child in value.items() for pair in _flatten(child, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, "none" if value is None else value if isinstance(value, str) else json.dumps(value))]


def _prediction(row: Mapping[str, Any]) -> str:
    for key in ("output", "prediction", "score"):
        if key in row:
            return _text(row[key])
    return ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _digests(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Any]:
    names = {"bits_per_byte": "prefix_lm", BITS_BOUND: DIFFUSION_BOUND, BITS_OF_CONTINUATION: CONTINUATION}
    of_text = names.get(metric.rpartition("/")[2])
    matches: Callable[[str], bool] = (
        (lambda name: metric in (f"loss/{name}", f"accuracy/{name}"))
        if of_text is None
        else (lambda name: name.rpartition("/")[2] == of_text)
    )
    return [row.get("digest") for row in rows if matches(str(row["objective"]))]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [parse_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: found invalid JSON lines ({error}); evaluate the step again") from None
    return [row for row in rows if isinstance(row, dict)]


def _document(path: Path, default: Any) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: found invalid JSON ({error}); evaluate the step again") from None


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
