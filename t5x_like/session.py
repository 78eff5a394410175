"""A running training job: its program, data, checkpoints and records, opened together and closed together."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from t5x_like import overview, run_directory
from t5x_like.bases import RECORD, Base, open_base
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.checkpoints.space import require_free_space, state_bytes
from t5x_like.config import ConfigError, Problem, RefusedError, RunConfig
from t5x_like.config.serialization import to_dict
from t5x_like.data.batches import Batches, Source, open_source
from t5x_like.evaluation.command import evaluate_and_record, is_evaluated
from t5x_like.interop.adaptation import initial_state
from t5x_like.monitoring.clock import Clock, goodput
from t5x_like.monitoring.logs import logging_to
from t5x_like.monitoring.metrics import Mean, add, value
from t5x_like.monitoring.progress import Progress
from t5x_like.monitoring.throughput import Peak, rates
from t5x_like.monitoring.writers import JsonlWriter, NoWriter, TensorBoardWriter, Writer, Writers
from t5x_like.partitioning.agreement import by_first, compile_together
from t5x_like.partitioning.rows import on_host
from t5x_like.planning.flops import training_flops
from t5x_like.planning.tokens import tokens_per_step
from t5x_like.program import Program, assemble
from t5x_like.watchdog import Watchdog

NO_STEP = 10.0
"""How much longer than between two steps a process may show no sign of life: it compiles, say, or evaluates."""
STEPS_IN_FLIGHT = 4
"""Steps that the host may be ahead of the device. Their batches wait in the device's memory."""

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class Session:
    """What the loop works with. `step` counts the steps that have been dispatched."""

    run: RunConfig
    workdir: Path
    program: Program
    source: Source
    batches: Batches
    watchdog: Watchdog
    first_row: int
    """Rows of the run that were read before this process's first step."""
    first_step: int
    checkpoints: CheckpointManager
    writers: Writers
    progress: Progress
    clock: Clock
    flops_per_step: float
    tokens_per_step: int
    peak: Peak | None
    state: Any
    step: int
    base: Mapping[str, Any] | None
    """What checkpoints say of the frozen parameters that their adapters belong to; None without adapters."""
    interval: dict[str, Mean]
    """Sums, on the host, over the steps of the current interval of the log. Saved, so that a resumed run logs what an
    undisturbed one would have logged."""
    pending: collections.deque[dict[str, Mean]] = dataclasses.field(default_factory=collections.deque)
    """Metrics, on the device, of the steps since."""
    compiled: bool = False
    evaluated: int | None = None
    """Step of the last evaluation."""

    def rows_read(self, step: int) -> int:
        """Rows of the run that the steps before `step` have trained on: the data's whole position."""
        return self.first_row + (step - self.first_step) * self.run.training.batch_size

    def next_batch(self) -> Any:
        """The next global batch, on its way to the devices."""
        with self.clock.state("data_wait"):
            return self.program.put(next(self.batches))

    def dispatch(self, batch: Any) -> None:
        """Starts a training step; returns before it is done."""
        self.watchdog.beat(1.0 if self.compiled else NO_STEP)
        with self.clock.state("step" if self.compiled else "compile"):
            if not self.compiled:
                compile_together(self.program.train_step, self.state, batch)
            self.state, metrics = self.program.train_step(self.state, batch)
            self.compiled = True
        self.step += 1
        self.pending.append(metrics)
        self.progress.advance(self.step)

    def write_metrics(self) -> None:
        """Writes the interval that ended before the newest step, while that step runs."""
        done = self.step - 1
        # A save at that step has written it already; an evaluation has only collected it.
        is_due = done > 0 and done % self.run.monitoring.log_every_steps == 0
        if is_due and (self.interval or len(self.pending) > 1):
            newest = self.pending.pop()
            self._write_interval(done)
            self.pending.append(newest)
        elif len(self.pending) > STEPS_IN_FLIGHT:
            jax.block_until_ready(self.pending[-1 - STEPS_IN_FLIGHT])

    def save(self) -> None:
        """Starts to save the state; the files are written while training goes on."""
        self.watchdog.beat(NO_STEP)
        with self.clock.state("save"):
            self._collect()
            if self.interval and self._at_end_of_interval():
                self._write_interval(self.step)
            meta = {
                "config": to_dict(self.run),
                "data": {"rows": self.rows_read(self.step), "fingerprint": self.source.fingerprint},
                "interval": {name: list(mean) for name, mean in self.interval.items()},
                "seconds": self.clock.totals(),
                "mesh": dict(self.program.mesh.shape),
                "versions": overview.versions(),
            }
            if self.base is not None:
                meta[RECORD] = dict(self.base)
            state = self.program.saved(self.state)
            if self.checkpoints.save(self.step, state, meta, self.batches.state_files()):
                self.progress.status(f"saving step {self.step}")

    def evaluate(self) -> None:
        """Scores the parameters on held-out text, into evaluations.jsonl and the report."""
        if self.evaluated == self.step:
            return
        self.watchdog.beat(NO_STEP)
        self.progress.status(f"evaluating step {self.step}")
        self._collect()
        with self.clock.state("eval"):
            with self._written():
                evaluate_and_record(
                    self.program, self.program.model_params(self.state), self.source.stores, self.workdir, self.step
                )
        self.evaluated = self.step
        self.progress.status(f"evaluated step {self.step}")

    def finish(self, *, evaluate: bool) -> None:
        """Saves, waits until that is on the disk, and evaluates if the run is over."""
        self.save()
        self.checkpoints.wait()
        self.progress.status(f"saved step {self.step}")
        if evaluate:
            self.evaluate()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Within: records are written, and an error of the file system is told as the user's."""
        try:
            yield
        except OSError as error:
            raise RefusedError(
                f"{error.filename or self.workdir}: cannot be written ({error.strerror or error}). Saved steps are "
                "untouched: mend that and run the same command again."
            ) from error

    def _collect(self) -> None:
        """Waits for the pending steps and adds their metrics to the interval, in the order of the steps."""
        with self.clock.state("step"):
            steps = on_host(list(self.pending))
            self.pending.clear()
        for metrics in steps:
            floats = {name: Mean(float(mean.sum), float(mean.weight)) for name, mean in metrics.items()}
            self.interval = add(self.interval, floats)

    def _at_end_of_interval(self) -> bool:
        last = self.step == self.run.training.num_train_steps
        return last or self.step % self.run.monitoring.log_every_steps == 0

    def _write_interval(self, step: int) -> None:
        self._collect()
        metrics = {name: value(mean) for name, mean in self.interval.items()}
        steps = round(self.interval["learning_rate"].weight)
        self.interval = {}
        seconds = self.clock.lap()
        metrics |= rates(
            seconds,
            steps=steps,
            tokens=self.tokens_per_step * steps,
            flops_per_step=self.flops_per_step,
            peak=self.peak,
        )
        metrics["goodput"] = goodput(self.clock.totals())
        metrics |= {f"epochs/{name}": count for name, count in self.source.epochs(self.rows_read(step)).items()}
        with self._written():
            self.writers.write(step, metrics)
        if metrics["nonfinite"] == 1.0:
            raise RefusedError(
                f"no step from {step - steps} to {step} had a finite gradient, and none of them was applied; the last "
                "checkpoint is sound. Lower training.schedule.learning_rate, or look at the data of these steps with "
                "`t5x-like inspect`."
            )
        if metrics["nonfinite"] > 0:
            _LOG.warning("%d of the last %d steps had no finite gradient", round(metrics["nonfinite"] * steps), steps)


