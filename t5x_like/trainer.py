"""The training loop: what the host does around the compiled step.

The order inside the loop is fixed: evaluate, save, next batch, dispatch the step, write what earlier steps have
measured, leave if asked to. A save comes before the data moves on, so that a checkpoint at step n goes on with batch n.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from t5x_like import run_directory
from t5x_like.config import EXIT_OK, EXIT_RESUMABLE, EXIT_UNEXPECTED, RunConfig, UserError
from t5x_like.interruption import Interruption, interruption
from t5x_like.monitoring.clock import Clock
from t5x_like.monitoring.report import write_report
from t5x_like.session import Session, finished_step, open_session

_LOG = logging.getLogger(__name__)


def train(run: RunConfig, workdir: Path, allowed_changes: Sequence[str] = ()) -> int:
    """Trains `run` in `workdir` up to its last step, from its newest checkpoint if there is one.

    Args:
      allowed_changes: Fields in which `run` may differ from what is in `workdir`.

    Returns:
      The process's exit code: EXIT_OK when the last step is saved, EXIT_RESUMABLE when a signal stopped the run after a
      save and the same command goes on with it.

    Raises:
      UserError: the run cannot start or go on; exit.json in `workdir` says the same.
    """
    with run_directory.locked(workdir), interruption() as stop:
        run = run_directory.claim_config(workdir, run, allowed_changes)
        finished = finished_step(run, workdir)
        if finished is not None:
            print(f"{workdir}: step {finished} of {run.training.num_train_steps} is saved; nothing to train")
            return EXIT_OK
        # What the process before said of its end is not said of this one, should it be killed.
        (workdir / run_directory.EXIT).unlink(missing_ok=True)
        clock = Clock()
        try:
            with open_session(run, workdir, clock) as session:
                loop(session, stop)
                step = session.step
        except BaseException as error:
            code = error.exit_code if isinstance(error, UserError) else EXIT_UNEXPECTED
            run_directory.write_exit(workdir, code=code, reason=str(error), step=None, seconds=clock.totals())
            raise
        code = EXIT_OK if step >= run.training.num_train_steps else EXIT_RESUMABLE
        reason = "finished" if stop.signal is None else f"stopped by {stop.signal.name}"
        run_directory.write_exit(workdir, code=code, reason=reason, step=step, seconds=clock.totals())
        _report(workdir)
        return code


def _report(workdir: Path) -> None:
    try:
        write_report(workdir)
    except Exception:
        # The run is saved; a page about it must not turn its success into a failure.
        _LOG.exception("%s: the run is complete, but its report could not be written", workdir)


def loop(session: Session, stop: Interruption) -> None:
    """Steps until the last one or until asked to stop; the state is saved when it returns."""
    run = session.run
    evaluate_every = run.evaluation.every_steps
    start = session.step
    while session.step < run.training.num_train_steps and not stop.requested:
        step = session.step
        # Also at the first step of a resumed run: a signal may have ended the one before in front of its evaluation.
        if step and evaluate_every and step % evaluate_every == 0:
            session.evaluate()
        if step > start and step % run.checkpoints.save_every_steps == 0:
            session.save()
        batch = session.next_batch()
        session.dispatch(batch)
        session.write_metrics()
    session.finish(evaluate=not stop.requested)
