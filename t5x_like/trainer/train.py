"""Training loop: the work of the host around the compiled step.

The order inside the loop is fixed: evaluate, save, next batch, dispatch the step, write the metrics of earlier steps,
stop if asked to. The save comes before the next batch is taken, so that a checkpoint at step n continues with batch n.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from t5x_like import plugins, run_directory
from t5x_like.checkpoints.opening import open_checkpoints
from t5x_like.config import RunConfig
from t5x_like.config.serialization import from_json, to_json
from t5x_like.distributed.coordination import RemoteProcessError, on_process_0, require_same
from t5x_like.distributed.maintenance_notice import metadata_host, watch_notices
from t5x_like.distributed.preemption import StopRequest, coordinated_stop, stop_on_signals
from t5x_like.distributed.shared_directory import joined_directory
from t5x_like.distributed.startup import translate_error
from t5x_like.errors import EXIT_OK, EXIT_RESUMABLE
from t5x_like.evaluation.best_checkpoints import early_stop
from t5x_like.evaluation.results_store import ADDED, DETAILS, EVALUATION, EVALUATIONS, SAMPLES, is_evaluated
from t5x_like.monitoring.time_tracker import TimeTracker
from t5x_like.monitoring.writers import TENSORBOARD
from t5x_like.planning.plan_file import PLAN, read_plan, save_plan
from t5x_like.reports.run_report import write_report
from t5x_like.run_directory import RunRecord
from t5x_like.storage.mirror import mirror_of
from t5x_like.trainer.compilation_cache import compilation_cache
from t5x_like.trainer.open_session import open_session
from t5x_like.trainer.run_exit import RunExit, recorded_exit
from t5x_like.trainer.session import TrainSession
from t5x_like.trainer.stacks import stacks_name
from t5x_like.trainer.step_guard import RejectedStepError
from t5x_like.trainer.watchdog import Watchdog, stage_limits
from t5x_like.training.schedules import make_schedule
from t5x_like.utils.sanitize import say
from t5x_like.utils.stall_limit import STALL_SECONDS, set_stall_seconds

LEASE_PATIENCE_SECONDS = 90.0
"""Time in which a run directory in an object store that another process may own is observed: more than the time in
which the lease of a process that was killed expires."""
_NO_LIMIT = 365 * 86400.0
_LOG = logging.getLogger(__name__)


def train(
    run: RunConfig,
    workdir: Path,
    allowed_changes: Sequence[str] = (),
    plan: Path | None = None,
    *,
    start_over: bool = False,
    run_exit: RunExit | None = None,
) -> int:
    """Train `run` in `workdir` up to its last step, from its newest checkpoint if there is one.

    Args:
      run: Configuration of the run.
      workdir: Run directory; created if it is missing.
      allowed_changes: Fields in which `run` may differ from the run in `workdir`.
      plan: Saved plan, which is copied into `workdir`: at the start, differences from it are printed.
      start_over: Begin at step 0 if `workdir` has records of a run whose checkpoints are gone; they are kept in a
        folder.
      run_exit: Record of the end of this process, if it was begun before.

    Returns:
      The exit code of the process: EXIT_OK when the last step is saved, EXIT_RESUMABLE when a signal stopped the run
      after a save, so that the same command continues it.

    Raises:
      UserError: the run cannot start or continue; exit.json in `workdir` has the same message.
    """
    with contextlib.ExitStack() as stack:
        end = run_exit or stack.enter_context(recorded_exit(workdir))
        if run_exit is None:
            end.limit.set("start", run.timeouts.start)
        local = stack.enter_context(stop_on_signals())
        if end.terminated:
            local.signal = signal.SIGTERM
        try:
            on_process_0(lambda: stack.enter_context(run_directory.locked(workdir, LEASE_PATIENCE_SECONDS)))
            end.own(jax.process_index())
            stack.enter_context(joined_directory(workdir))
            stop = stack.enter_context(coordinated_stop(local))
            # Processes that run different programs would wait for each other in a collective operation without end.
            require_same(to_json(run) + json.dumps(plugins.digests(run.plugins)), "configuration or plug-ins")
            # Process 0 decides and the others follow its decision: on a shared file system they may not see the same
            # files yet.
            run, record, seconds = _claim(run, workdir, allowed_changes, start_over)
            if plan is not None:
                on_process_0(lambda: save_plan(workdir / PLAN, read_plan(plan)))
            finished = on_process_0(lambda: _finished_step(run, workdir))
            if finished is None:
                stack.enter_context(compilation_cache(run.compilation_cache, workdir))
                host = metadata_host() if run.monitoring.maintenance_notices else None
                stack.enter_context(watch_notices(host, local.notify))
                return _train(run, record, stop, end)
        except BaseException as found:
            error = translate_error(found)
            if not isinstance(error, RemoteProcessError):
                end.failed(error)
            if error is found:
                raise
            raise error from None
        if jax.process_index() == 0:
            end.clock = TimeTracker()
            end.clock.go_on(seconds)
            end.record(EXIT_OK, "finished before this start", finished)
            say(f"{workdir}: step {finished} of {run.training.num_train_steps} is saved; nothing to train")
        return EXIT_OK


def _describe_rate_change(workdir: Path, kept: RunConfig, run: RunConfig) -> str | None:
    """Return how the learning rate jumps where the run `kept` continues as `run`, or None if it does not."""
    step = open_checkpoints(workdir, run.checkpoints, read_only=True).latest() or 0
    old, new = (float(make_schedule(config.training)(step)) for config in (kept, run))
    if math.isclose(old, new, rel_tol=1e-5):
        return None
    effect = f"The learning rate at step {step:,} goes from {old:.3g} to {new:.3g}"
    if kept.training.schedule.decay_steps is None and run.training.schedule.decay_steps is None:
        effect += f"; --training.schedule.decay-steps {kept.training.num_train_steps} keeps it"
    return f"{effect}."


def _claim(
    run: RunConfig, workdir: Path, allowed_changes: Sequence[str], start_over: bool
) -> tuple[RunConfig, RunRecord, dict[str, float]]:
    """Return the run as config.json has it, its record, and its seconds by state up to the newest checkpoint.

    Process 0 checks and writes the two files.
    """

    describe = functools.partial(_describe_rate_change, workdir)

    def claim() -> tuple[str, dict[str, Any], dict[str, float]]:
        checkpoints = open_checkpoints(workdir, run.checkpoints, read_only=True)
        newest = checkpoints.read_meta() if checkpoints.steps() else None
        record = run_directory.claim_identity(workdir, newest, _set_aside_results if start_over else None)
        run_directory.name_holder(workdir)
        config = run_directory.claim_config(record, run, allowed_changes, newest, describe)
        return to_json(config), record.to_json(), {} if newest is None else newest.get("seconds", {})

    config, record, seconds = on_process_0(claim)
    source = str(workdir / run_directory.CONFIG)
    return from_json(config, source=source), RunRecord.from_json(record, workdir), seconds


def _set_aside_results(record: RunRecord) -> None:
    """Move the results of an earlier run, whose checkpoints are gone, to a folder of their own."""
    workdir = record.directory
    folder = workdir / f"before_{record.run_id}"
    for name in (run_directory.METRICS, EVALUATION, EVALUATIONS, ADDED, SAMPLES, DETAILS, TENSORBOARD):
        if (workdir / name).exists():
            folder.mkdir(exist_ok=True)
            (workdir / name).rename(folder / name)


def _finished_step(run: RunConfig, workdir: Path) -> int | None:
    """Return the last step, or that of an early stop, if it is saved and evaluated; None if work is left."""
    latest = open_checkpoints(workdir, run.checkpoints, read_only=True).latest()
    if latest is None or not is_evaluated(workdir, latest):
        return None
    is_over = latest >= run.training.num_train_steps or early_stop(workdir, run, latest) is not None
    return latest if is_over else None


def _train(run: RunConfig, record: RunRecord, stop: StopRequest, end: RunExit) -> int:
    """Train, and record in exit.json how the run ended."""
    clock = end.clock = TimeTracker()
    stacks = record.directory / stacks_name(jax.process_index())
    end.limit.set("start", None)
    # Waits that bound themselves must not end before the stage does.
    set_stall_seconds(max(STALL_SECONDS, *(limit or _NO_LIMIT for limit in stage_limits(run.timeouts).values())))
    # The copy of a run directory in a bucket has its files in process 0 only.
    require = record.require_present if mirror_of(record.directory) is None else lambda: None
    watchdog = Watchdog(run.timeouts, clock, stacks, end.record, require)
    try:
        with open_session(run, record, clock) as session:
            loop(session, stop)
            step, early = session.step, session.early_stop
    finally:
        watchdog.close()
        # The report, and the wait for the other processes.
        end.limit.set("end", run.timeouts.start)
    is_over = early is not None or step >= run.training.num_train_steps
    code = EXIT_OK if is_over else EXIT_RESUMABLE
    if jax.process_index() == 0:
        if early is not None:
            say(f"{record.directory}: step {step} of {run.training.num_train_steps}: {early}")
        reason = early or ("finished" if stop.reason is None else f"stopped by {stop.reason}")
        if not is_over:
            last = run.training.num_train_steps
            say(f"{record.directory}: {reason} after step {step} of {last}; the same command continues the run")
        end.record(code, reason, step)
        _report(record.directory)
    return code


def _report(workdir: Path) -> None:
    try:
        say(f"report: {write_report(workdir)}")
    except Exception:
        # The run is saved: a failure to write its report must not make the run a failure.
        _LOG.exception("%s: the run is complete, but its report could not be written", workdir)


def loop(session: TrainSession, stop: StopRequest) -> None:
    """Run steps until the last one or until asked to stop; the state is saved when this returns."""
    while True:
        try:
            return _loop(session, stop)
        except RejectedStepError as rejected:
            session.roll_back(rejected.step)


def _loop(session: TrainSession, stop: StopRequest) -> None:
    run = session.run
    evaluate_every = run.evaluation.every_steps
    start = session.step
    while session.step < run.training.num_train_steps and not stop.reached(session.step):
        step = session.step
        # Also at the first step of a resumed run: a signal may have ended the process before its evaluation.
        if step and evaluate_every and step % evaluate_every == 0:
            session.evaluate()
            if session.stops_early():
                break
        if step > start and session.is_save_due():
            session.save()
        batch = session.next_batch()
        # Dispatched, not awaited. The host prepares the next batch while the devices compute.
        session.train_step(batch)
        session.maybe_log()
    session.finish(evaluate=not stop.reached(session.step))
