"""The training loop: what the host does around the compiled step.

The order inside the loop is fixed: evaluate, save, next batch, dispatch the step, write what earlier steps have
measured, leave if asked to. A save comes before the data moves on, so that a checkpoint at step n goes on with batch n.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

import jax

from t5x_like import run_directory
from t5x_like.config import EXIT_OK, EXIT_RESUMABLE, RunConfig
from t5x_like.config.serialization import from_json, to_json
from t5x_like.interruption import interruption
from t5x_like.monitoring.clock import Clock
from t5x_like.monitoring.report import write_report
from t5x_like.partitioning.agreement import EndedElsewhereError, StopRequest, by_first, common_stop, require_same
from t5x_like.partitioning.distributed import exit_code_of, explained
from t5x_like.planning.saved import PLAN, read_plan, save_plan
from t5x_like.session import NO_STEP, Session, finished_step, open_session
from t5x_like.watchdog import Watchdog

_LOG = logging.getLogger(__name__)


def train(run: RunConfig, workdir: Path, allowed_changes: Sequence[str] = (), plan: Path | None = None) -> int:
    """Trains `run` in `workdir` up to its last step, from its newest checkpoint if there is one.

    Args:
      allowed_changes: Fields in which `run` may differ from what is in `workdir`.
      plan: A saved plan, kept in `workdir`: at the start it is said where what the run finds is not as planned.

    Returns:
      The process's exit code: EXIT_OK when the last step is saved, EXIT_RESUMABLE when a signal stopped the run after a
      save and the same command goes on with it.

    Raises:
      UserError: the run cannot start or go on; exit.json in `workdir` says the same.
    """
    with contextlib.ExitStack() as stack:
        by_first(lambda: stack.enter_context(run_directory.locked(workdir)))
        stop = stack.enter_context(common_stop(stack.enter_context(interruption())))
        require_same(to_json(run), "configuration")
        claimed = by_first(lambda: to_json(run_directory.claim_config(workdir, run, allowed_changes)))
        run = from_json(claimed, source=str(workdir / run_directory.CONFIG))
        if plan is not None:
            by_first(lambda: save_plan(workdir / PLAN, read_plan(plan)))
        finished = by_first(lambda: finished_step(run, workdir))
        if finished is None:
            return _train(run, workdir, stop)
        if jax.process_index() == 0:
            print(f"{workdir}: step {finished} of {run.training.num_train_steps} is saved; nothing to train")
        return EXIT_OK


def _train(run: RunConfig, workdir: Path, stop: StopRequest) -> int:
    """Trains, and says in exit.json how it ended."""
    process = jax.process_index()
    if process == 0:
        # What the process before said of its end is not said of this one, should it be killed.
        (workdir / run_directory.EXIT).unlink(missing_ok=True)
    clock = Clock()

    def say(code: int, reason: str, step: int | None = None) -> None:
        seconds = clock.totals()
        run_directory.write_exit(workdir, code=code, reason=reason, step=step, seconds=seconds, process=process)

    seconds = run.monitoring.hang_timeout_seconds
    watchdog = Watchdog(seconds, lambda reason: say(EXIT_RESUMABLE, reason), patience=NO_STEP)
    try:
        with open_session(run, workdir, clock, watchdog) as session:
            loop(session, stop)
            step = session.step
    except BaseException as found:
        error = explained(found)
        if not isinstance(error, EndedElsewhereError):
            say(exit_code_of(error), str(error))
        if error is found:
            raise
        raise error from None
    finally:
        watchdog.close()
    code = EXIT_OK if step >= run.training.num_train_steps else EXIT_RESUMABLE
    if process == 0:
        say(code, "finished" if stop.reason is None else f"stopped by {stop.reason}", step)
        _report(workdir)
    return code


def _report(workdir: Path) -> None:
    try:
        write_report(workdir)
    except Exception:
        # The run is saved; a page about it must not turn its success into a failure.
        _LOG.exception("%s: the run is complete, but its report could not be written", workdir)


def loop(session: Session, stop: StopRequest) -> None:
    """Steps until the last one or until asked to stop; the state is saved when it returns."""
    run = session.run
    evaluate_every = run.evaluation.every_steps
    start = session.step
    while session.step < run.training.num_train_steps and not stop.reached(session.step):
        step = session.step
        # Also at the first step of a resumed run: a signal may have ended the one before in front of its evaluation.
        if step and evaluate_every and step % evaluate_every == 0:
            session.evaluate()
        if step > start and step % run.checkpoints.save_every_steps == 0:
            session.save()
        batch = session.next_batch()
        session.dispatch(batch)
        session.write_metrics()
    session.finish(evaluate=not stop.reached(session.step))