def finished_step(run: RunConfig, workdir: Path) -> int | None:
    """The last step of the run, if it is saved and evaluated already; None if there is something left to do."""
    directory = workdir / run_directory.CHECKPOINTS
    latest = CheckpointManager(directory, run.checkpoints, read_only=True).latest()
    if latest is None or latest < run.training.num_train_steps or not is_evaluated(workdir, latest):
        return None
    return latest


@contextlib.contextmanager
def open_session(run: RunConfig, workdir: Path, clock: Clock, watchdog: Watchdog) -> Iterator[Session]:
    """Opens everything that training needs, restores the newest checkpoint, and prints what will be done.

    Every process opens one. They all compute; the first one writes and shows.

    Raises:
      UserError: the data is not prepared, the devices or the disk do not fit the run, or the checkpoint belongs to
        other data.
    """
    process = jax.process_index()
    is_writer = process == 0
    console = Console()
    # What concerns the run and not the process is shown once.
    shown = console if is_writer else Console(quiet=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_to(workdir / run_directory.log_name(process), console))
        program = assemble(run, jax.devices())
        source = open_source(run.data, run.training.batch_size, program.share())
        _require_rows_for(source, run)
        directory = workdir / run_directory.CHECKPOINTS
        size, steps = state_bytes(program.abstract_state), run.training.num_train_steps
        by_first(lambda: require_free_space(directory, size, run.checkpoints, steps))
        checkpoints = CheckpointManager(directory, run.checkpoints)
        stack.push(functools.partial(_close, checkpoints))
        restored = by_first(checkpoints.latest) is not None
        step, first_row, state, interval, files = 0, 0, None, {}, {}
        of_data, of_base = None, None
        if restored:
            step, state, meta = checkpoints.restore(program.abstract_state)
            of_data, files = meta["data"], checkpoints.read_files(step)
            first_row, of_base = of_data["rows"], meta.get(RECORD)
            interval = {name: Mean(*pair) for name, pair in meta["interval"].items()}
            clock.go_on(meta["seconds"])
        else:
            state = initial_state(program, lambda line: shown.out(line, highlight=False))
        base = _open_base(program, of_base)
        if base is not None:
            state = state | {"base": base.params}
        restored_step = step if restored else None
        batches = source.start(first_row, of_data, files)
        stack.callback(batches.close)
        if is_writer:
            overview.show(program, source, workdir, step, first_row, console, base)
        progress = Progress(run.training.num_train_steps, console=shown, step=step)
        stack.callback(progress.close)
        writers = _open_writers(run, workdir, restored_step, progress) if is_writer else Writers(NoWriter(), [])
        stack.callback(writers.close)
        # From here on, what is nothing else is waiting for steps.
        clock.enter("step")
        yield Session(
            run=run,
            workdir=workdir,
            program=program,
            source=source,
            batches=batches,
            watchdog=watchdog,
            first_row=first_row,
            first_step=step,
            checkpoints=checkpoints,
            writers=writers,
            progress=progress,
            clock=clock,
            flops_per_step=training_flops(run),
            peak=overview.peak(program) if is_writer else None,
            tokens_per_step=tokens_per_step(run),
            state=state,
            step=step,
            base=None if base is None else base.record,
            interval=interval,
            evaluated=step if by_first(lambda: is_evaluated(workdir, step)) else None,
        )


