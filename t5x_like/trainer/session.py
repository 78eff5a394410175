"""Training session: program, data, checkpoints and records of a running job, and what the loop does with them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from t5x_like.checkpoints.interface import Checkpoints
from t5x_like.config import RunConfig
from t5x_like.config.batch_sizes import batch_sizes
from t5x_like.config.serialization import to_dict
from t5x_like.data.stream.data_source import BatchIterator, DataSource
from t5x_like.distributed.coordination import compile_on_all, on_process_0
from t5x_like.errors import SafetyError
from t5x_like.evaluation.best_checkpoints import early_stop, require_metrics
from t5x_like.evaluation.evaluate_runs import evaluate_and_record
from t5x_like.evaluation.results_store import scalars
from t5x_like.faults import write_error
from t5x_like.hardware import cpu_allocator
from t5x_like.monitoring.metrics import WeightedMean, add, compute
from t5x_like.monitoring.progress_bar import Progress
from t5x_like.monitoring.throughput import Peak, achieved, rates
from t5x_like.monitoring.time_tracker import TimeTracker, goodput, lost_time
from t5x_like.monitoring.writers import (
    Writers,
)
from t5x_like.program import FROZEN, Program
from t5x_like.run_directory import RunRecord
from t5x_like.sharding.batch_placement import on_host
from t5x_like.storage.locations import num_repeated_requests
from t5x_like.storage.mirror import require_access
from t5x_like.trainer import startup_summary
from t5x_like.trainer.callbacks import Callbacks
from t5x_like.trainer.grace import SAVE_SECONDS, too_slow
from t5x_like.trainer.profiling import StepProfiler
from t5x_like.trainer.replay_check import ReplayCheck
from t5x_like.trainer.row_record import RowRecord
from t5x_like.trainer.step_guard import StepGuard
from t5x_like.training.guard import all_finite
from t5x_like.training.norms import is_empty_norm
from t5x_like.utils.formatting import number

MAX_IN_FLIGHT_STEPS = 4
"""Number of steps that the host may be ahead of the device. Their batches wait in the device's memory."""

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class TrainSession:
    """Everything that the loop works with. `step` counts the steps that have been dispatched."""

    run: RunConfig
    workdir: Path
    program: Program
    source: DataSource
    batches: BatchIterator
    first_row: int
    """Number of rows of the run that were read before this process's first step."""
    first_step: int
    checkpoints: Checkpoints
    writers: Writers
    callbacks: Callbacks
    profiler: StepProfiler
    progress: Progress
    replay: ReplayCheck | None
    rows: RowRecord | None
    """Record of the rows of each step; None if they are not recorded by this process."""
    clock: TimeTracker
    flops_per_step: float
    tokens_per_step: int
    peak: Peak | None
    state: Any
    step: int
    record: RunRecord
    collected_step: int
    """Step up to which the metrics of the steps are known on the host."""
    guard: StepGuard
    sources: Mapping[str, Mapping[str, Any]]
    """Records, which checkpoints keep, of what the run is trained with and no checkpoint holds: the base of adapters,
    the log-probabilities of a reference, a teacher."""
    accumulated_metrics: dict[str, WeightedMean]
    """Sums, on the host, over the steps of the current logging interval. Checkpoints keep them, so that a resumed run
    logs the same numbers as an uninterrupted one."""
    in_flight: collections.deque[dict[str, WeightedMean]] = dataclasses.field(default_factory=collections.deque)
    """Metrics, on the device, of the steps after those in `accumulated_metrics`."""
    compiled: set[int] = dataclasses.field(default_factory=set)
    """Sizes of the batches for which the step is compiled."""
    evaluated: int | None = None
    """Step of the last evaluation."""
    saved_at: float = dataclasses.field(default_factory=time.monotonic)
    """Time of the last save, or of the start."""
    early_stop: str | None = None
    """Why the run ends before its last step."""
    unfinished_checkpoint: int | None = None
    """Step whose checkpoint is being written."""

    def rows_read(self, step: int) -> int:
        """Return the number of rows that the steps before `step` have trained on: the position in the data."""
        sizes = batch_sizes(self.run.training)
        return self.first_row + sizes.rows_before(step) - sizes.rows_before(self.first_step)

    def next_batch(self) -> Any:
        """Return the next global batch, whose transfer to the devices has begun."""
        with self.clock.state("data_wait"):
            batch = next(self.batches)
            if self.rows is not None:
                with self._written():
                    self.rows.write(self.step + 1, batch, self.batches.last_indices())
            return self.program.shard_batch(batch)

    def train_step(self, batch: Any) -> None:
        """Dispatch a training step; this returns before the step is done."""
        # Each number of rows is a program of its own.
        size = batch_sizes(self.run.training).at(self.step)
        is_compiled = size in self.compiled
        with self.clock.state("step" if is_compiled else "compile"):
            if not is_compiled:
                compile_on_all(self.program.train_step, self.state, batch)
            with self.profiler.step(self.step, self._finish_step):
                if self.replay is not None and self.replay.is_due(self.step + 1):
                    self.state, metrics = self.replay.run(self.step + 1, self.state, batch)
                else:
                    self.state, metrics = self.program.train_step(self.state, batch)
            if is_compiled:
                cpu_allocator.limit_growth(self._finish_step)
            else:
                cpu_allocator.compilation_ended(self._finish_step)
                self.compiled.add(size)
        self.step += 1
        self.in_flight.append(metrics)
        self.progress.advance(self.step)

    def _finish_step(self) -> None:
        jax.block_until_ready(self.state)

    def maybe_log(self) -> None:
        """Write the logging interval that ended before the newest step, while that step runs."""
        if jax.process_index() == 0:
            require_access(self.workdir)
        done = self.step - 1
        # A save at that step has written the interval already; an evaluation has only collected it.
        is_due = done > 0 and done % self.run.monitoring.log_every_steps == 0
        if is_due and (self.accumulated_metrics or len(self.in_flight) > 1):
            # The newest step belongs to the next interval, and waiting for it would leave the device idle.
            newest = self.in_flight.pop()
            self._write_interval(done)
            self.in_flight.append(newest)
        elif len(self.in_flight) > MAX_IN_FLIGHT_STEPS:
            jax.block_until_ready(self.in_flight[-1 - MAX_IN_FLIGHT_STEPS])
        self.callbacks.step_end(done)

    def is_save_due(self) -> bool:
        """Return whether to save before the next step: after so many steps, or so much time since the last save."""
        config = self.run.checkpoints
        if self.step % config.save_every_steps == 0:
            return True
        if config.save_every_minutes is None or self.step % self.run.monitoring.log_every_steps:
            return False
        # Process 0 decides for all: their clocks differ.
        seconds = 60.0 * config.save_every_minutes
        return on_process_0(lambda: time.monotonic() - self.saved_at >= seconds)

    def save(self) -> None:
        """Begin to save the state; the files are written while training continues."""
        with self.clock.state("save"):
            self._collect()
            if self.accumulated_metrics and self._at_end_of_interval():
                self._write_interval(self.step)
            meta = {
                "config": to_dict(self.run),
                "data": {"rows": self.rows_read(self.step), "fingerprint": self.source.fingerprint},
                "interval": {name: list(mean) for name, mean in self.accumulated_metrics.items()},
                "seconds": self.clock.totals(),
                SAVE_SECONDS: self.checkpoints.save_seconds,
                "mesh": dict(self.program.mesh.shape),
                "versions": startup_summary.versions(),
            }
            meta |= {name: dict(record) for name, record in self.sources.items()}
            state = self.program.checkpointable_state(self.state)
            if not on_host(all_finite(self.state["params"])):
                raise SafetyError(
                    f"step {self.step}: the parameters are not finite, and are not saved. {self.guard.advice()}"
                )
            begun = self.checkpoints.save(self.step, state, meta, self.batches.state_files())
            # A save waits until the one before it is complete.
            self._checkpoint_completed()
            self.saved_at = time.monotonic()
            if begun:
                self.guard.saved(self.step)
                self.progress.status(f"saving step {self.step}")
                self.unfinished_checkpoint = self.step

    def evaluate(self) -> None:
        """Score the parameters on held-out text; the results go to evaluations.jsonl and the report."""
        if self.evaluated == self.step:
            return
        self.progress.status(f"evaluating step {self.step}")
        self._collect()
        with self.clock.state("eval"):
            with self._written():
                result = evaluate_and_record(
                    self.program, self.program.full_params(self.state), self.source.stores, self.workdir, self.step
                )
            require_metrics(self.run, result)
            self.evaluated = self.step
            scores = scalars(result)
            self.callbacks.evaluation(self.step, scores)
        # The perplexity is a function of the loss.
        shown = [f"{name} {number(value)}" for name, value in scores.items() if not name.startswith("perplexity/")]
        self.progress.note(f"evaluated step {self.step}: {', '.join(shown)}")

    def stops_early(self) -> bool:
        """Return whether the run ends after the evaluation of this step; `early_stop` then has the reason."""
        if self.run.evaluation.early_stopping is not None:
            self.early_stop = on_process_0(lambda: early_stop(self.workdir, self.run, self.step))
        return self.early_stop is not None

    def finish(self, *, evaluate: bool) -> None:
        """Save, wait until the checkpoint is on the disk, and evaluate if the run is over."""
        self.save()
        with self.clock.state("save"):
            self.checkpoints.wait()
            self._checkpoint_completed()
        self.callbacks.step_end(self.step)
        self.progress.status(f"saved step {self.step}")
        if evaluate:
            self.evaluate()

    def _checkpoint_completed(self) -> None:
        """Notify the callbacks of the checkpoint whose writing has ended, if there is one."""
        step, self.unfinished_checkpoint = self.unfinished_checkpoint, None
        if step is not None:
            if jax.process_index() == 0 and (text := too_slow(self.checkpoints, self.run)) is not None:
                _LOG.warning("%s", text)
            self.callbacks.checkpoint(step, self.checkpoints.directory / str(step))

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Raise a `UserError` for an error of the file system within the context, in which records are written."""
        try:
            yield
        except OSError as error:
            message = (
                f"{error.filename or self.workdir}: cannot be written ({error.strerror or error}). Existing "
                "checkpoints are intact. Fix the problem and run the same command again."
            )
            raise write_error(message, error) from error

    def _collect(self) -> None:
        """Wait for the steps in flight and add their metrics to the interval, in the order of the steps."""
        with self.clock.state("step"):
            steps = on_host(list(self.in_flight))
            self.in_flight.clear()
        for metrics in steps:
            self.collected_step += 1
            floats = {name: WeightedMean(float(mean.sum), float(mean.weight)) for name, mean in metrics.items()}
            self.accumulated_metrics = add(self.accumulated_metrics, floats)
            rows = range(self.rows_read(self.collected_step - 1), self.rows_read(self.collected_step))
            self.guard.check(self.collected_step, floats, rows)

    def roll_back(self, rejected_step: int) -> None:
        """Restore the newest healthy checkpoint and continue after the rows of the rejected step.

        Raises:
          SafetyError: there is no healthy checkpoint, or there were too many rollbacks.
        """
        with self.clock.state("save"):
            self.checkpoints.wait()
            self._checkpoint_completed()
        step = self.guard.checkpoint_before(rejected_step, len(self.record.rollbacks))
        row = self.rows_read(rejected_step)
        # If it is killed in between, the next process restores the same checkpoint and reaches the same rejected step.
        on_process_0(lambda: self.checkpoints.remove_after(step))
        self.record.rollbacks += ((step, rejected_step, row),)
        on_process_0(self.record.write)
        _LOG.warning("step %d was rejected: training continues from step %d and row %d", rejected_step, step, row)
        self.batches.close()
        # The restored state takes the memory of this one.
        self.state = {name: part for name, part in self.state.items() if name in FROZEN}
        with self.clock.state("restore"):
            restored = restore_state(self.program, self.checkpoints, self.record, self.run, step)
        self.state = self.state | restored.state
        self.batches = self.source.start(row, restored.meta["data"], {}, step)
        self.step = self.first_step = self.collected_step = step
        self.first_row = restored.first_row
        self.accumulated_metrics = restored.interval
        self.in_flight.clear()
        self.evaluated = None
        self.guard.restart(step)
        self.callbacks.start(step)

    def _at_end_of_interval(self) -> bool:
        last = self.step == self.run.training.num_train_steps
        return last or self.step % self.run.monitoring.log_every_steps == 0

    def _write_interval(self, step: int) -> None:
        self._collect()
        cpu_allocator.check()
        means = self.accumulated_metrics.items()
        metrics = {name: compute(mean) for name, mean in means if not is_empty_norm(name, mean)}
        steps = round(self.accumulated_metrics["learning_rate"].weight)
        self.accumulated_metrics = {}
        seconds = self.clock.lap()
        sizes = batch_sizes(self.run.training)
        # Tokens and FLOPs refer to batches of full size.
        share = (sizes.in_full_batches(step) - sizes.in_full_batches(step - steps)) / steps if steps else 1.0
        flops_per_step = self.flops_per_step * share
        if self.peak is not None:
            reached = achieved(seconds, steps=steps, flops_per_step=flops_per_step)
            if (peak := self.peak.at_least(reached)) is not self.peak:
                _LOG.info("%s FLOP/s at step %d: mfu is now a share of this peak", f"{reached:.3g}", step)
                self.peak = peak
        metrics |= rates(
            seconds,
            steps=steps,
            tokens=self.tokens_per_step * steps * share,
            flops_per_step=flops_per_step,
            peak=self.peak,
        )
        totals = self.clock.totals()
        metrics |= {"goodput": goodput(totals), **lost_time(totals)}
        metrics |= {f"epochs/{name}": count for name, count in self.source.epochs(self.rows_read(step)).items()}
        if repeated := num_repeated_requests():
            metrics["repeated_requests"] = float(repeated)
        with self._written():
            self.writers.write(step, metrics)
        self.callbacks.step_end(step, metrics)
        if metrics["skipped_steps"] == 1.0:
            raise SafetyError(
                f"no step from {step - steps + 1} to {step} was applied: their losses, gradients or updates were not "
                f"finite, or spikes. {self.guard.advice()}"
            )
        if metrics["skipped_steps"] > 0:
            _LOG.warning("%d of the last %d steps were not applied", round(metrics["skipped_steps"] * steps), steps)


@dataclasses.dataclass(frozen=True)
class RestoredState:
    """Content of a checkpoint; `first_row` is the number of rows that are not read any more."""

    step: int
    state: dict[str, Any]
    meta: dict[str, Any]
    first_row: int
    interval: dict[str, WeightedMean]


def restore_state(
    program: Program, checkpoints: Checkpoints, record: RunRecord, run: RunConfig, step: int | None = None
) -> RestoredState:
    """Restore the checkpoint of `step`, by default the newest one, after comparing it with the run."""
    expected = program.checkpointable_state(program.abstract_state)
    step, saved, meta = checkpoints.restore(expected, step, require=functools.partial(record.require_own, run))
    interval = {name: WeightedMean(*pair) for name, pair in meta["interval"].items()}
    return RestoredState(
        step, program.training_state(saved), meta, record.first_row_after(step, meta["data"]["rows"]), interval
    )
