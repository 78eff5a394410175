"""Results store of a run: evaluations.jsonl, evaluation.json of the newest step, and TensorBoard's curves.

Training and a process that follows the run may both write. Each addition reads, merges and replaces the file under a
lock, so no result is lost, and each step has one line however often a process was killed. In an object store, which has
no locks, only the process that owns the run writes evaluations.jsonl and evaluation.json. Others add a file for each
result (ADDED), and readers join both.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from t5x_like.errors import DataError
from t5x_like.monitoring.writers import TENSORBOARD, TensorBoardWriter
from t5x_like.storage.mirror import is_read_only
from t5x_like.utils.atomic_write import write_atomically
from t5x_like.utils.file_lock import lock_within
from t5x_like.utils.json_reader import read_json
from t5x_like.utils.jsonl import dumps, encode_records, read_records

EVALUATION = "evaluation.json"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.json"
ADDED = "evaluation_results"
"""Folder of the results, in an object store, that other processes than that of the training have added."""
DETAILS = "evaluations"
"""Folder of the rows that the scores were computed from, by step."""
DIFFUSION_BOUND = "diffusion_bound"
"""Name of the scores of text by the bound of masked diffusion, and of the rows of which they are the mean."""
BITS_BOUND = "bits_per_byte_bound"
"""Name of the bits per byte of that bound. It is not that of exact bits per byte, so that no verdict compares them."""
CONTINUATION = "continuation"
"""Name of the scores of the windows of `evaluation.continuation`, and of the rows of which they are the mean."""
BITS_OF_CONTINUATION = "continuation_bits_per_byte"
"""Name of their bits per byte, which are an upper bound for models that predict tokens in place."""
_LOG = logging.getLogger(__name__)

LOCK_SECONDS = 600.0
"""Limit of the wait for another process that adds results."""

Result = dict[str, Any]


def read_evaluations(run_dir: Path) -> dict[int, Result]:
    """Return the recorded results by step.

    Raises:
      DataError: the file cannot be read.
    """
    path = run_dir / EVALUATIONS
    try:
        found = {record["step"]: record for record in read_records(path).records}
    except FileNotFoundError:
        found = {}
    except OSError as error:
        raise DataError(f"{path}: unreadable ({error.strerror}), expected the results of evaluations") from None
    return with_added(run_dir, found)


def with_added(run_dir: Path, results: Mapping[int, Result]) -> dict[int, Result]:
    """Return results by step, with those that other processes have added in an object store."""
    joined = dict(results)
    # The names begin with the time.
    for path in sorted((run_dir / ADDED).glob("*.json")):
        try:
            added = read_json(path)
            joined[int(added["step"])] = merge_results(joined.get(int(added["step"]), {}), added)
        except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
            _LOG.warning("%s: found no result of an evaluation (%s)", path, error)
    return joined


def is_evaluated(run_dir: Path, step: int, tasks: tuple[str, ...] = ()) -> bool:
    """Return True if the step's held-out scores and those of the `tasks` (names as configured) are recorded."""
    result = read_evaluations(run_dir).get(step)
    return result is not None and "objectives" in result and set(tasks) <= set(result.get("task_sets", ()))


def record(run_dir: Path, result: Result) -> int:
    """Record a result, merged with an older result of the same step, and return the newest recorded step.

    Entries that only the older result has, such as another Task's scores, are kept.
    """
    path = run_dir / EVALUATIONS
    if is_read_only(run_dir):
        (run_dir / ADDED).mkdir(exist_ok=True)
        write_json(run_dir / ADDED / f"{time.time_ns()}.{secrets.token_hex(4)}.json", result)
        return max(read_evaluations(run_dir))
    with _locked(run_dir):
        for problem in read_records(path).problems() if path.exists() else ():
            _LOG.warning("%s: %s", path, problem)
        by_step = read_evaluations(run_dir)
        by_step[result["step"]] = merge_results(by_step.get(result["step"], {}), result)
        lines = encode_records(by_step[step] for step in sorted(by_step))
        write_atomically(path, "".join(f"{line}\n" for line in lines))
        newest = max(by_step)
        if newest == result["step"]:
            write_json(run_dir / EVALUATION, by_step[newest])
    return newest


def merge_results(old: Mapping[str, Any], new: Mapping[str, Any]) -> Result:
    """Return two results of a step merged, with precedence for the newer one."""
    both = {**old, **new}
    for key in ("tasks", "intervals"):
        if key in old and key in new:
            both[key] = {**old[key], **new[key]}
    if "task_sets" in old and "task_sets" in new:
        both["task_sets"] = sorted({*old["task_sets"], *new["task_sets"]})
    return both


def write_json(path: Path, document: Any) -> None:
    """Write indented JSON. Numbers that are not finite are written as in the JSONL records."""
    write_atomically(path, json.dumps(json.loads(dumps(document)), indent=2, ensure_ascii=False) + "\n")


def write_output(path: Path, document: Any) -> None:
    """Write results to a file named by the user, and create its parent directories.

    Raises:
      DataError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None


def scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """Return a step's finite numbers by name, see `numbers`."""
    return {name: value for name, value in numbers(result).items() if math.isfinite(value)}


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Return a step's numbers by name, e.g. "loss/S", "perplexity/S", "bits_per_byte", "squad_task/em"."""
    values: dict[str, float] = {}
    for name, scores in result.get("objectives", {}).items():
        for metric, value in scores.items():
            if metric != "tokens":
                values[f"{metric}/{name}"] = value
    if result.get("prefix_lm"):
        values["bits_per_byte"] = result["prefix_lm"]["bits_per_byte"]
    if result.get(DIFFUSION_BOUND):
        values[BITS_BOUND] = result[DIFFUSION_BOUND]["bits_per_byte"]
    if result.get(CONTINUATION):
        values[BITS_OF_CONTINUATION] = result[CONTINUATION]["bits_per_byte"]
    for name, scores in result.get("tasks", {}).items():
        values |= {f"{name}/{metric}": value for metric, value in scores.items() if metric != "examples"}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


class EvaluationEvents:
    """TensorBoard writer of a run's evaluations, as a TensorBoard run beside that of the training.

    The first write of a process repeats all recorded steps, and purges what earlier processes wrote, so each step
    occurs once even after a kill.
    """

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._writer: TensorBoardWriter | None = None

    def write(self, step: int) -> None:
        """Write the recorded scores of a step. A failure is logged and does not end the evaluation."""
        try:
            known = read_evaluations(self._run_dir)
            steps = [step]
            if self._writer is None:
                self._writer = TensorBoardWriter(self._run_dir / TENSORBOARD / "evaluation", restored_step=None)
                steps = sorted(known)
            for written_step in steps:
                self._writer.write(written_step, scalars(known[written_step]))
        except Exception as error:
            _LOG.warning("TensorBoard's file of evaluations failed (%s: %s)", type(error).__name__, error)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    with (run_dir / f"{EVALUATIONS}.lock").open("a") as file:
        lock_within(file, LOCK_SECONDS)
        yield
