"""One checkpoint, evaluated: held-out scores, Tasks' metrics, samples; and all of it into the run's directory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from t5x_like.config.seqio import EvaluationTask
from t5x_like.data.store import Store
from t5x_like.data.tokenizers import Tokenizer
from t5x_like.evaluation import records
from t5x_like.evaluation.evaluator import evaluate, held_out_rows
from t5x_like.evaluation.held_out import HELD_OUT, held_out_intervals
from t5x_like.evaluation.records import DETAILS, SAMPLES, EvaluationEvents, Result
from t5x_like.evaluation.samples import decode_samples
from t5x_like.evaluation.tasks import evaluate_task
from t5x_like.monitoring.records import dumps
from t5x_like.program import Program
from t5x_like.run_directory import write_atomically

Tree = Any


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to evaluate.

    Attributes:
      held_out: Loss and bits per byte on held-out text.
      num_batches: Per objective; None: as the run's configuration has it.
      tasks: Beside it.
      intervals: Keep what each row costs and each metric's draws, for intervals and comparison: about twice the work.
    """

    held_out: bool = True
    num_batches: int | None = None
    tasks: tuple[EvaluationTask, ...] = ()
    intervals: bool = False

    @property
    def task_sets(self) -> tuple[str, ...]:
        return tuple(task.mixture_or_task for task in self.tasks)


def score(
    program: Program,
    params: Tree,
    stores: Sequence[Store],
    step: int,
    wanted: Wanted,
    *,
    folder: Path | None = None,
    belongs_to: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Result:
    """All scores of a set of parameters.

    Args:
      folder: Gets the rows behind them.
      belongs_to: Which parameters these are; see `rows.Answers`.
      tokenizer: Of the model, as far as it is known.

    Returns:
      What `evaluator.evaluate` returns, if that is wanted; `tasks`, `intervals` and `notes` of `tasks.evaluate_task`;
      `task_sets`, the names of the Tasks and Mixtures that were asked for.
    """
    result: Result = {"step": step}
    batches = wanted.num_batches or program.run.evaluation.num_batches
    if wanted.held_out:
        result = evaluate(program, params, stores, step=step, num_batches=batches)
        if wanted.intervals and stores:
            rows = held_out_rows(program, params, stores, num_batches=batches)
            result["intervals"] = held_out_intervals(rows)
            if folder is not None and jax.process_index() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / HELD_OUT, "".join(dumps(row) + "\n" for row in rows))
    for task in wanted.tasks:
        found = evaluate_task(
            program,
            params,
            task,
            tokenizer=tokenizer,
            folder=folder,
            belongs_to=belongs_to,
            intervals=wanted.intervals,
        )
        result["tasks"] = {**result.get("tasks", {}), **found["tasks"]}
        result["intervals"] = {**result.get("intervals", {}), **found["intervals"]}
        result["notes"] = [*result.get("notes", ()), *found["notes"]]
        result["task_sets"] = sorted({*result.get("task_sets", ()), task.mixture_or_task})
    return result


def score_and_record(
    program: Program,
    params: Tree,
    stores: Sequence[Store],
    run_dir: Path,
    step: int,
    wanted: Wanted,
    *,
    belongs_to: Mapping[str, Any] | None = None,
) -> Result:
    """Scores parameters and writes the step's line of evaluations.jsonl and its rows (evaluations/STEP/); of the newest
    step that was evaluated evaluation.json and samples.json too; and TensorBoard's curves.

    Returns:
      What `score` returns.
    """
    run = program.run
    result = score(
        program,
        params,
        stores,
        step,
        wanted,
        folder=run_dir / DETAILS / str(step),
        belongs_to=belongs_to,
        tokenizer=stores[0].tokenizer if stores else None,
    )
    samples = decode_samples(program, params, stores, count=run.monitoring.samples) if wanted.held_out else None
    if jax.process_index() == 0:
        newest = records.record(run_dir, result)
        if samples is not None and newest == step:
            records.write_json(run_dir / SAMPLES, samples)
        if run.monitoring.tensorboard:
            _events(run_dir.absolute()).write(step)
    return result


@functools.lru_cache(maxsize=4)
def _events(run_dir: Path) -> EvaluationEvents:
    """One file per process, however often it evaluates."""
    return EvaluationEvents(run_dir)
