"""Evaluation of the checkpoints of runs and other models, on request, while a run trains, or during training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from t5x_like import run_directory
from t5x_like.checkpoints.checkpoint_ref import CheckpointRef, missing_step
from t5x_like.config import RunConfig
from t5x_like.config.continuation import continuation_problems
from t5x_like.data.store.token_store import Store
from t5x_like.errors import EXIT_OK, EXIT_UNEXPECTED, ConfigError, ConfigProblem, DataError
from t5x_like.evaluation import checkpoint_watcher, console_tables, results_store
from t5x_like.evaluation.evaluate_checkpoint import EvalSpec, score, score_and_record
from t5x_like.evaluation.options import EvalOptions
from t5x_like.evaluation.results_store import Result, is_evaluated, write_output
from t5x_like.model_loading import LoadedModel, model_kind, open_model
from t5x_like.program import Program
from t5x_like.storage.mirror import mirror_of
from t5x_like.utils.console import Console

__all__ = ["evaluate_and_record", "evaluate_checkpoints", "follow_run", "is_evaluated"]


def evaluate_checkpoints(
    references: Sequence[CheckpointRef],
    options: EvalOptions,
    *,
    write_report: Callable[[Path], object],
    like: RunConfig | None = None,
    output: Path | None = None,
) -> int:
    """Score checkpoints, and print a table for each and one for all of them.

    Args:
      references: Runs, imported or Hugging Face models, with their steps.
      options: Options of the evaluation.
      write_report: Called with the directory of each run whose scores were recorded.
      like: Recipe whose data scores the models; None: runs are scored on their own. Scores on other data than a run's
        own are not recorded in the run directory.
      output: File for the scores (an object, or a list of objects for more than one). Nothing is then written to the
        run directories, and the rows are written beside the file. The scores of another split than "validation" are
        written to MODEL/evaluation.SPLIT.json if this is None, so that they do not replace those of the run's curve.

    Returns:
      The exit code.

    Raises:
      UserError: a model, its data, a Task or a checkpoint cannot be used, or the result cannot be written.
    """
    console = Console(quiet=jax.process_index() > 0)
    results: list[tuple[str, Result]] = []
    _require_steps(references, like)
    for reference in references:
        loaded = open_model(reference.path, data_from=like)
        first = len(results)
        spec = _make_spec(options, loaded)
        for requested_step in _select_steps(loaded, reference, options, spec):
            result = _evaluate_one(loaded, requested_step, spec, output)
            results.append((str(reference.path), result))
            for table in console_tables.result_tables(result):
                console.print(table)
        if jax.process_index() == 0 and loaded.has_own_data and output is None:
            if spec.is_recorded:
                write_report(loaded.path)
            else:
                scores = [result for _, result in results[first:]]
                write_output(loaded.path / f"evaluation.{options.split}.json", scores)
    if len(results) > 1:
        console.print(console_tables.comparison_table(results))
    if not results:
        console.print("all checkpoints have been evaluated already")
    if output is not None and jax.process_index() == 0:
        documents = [result for _, result in results]
        if len({name for name, _ in results}) > 1:
            documents = [{"checkpoint": name, **result} for name, result in results]
        write_output(output, documents[0] if len(documents) == 1 else documents)
    return EXIT_OK


def follow_run(
    run_dir: Path, options: EvalOptions, *, write_report: Callable[[Path], object], timeout: float | None = None
) -> int:
    """Evaluate the checkpoints of a run as they appear, each once, until the run has finished.

    Args:
      options: Options of the evaluation.
      write_report: Called with the run directory after each evaluation.
      timeout: Return after this number of seconds without a new checkpoint.

    Returns:
      The exit code: EXIT_UNEXPECTED if an existing checkpoint could not be evaluated.

    Raises:
      UserError: there is no such run, or another process follows it.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            [ConfigProblem("--follow", f"{jax.process_count()} processes", "one process, with any number of devices")]
        )
    console = Console(quiet=jax.process_index() > 0)
    mirror = mirror_of(run_dir)

    def refresh() -> None:
        if mirror is not None:
            mirror.refresh((run_directory.CONFIG, run_directory.EXIT, run_directory.METRICS, results_store.EVALUATIONS))

    def has_begun() -> bool:
        refresh()
        return (run_dir / run_directory.CONFIG).is_file()

    checkpoint_watcher.wait_for(has_begun, timeout, str(run_dir))
    if mirror is not None:
        mirror.fetch()
    if model_kind(run_dir) != "run":
        raise ConfigError(
            [ConfigProblem(str(run_dir), "a model that is not a run", "a run, which gets new checkpoints")]
        )
    loaded = open_model(run_dir)
    spec = _make_spec(options, loaded)

    def evaluate(step: int) -> None:
        result = _evaluate_one(loaded, step, spec, None)
        for table in console_tables.result_tables(result):
            console.print(table)
        if jax.process_index() == 0:
            write_report(run_dir)
        if mirror is not None:
            mirror.upload()

    is_done = functools.partial(_is_done, run_dir, spec)
    count = checkpoint_watcher.watch_checkpoints(
        run_dir, steps=loaded.steps, is_done=is_done, evaluate=evaluate, refresh=refresh, timeout=timeout
    )
    not_done = [step for step in loaded.steps() if not is_done(step)]
    console.print(f"{run_dir}: {count} checkpoints evaluated" + (f", not steps {not_done}" if not_done else ""))
    return EXIT_UNEXPECTED if not_done else EXIT_OK


