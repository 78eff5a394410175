"""Reading the files of a run for reports. Missing and unreadable files are tolerated."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5x_like.evaluation.results_store import with_added
from t5x_like.reports.charts import Series, is_finite, series
from t5x_like.reports.sample_view import Sample, sample
from t5x_like.utils.json_reader import read_json
from t5x_like.utils.jsonl import read_records

DENOISER = "loss/"
"""Prefix of the names of the denoisers' losses."""


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """Content of the readable files of a run directory; `notes` lists the problems of the others.

    `evaluation` is the one to show as the result, `evaluations` are all of them by step.
    """

    name: str
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    samples: Sequence[Sample]
    exit: Mapping[str, Any]
    notes: Sequence[str]

    @functools.cached_property
    def objectives(self) -> Mapping[str, Mapping[str, Any]]:
        """Names of the denoisers: those of the mixture, then those that occur in the records only."""
        mixture = mapping(self.config.get("data")).get("mixture") or ()
        found = {str(item["name"]): item for item in mixture if isinstance(item, Mapping) and "name" in item}
        names = dict.fromkeys(name for record in self.records for name in record if name.startswith(DENOISER))
        return {**{name.removeprefix(DENOISER): {} for name in names}, **found}


def read_run(run_dir: Path) -> RunFiles:
    """Read those that exist of config.json, metrics.jsonl, evaluation(s).json(l), samples.json and exit.json.

    Raises:
      FileNotFoundError: `run_dir` is no directory.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such directory")
    notes: list[str] = []

    def document(name: str) -> Any:
        try:
            return read_json(run_dir / name)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            notes.append(f"{name} cannot be read: {error}")
            return None

    def lines(name: str) -> list[dict[str, Any]]:
        try:
            found = read_records(run_dir / name)
        except FileNotFoundError:
            return []
        except OSError as error:
            notes.append(f"{name} cannot be read: {error}")
            return []
        notes.extend(f"{name}: {problem}" for problem in found.problems())
        return found.records

    config = mapping(document("config.json"))
    recorded = {record["step"]: record for record in lines("evaluations.jsonl")}
    evaluations: dict[int, Mapping[str, Any]] = {**with_added(run_dir, recorded)}
    evaluation = mapping(document("evaluation.json"))
    if isinstance(evaluation.get("step"), int):
        # Not in its place: in an object store, others have added results that this file does not have.
        evaluations.setdefault(evaluation["step"], evaluation)
    if evaluations:
        evaluation = evaluations[max(evaluations)]
    samples = document("samples.json")
    records = lines("metrics.jsonl")
    losses = series(records, "loss")
    broken = losses.steps[~is_finite(losses.values)]
    if len(broken):
        notes.append(f"the loss is not finite in {len(broken)} records, first at step {int(broken[0]):,}")
    return RunFiles(
        name=str(config.get("name") or run_dir.resolve().name),
        config=config,
        records=records,
        evaluations=[evaluations[step] for step in sorted(evaluations)],
        evaluation=evaluation,
        samples=[sample(item) for item in samples if isinstance(item, Mapping)] if isinstance(samples, list) else [],
        exit=mapping(document("exit.json")),
        notes=notes,
    )


def held_out_mean(files: RunFiles) -> Series:
    """Return the held-out loss of the mixture at each evaluation: the training loss on held-out rows.

    Objectives are evaluated on equal numbers of rows, so their loss tokens are weighted by the mixture's rates.
    """
    points = []
    for evaluation in files.evaluations:
        total = weight = 0.0
        for name, found in mapping(evaluation.get("objectives")).items():
            loss, tokens = (number(mapping(found).get(key)) for key in ("loss", "tokens"))
            share = number(mapping(files.objectives.get(name)).get("rate", 1.0)) * tokens
            if share > 0:
                total, weight = total + loss * share, weight + share
        if weight:
            points.append((number(evaluation.get("step")), total / weight))
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return Series("held-out", table[:, 0], table[:, 1])


def evaluated(files: RunFiles, *keys: str) -> Series:
    """Return a number of each evaluation, by its path."""
    records = []
    for evaluation in files.evaluations:
        value: Any = evaluation
        for key in keys:
            value = mapping(value).get(key)
        records.append({"step": evaluation.get("step"), "value": value})
    return series(records, "value")


def baseline_values(evaluation: Mapping[str, Any]) -> list[tuple[str, float, bool]]:
    """Return (name, bits per byte, True for the model) of the model and its baselines, best first."""
    words = {
        "unigram_bits_per_byte": "token unigram entropy",
        "byte_entropy_bits_per_byte": "byte entropy",
        "gzip_bits_per_byte": "gzip",
        "lzma_bits_per_byte": "lzma",
    }
    baselines = mapping(evaluation.get("baselines"))
    found = [(label, number(baselines.get(key)), False) for key, label in words.items()]
    found.append(("this model", number(mapping(evaluation.get("prefix_lm")).get("bits_per_byte")), True))
    bound = number(mapping(evaluation.get("diffusion_bound")).get("bits_per_byte"))
    found.append(("this model, upper bound", bound, True))
    return sorted((item for item in found if math.isfinite(item[1])), key=lambda item: item[1])


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float:
    """Return `value` if it is a number, otherwise NaN."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
