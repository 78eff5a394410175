"""Evaluation of one checkpoint: held-out scores, metrics of Tasks and samples, recorded in the run directory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from t5x_like.config.seqio_task import EvaluationTask
from t5x_like.data.store.token_store import Store
from t5x_like.data.tokenizers.tokenizer import TokenizerProtocol
from t5x_like.evaluation import results_store
from t5x_like.evaluation.decoded_samples import decode_samples
from t5x_like.evaluation.heldout_loss import evaluate_held_out, held_out_rows
from t5x_like.evaluation.per_example_loss import HELD_OUT, held_out_intervals
from t5x_like.evaluation.results_store import DETAILS, SAMPLES, EvaluationEvents, Result
from t5x_like.evaluation.seqio_tasks import evaluate_task
from t5x_like.monitoring.writers import TENSORBOARD
from t5x_like.program import Program
from t5x_like.utils.atomic_write import write_atomically
from t5x_like.utils.jsonl import dumps
from t5x_like.utils.type_aliases import PyTree


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """Parts of an evaluation.

    Attributes:
      held_out: Compute loss and bits per byte on held-out text.
      split: Split of the held-out text.
      num_batches: Number of batches per objective; None: that of the run's configuration.
      tasks: seqio Tasks to evaluate.
      intervals: Keep the loss of each row and the draws of each metric, for intervals and comparison. This about
        doubles the work.
      continuation: Numbers of given and scored tokens of windows that models of every architecture share; None: those
        of the run's configuration.
    """

    held_out: bool = True
    split: str = "validation"
    num_batches: int | None = None
    tasks: tuple[EvaluationTask, ...] = ()
    intervals: bool = False
    continuation: tuple[int, int] | None = None

    @property
    def task_sets(self) -> tuple[str, ...]:
        """Names of the Tasks and Mixtures as configured."""
        return tuple(task.mixture_or_task for task in self.tasks)

    @property
    def is_recorded(self) -> bool:
        """Return whether a run records the scores: those of Tasks, and of text of the validation split."""
        return not self.held_out or self.split == "validation"


def score(
    program: Program,
    params: PyTree,
    stores: Sequence[Store],
    step: int,
    spec: EvalSpec,
    *,
    folder: Path | None = None,
    belongs_to: Mapping[str, Any] | None = None,
    tokenizer: TokenizerProtocol | None = None,
) -> Result:
    """Return all scores of a set of parameters.

    Args:
      folder: Directory for the rows that the scores are computed from; None: they are not written.
      belongs_to: Identity of the parameters, see `AnswerCache`.
      tokenizer: Tokenizer of the model; None if it is unknown.

    Returns:
      The result of `heldout_loss.evaluate_held_out`, if `spec.held_out`; `tasks`, `intervals` and `notes` of
      `seqio_tasks.evaluate_task`; and `task_sets`, the names of the configured Tasks and Mixtures.
    """
    result: Result = {"step": step}
    batches = spec.num_batches or program.run.evaluation.num_batches
    if spec.held_out:
        result = evaluate_held_out(
            program,
            params,
            stores,
            step=step,
            num_batches=batches,
            split=spec.split,
            continuation=spec.continuation,
        )
        if spec.intervals and stores:
            rows = held_out_rows(
                program, params, stores, num_batches=batches, split=spec.split, continuation=spec.continuation
            )
            result["intervals"] = held_out_intervals(rows)
            if folder is not None and jax.process_index() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / HELD_OUT, "".join(dumps(row) + "\n" for row in rows))
    for task in spec.tasks:
        task_result = evaluate_task(
            program,
            params,
            task,
            tokenizer=tokenizer,
            folder=folder,
            belongs_to=belongs_to,
            intervals=spec.intervals,
        )
        result["tasks"] = {**result.get("tasks", {}), **task_result["tasks"]}
        result["intervals"] = {**result.get("intervals", {}), **task_result["intervals"]}
        result["notes"] = [*result.get("notes", ()), *task_result["notes"]]
        result["task_sets"] = sorted({*result.get("task_sets", ()), task.mixture_or_task})
    return result


def score_and_record(
    program: Program,
    params: PyTree,
    stores: Sequence[Store],
    run_dir: Path,
    step: int,
    spec: EvalSpec,
    *,
    belongs_to: Mapping[str, Any] | None = None,
) -> Result:
    """Score parameters, and record the result in the run directory.

    Written are the step's line of evaluations.jsonl and its rows (evaluations/STEP/), TensorBoard's curves, and for the
    newest evaluated step also evaluation.json and samples.json.

    Returns:
      The result of `score`.
    """
    run = program.run
    result = score(
        program,
        params,
        stores,
        step,
        spec,
        folder=run_dir / DETAILS / str(step),
        belongs_to=belongs_to,
        tokenizer=stores[0].tokenizer if stores else None,
    )
    samples = (
        decode_samples(program, params, stores, count=run.monitoring.num_decoded_samples) if spec.held_out else None
    )
    if jax.process_index() == 0:
        newest = results_store.record(run_dir, result)
        if samples is not None and newest == step:
            results_store.write_json(run_dir / SAMPLES, samples)
        if TENSORBOARD in run.monitoring.writers:
            _events(run_dir.absolute()).write(step)
    return result


@functools.lru_cache(maxsize=4)
def _events(run_dir: Path) -> EvaluationEvents:
    """Return the process's single TensorBoard file for the run."""
    return EvaluationEvents(run_dir)
