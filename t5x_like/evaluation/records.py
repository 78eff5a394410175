"""The scores of a run's steps: evaluations.jsonl, evaluation.json of the newest, and TensorBoard.

Training and a process that follows it may both write: each addition reads, merges and replaces the file under a lock,
so none is lost, and a step has one line however often a process was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from t5x_like.config.errors import DataError
from t5x_like.monitoring.records import dumps, read_records
from t5x_like.monitoring.writers import TensorBoardWriter
from t5x_like.run_directory import TENSORBOARD, write_atomically

EVALUATION = "evaluation.json"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.json"
DETAILS = "evaluations"
"""Folder of the rows behind the scores, by step."""
_LOG = logging.getLogger(__name__)

Result = dict[str, Any]


def read_evaluations(run_dir: Path) -> dict[int, Result]:
    """The scores by step, as far as there are."""
    path = run_dir / EVALUATIONS
    return {record["step"]: record for record in read_records(path)[0]} if path.exists() else {}


def is_evaluated(run_dir: Path, step: int, tasks: tuple[str, ...] = ()) -> bool:
    """Whether evaluations.jsonl has this step's held-out scores, and those of the `tasks` (names as configured)."""
    found = read_evaluations(run_dir).get(step)
    return found is not None and "objectives" in found and set(tasks) <= set(found.get("task_sets", ()))


def record(run_dir: Path, result: Result) -> int:
    """Puts a result among those of other steps, in their order, in the place of an older one of its step; what only the
    older one has, such as another Task's scores, stays. Returns the last step."""
    with _locked(run_dir):
        by_step = read_evaluations(run_dir)
        by_step[result["step"]] = merged(by_step.get(result["step"], {}), result)
        write_atomically(run_dir / EVALUATIONS, "".join(dumps(by_step[step]) + "\n" for step in sorted(by_step)))
        newest = max(by_step)
        if newest == result["step"]:
            write_json(run_dir / EVALUATION, by_step[newest])
    return newest


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> Result:
    """One result of a step out of two, the newer taking precedence."""
    both = {**old, **new}
    for key in ("tasks", "intervals"):
        if key in old and key in new:
            both[key] = {**old[key], **new[key]}
    if "task_sets" in old and "task_sets" in new:
        both["task_sets"] = sorted({*old["task_sets"], *new["task_sets"]})
    return both


def write_json(path: Path, document: Any) -> None:
    """With line breaks, for people; numbers that are not finite as in the records."""
    write_atomically(path, json.dumps(json.loads(dumps(document)), indent=2, ensure_ascii=False) + "\n")


def write_output(path: Path, document: Any) -> None:
    """Writes results where the user asked for them; folders are made.

    Raises:
      DataError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None


def scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """A step's numbers by one name each: "loss/S", "perplexity/S", "bits_per_byte", "squad_task/em"."""
    found: dict[str, float] = {}
    for name, scores in result.get("objectives", {}).items():
        for metric, value in scores.items():
            if metric != "tokens":
                found[f"{metric}/{name}"] = value
    if result.get("prefix_lm"):
        found["bits_per_byte"] = result["prefix_lm"]["bits_per_byte"]
    for name, scores in result.get("tasks", {}).items():
        found |= {f"{name}/{metric}": value for metric, value in scores.items() if metric != "examples"}
    return {name: float(value) for name, value in found.items() if _is_finite(value)}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class EvaluationEvents:
    """TensorBoard's curves of a run's evaluations, as a run of their own beside the training's.

    The first write of a process repeats all steps that are recorded, and hides what earlier processes wrote: so each
    step is there once, wherever they were killed.
    """

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._writer: TensorBoardWriter | None = None

    def write(self, step: int) -> None:
        """Adds the recorded scores of a step. Failing to is told, and no reason to stop."""
        try:
            known = read_evaluations(self._run_dir)
            steps = [step]
            if self._writer is None:
                self._writer = TensorBoardWriter(self._run_dir / TENSORBOARD / "evaluation", restored_step=None)
                steps = sorted(known)
            for one in steps:
                self._writer.write(one, scalars(known[one]))
        except Exception as error:
            _LOG.warning("TensorBoard's file of evaluations failed (%s: %s)", type(error).__name__, error)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    with (run_dir / f"{EVALUATIONS}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