def _close(checkpoints: CheckpointManager, kind: type[BaseException] | None, *_: object) -> None:
    """After an error of one of several processes nothing waits for the others: they hear of it later."""
    checkpoints.close(abandon=kind is not None and jax.process_count() > 1)


def _open_base(program: Program, recorded: Mapping[str, Any] | None) -> Base | None:
    lora = program.run.training.lora
    return None if lora is None else open_base(lora, program.run.model, program.abstract_base, recorded)


def _open_writers(run: RunConfig, workdir: Path, restored_step: int | None, progress: Progress) -> Writers:
    record = JsonlWriter(workdir / run_directory.METRICS, restored_step=restored_step)
    others: list[Writer] = [progress]
    if run.monitoring.tensorboard:
        others.append(TensorBoardWriter(workdir / run_directory.TENSORBOARD, restored_step=restored_step))
    return Writers(record, others)


def _require_rows_for(source: Source, run: RunConfig) -> None:
    """Raises ConfigError where the token table lacks ids of the tokenizer, which may be known from its file only."""
    needed = source.vocab_size
    if needed > run.model.vocab_size:
        expected = f"at least {needed}, the ids of the tokenizer of {source.origin}"
        raise ConfigError([Problem("model.vocab_size", str(run.model.vocab_size), expected)])
