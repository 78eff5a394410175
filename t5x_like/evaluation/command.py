"""`t5x-like eval`, and the evaluations during training: scores and samples into the run directory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from t5x_like import run_directory
from t5x_like.config import EXIT_OK, EXIT_UNEXPECTED, ConfigError, DataError, Problem, RunConfig
from t5x_like.data.store import Store
from t5x_like.evaluation import follow as following
from t5x_like.evaluation import records, tables
from t5x_like.evaluation.asked import Asked, Reference
from t5x_like.evaluation.checkpoint import Wanted, score, score_and_record
from t5x_like.evaluation.opened import RUN, Opened, fingerprint, kind_of, open_model
from t5x_like.evaluation.records import Result, is_evaluated, write_output
from t5x_like.monitoring.report import write_report
from t5x_like.program import Program

__all__ = ["evaluate_and_record", "evaluate_command", "follow_command", "is_evaluated"]


def evaluate_command(
    references: Sequence[Reference], asked: Asked, *, like: RunConfig | None = None, output: Path | None = None
) -> int:
    """Scores checkpoints, prints a table for each and one that has them all.

    Args:
      references: Runs, imported or Hugging Face models, with their steps.
      like: A recipe whose data scores models that are no runs.
      output: File to write the scores to (an object, or a list of objects for more than one) in place of the runs'
        directories; the rows behind them lie beside it.

    Returns:
      The exit code.

    Raises:
      UserError: a model, its data, a Task or a checkpoint cannot be used, or the result cannot be written.
    """
    console = Console(quiet=jax.process_index() > 0)
    results: list[tuple[str, Result]] = []
    for reference in references:
        opened = open_model(reference.path, like)
        wanted = _wanted(asked, opened)
        for chosen in _chosen(opened, reference, asked, wanted):
            result = _evaluate_one(opened, chosen, wanted, output)
            results.append((str(reference.path), result))
            for table in tables.tables(result):
                console.print(table)
        if jax.process_index() == 0 and opened.kind == RUN and output is None:
            _write_report(opened.path)
    if len(results) > 1:
        console.print(tables.beside_each_other(results))
    if not results:
        console.print("every checkpoint is evaluated already")
    if output is not None and jax.process_index() == 0:
        documents = [result for _, result in results]
        if len({name for name, _ in results}) > 1:
            documents = [{"checkpoint": name, **result} for name, result in results]
        write_output(output, documents[0] if len(documents) == 1 else documents)
    return EXIT_OK


def follow_command(run_dir: Path, asked: Asked, *, timeout: float | None = None) -> int:
    """Evaluates the checkpoints of a run as they appear, each once, until the run has finished.

    Args:
      timeout: Leave when there was nothing to do for so many seconds.

    Returns:
      The exit code: EXIT_UNEXPECTED if a checkpoint that is there could not be evaluated.

    Raises:
      UserError: there is no such run, or another process follows it.
    """
    if jax.process_count() > 1:
        raise ConfigError([Problem("--follow", f"{jax.process_count()} processes", "one process, of any devices")])
    console = Console(quiet=jax.process_index() > 0)
    following.wait_for((run_dir / run_directory.CONFIG).is_file, timeout, str(run_dir))
    if kind_of(run_dir) != RUN:
        raise ConfigError([Problem(str(run_dir), "a model that is no run", "a run, which gets new checkpoints")])
    opened = open_model(run_dir)
    wanted = _wanted(asked, opened)

    def evaluate(step: int) -> None:
        result = _evaluate_one(opened, step, wanted, None)
        for table in tables.tables(result):
            console.print(table)
        if jax.process_index() == 0:
            _write_report(run_dir)

    is_done = functools.partial(_is_done, run_dir, wanted)
    count = following.follow(run_dir, steps=opened.steps, is_done=is_done, evaluate=evaluate, timeout=timeout)
    left = [step for step in opened.steps() if not is_done(step)]
    console.print(f"{run_dir}: {count} checkpoints evaluated" + (f", not steps {left}" if left else ""))
    return EXIT_UNEXPECTED if left else EXIT_OK


def evaluate_and_record(
    program: Program, params: Any, stores: Sequence[Store], run_dir: Path, step: int, *, num_batches: int | None = None
) -> Result:
    """An evaluation during training: held-out scores and the configuration's Tasks, into the run's directory."""
    run = program.run
    wanted = Wanted(held_out=True, num_batches=num_batches, tasks=run.evaluation.tasks)
    return score_and_record(program, params, stores, run_dir, step, wanted)


def _wanted(asked: Asked, opened: Opened) -> Wanted:
    own = opened.run.evaluation.tasks if asked.own_tasks and opened.kind == RUN else ()
    named = {task.mixture_or_task for task in asked.tasks}
    tasks = (*(task for task in own if task.mixture_or_task not in named), *asked.tasks)
    has_text = opened.has_text and asked.held_out
    if not has_text and not tasks:
        fix = "--data RECIPE names the data to score it on, --task a seqio Task"
        raise ConfigError([Problem(str(opened.path), "nothing to evaluate", "held-out text or a Task", fix)])
    return Wanted(has_text, asked.num_batches, tasks, asked.intervals)


def _chosen(opened: Opened, reference: Reference, asked: Asked, wanted: Wanted) -> list[int | None]:
    """Steps of one model; None: the newest."""
    steps = list(reference.steps or asked.steps)
    if asked.all_steps or (asked.only_new and not steps):
        steps = opened.steps()
    if asked.only_new and opened.kind == RUN:
        steps = [step for step in steps if not _is_done(opened.path, wanted, step)]
    return [*steps] if steps or asked.only_new or asked.all_steps else [None]


def _is_done(run_dir: Path, wanted: Wanted, step: int) -> bool:
    found = records.read_evaluations(run_dir).get(step)
    if found is None or (wanted.held_out and "objectives" not in found):
        return False
    return set(wanted.task_sets) <= set(found.get("task_sets", ()))


def _evaluate_one(opened: Opened, chosen: int | None, wanted: Wanted, output: Path | None) -> Result:
    step, params = opened.load(chosen)
    belongs_to = {"checkpoint": fingerprint(opened.path, step), "step": step}
    if opened.kind == RUN and output is None:
        try:
            return score_and_record(
                opened.program, params, opened.stores, opened.path, step, wanted, belongs_to=belongs_to
            )
        except OSError as error:
            raise DataError(f"{opened.path}: cannot be written ({error.strerror or error})") from None
    folder = None if output is None else output.with_name(f"{output.name}.rows") / f"{opened.path.name}-{step}"
    return score(
        opened.program,
        params,
        opened.stores,
        step,
        wanted,
        folder=folder,
        belongs_to=belongs_to,
        tokenizer=opened.tokenizer,
    )


def _write_report(run_dir: Path) -> None:
    try:
        write_report(run_dir)
    except OSError as error:
        raise DataError(f"{run_dir}: cannot be written ({error.strerror or error})") from None