def evaluate_and_record(
    program: Program, params: Any, stores: Sequence[Store], run_dir: Path, step: int, *, num_batches: int | None = None
) -> Result:
    """Evaluate during training: held-out scores and the Tasks of the configuration, recorded in the run directory."""
    run = program.run
    spec = EvalSpec(held_out=True, num_batches=num_batches, tasks=run.evaluation.tasks)
    return score_and_record(program, params, stores, run_dir, step, spec)


def _require_steps(references: Sequence[CheckpointRef], like: RunConfig | None) -> None:
    """Raise ConfigError, before the first evaluation, if a model or a named step does not exist."""
    problems = []
    for reference in references:
        saved = open_model(reference.path, data_from=like).steps() if reference.steps else []
        problems += [missing_step(reference.path, step, saved) for step in reference.steps if step not in saved]
    if problems:
        raise ConfigError(problems)


def _make_spec(options: EvalOptions, loaded: LoadedModel) -> EvalSpec:
    """Return what to evaluate: held-out text where there is any, and the Tasks of the options and of the run."""
    run_tasks = loaded.run.evaluation.tasks if options.own_tasks and loaded.has_own_data else ()
    named = {task.mixture_or_task for task in options.tasks}
    tasks = (*(task for task in run_tasks if task.mixture_or_task not in named), *options.tasks)
    has_text = loaded.has_heldout_data and options.held_out
    if not has_text and not tasks:
        fix = "name the data by --data RECIPE, or a seqio Task by --task"
        raise ConfigError([ConfigProblem(str(loaded.path), "nothing to evaluate", "held-out text or a Task", fix)])
    if options.continuation is not None:
        if not has_text:
            found, expected = f"{loaded.path} without held-out text", "a run with prepared text, or --data RECIPE"
            raise ConfigError([ConfigProblem("--continuation", found, expected, "or leave the option out")])
        evaluation = dataclasses.replace(loaded.run.evaluation, continuation=options.continuation)
        problems = [*continuation_problems(dataclasses.replace(loaded.run, evaluation=evaluation))]
        if problems:
            raise ConfigError(problems)
    return EvalSpec(has_text, options.split, options.num_batches, tasks, options.intervals, options.continuation)


def _select_steps(
    loaded: LoadedModel, reference: CheckpointRef, options: EvalOptions, spec: EvalSpec
) -> list[int | None]:
    """Return the steps of one model to evaluate; None stands for the newest."""
    steps = list(reference.steps)
    if options.all_steps or (options.only_new and not steps):
        steps = loaded.steps()
    if options.only_new and loaded.has_own_data:
        steps = [step for step in steps if not _is_done(loaded.path, spec, step)]
    return [*steps] if steps or options.only_new or options.all_steps else [None]


def _is_done(run_dir: Path, spec: EvalSpec, step: int) -> bool:
    result = results_store.read_evaluations(run_dir).get(step)
    if result is None or (spec.held_out and "objectives" not in result):
        return False
    return set(spec.task_sets) <= set(result.get("task_sets", ()))


def _evaluate_one(loaded: LoadedModel, requested_step: int | None, spec: EvalSpec, output: Path | None) -> Result:
    step, params = loaded.params(requested_step)
    belongs_to = {"checkpoint": loaded.digest(step), "step": step}
    if loaded.has_own_data and output is None and spec.is_recorded:
        try:
            return score_and_record(
                loaded.program, params, loaded.stores, loaded.path, step, spec, belongs_to=belongs_to
            )
        except OSError as error:
            raise DataError(f"{loaded.path}: cannot be written ({error.strerror or error})") from None
    folder = None if output is None else output.with_name(f"{output.name}.rows") / f"{loaded.path.name}-{step}"
    return score(
        loaded.program,
        params,
        loaded.stores,
        step,
        spec,
        folder=folder,
        belongs_to=belongs_to,
        tokenizer=loaded.tokenizer_if_known,
    )
