"""Opening of a training session: everything that training needs, opened and closed together."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from t5x_like import run_directory
from t5x_like.adapters.base_weights import RECORD, Base, fingerprint, open_base
from t5x_like.checkpoints.disk_space import require_free_space, state_bytes
from t5x_like.checkpoints.interface import Checkpoints
from t5x_like.checkpoints.opening import broadcast_warning, open_checkpoints
from t5x_like.config import RunConfig
from t5x_like.config.batch_sizes import batch_sizes
from t5x_like.data.stream.continuation import require_windows
from t5x_like.data.stream.data_source import DataSource, PreparedSource, open_data_source
from t5x_like.data.tokenizers.loading import keep_tokenizer
from t5x_like.distributed.coordination import on_process_0
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.evaluation.best_checkpoints import kept_steps
from t5x_like.evaluation.evaluate_runs import is_evaluated
from t5x_like.interop.warm_start import initial_state, require_tokenizer_of_source
from t5x_like.monitoring import mlflow_writer, wandb_writer  # noqa: F401 (they register their writers)
from t5x_like.monitoring.logging_setup import logging_to
from t5x_like.monitoring.progress_bar import Progress
from t5x_like.monitoring.time_tracker import TimeTracker
from t5x_like.monitoring.writers import (
    JsonlWriter,
    NoWriter,
    Writers,
    require_registered,
)
from t5x_like.planning.estimate.flops import training_flops
from t5x_like.planning.estimate.tokens import tokens_per_step
from t5x_like.program import Program, build_program
from t5x_like.run_directory import RunRecord
from t5x_like.storage.mirror import mirror_of
from t5x_like.trainer import startup_summary
from t5x_like.trainer.callbacks import Callbacks
from t5x_like.trainer.crash_loop import counted_start
from t5x_like.trainer.grace import SAVE_SECONDS, too_slow
from t5x_like.trainer.profiling import step_profiler
from t5x_like.trainer.reference import RECORD as REFERENCE
from t5x_like.trainer.reference import attach_reference
from t5x_like.trainer.replay_check import ReplayCheck
from t5x_like.trainer.row_record import RowRecord
from t5x_like.trainer.session import TrainSession, restore_state
from t5x_like.trainer.step_guard import StepGuard
from t5x_like.trainer.stored_teacher import attach_stored_teacher
from t5x_like.trainer.teacher import RECORD as TEACHER
from t5x_like.trainer.teacher import open_teacher
from t5x_like.utils.console import Console
from t5x_like.utils.type_aliases import PyTree


@contextlib.contextmanager
def open_session(run: RunConfig, record: RunRecord, clock: TimeTracker) -> Iterator[TrainSession]:
    """Open everything that training needs, restore the newest checkpoint, and print the start-up summary.

    Every process opens a session. All of them compute; only the first one writes and prints.

    Raises:
      UserError: the data is not prepared, the devices or the disk do not fit the run, the checkpoint belongs to other
        data, or a writer or callback is not registered.
    """
    workdir = record.directory
    process = jax.process_index()
    is_writer = process == 0
    console = Console()
    # Messages about the run, as opposed to the process, are printed once.
    shown = console if is_writer else Console(quiet=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_to(workdir / run_directory.log_name(process), console))
        # Unknown names are refused before anything is computed.
        callbacks = Callbacks.of_run(run, workdir) if is_writer else Callbacks()
        require_registered(run.monitoring.writers)
        program = build_program(run, jax.devices())
        sizes = batch_sizes(run.training)
        source = open_data_source(run.data, sizes, program.host_shard())
        _require_ids_of(source, run)
        if run.evaluation.continuation is not None:
            # Now, and not at the first evaluation.
            require_windows(source.stores, run.evaluation.continuation)
        directory = workdir / run_directory.CHECKPOINTS
        size, steps = state_bytes(program.abstract_state), run.training.num_train_steps
        if mirror_of(workdir) is None:
            on_process_0(lambda: require_free_space(directory, size, run.checkpoints, steps))
        kept = functools.partial(kept_steps, workdir, run.checkpoints.keep_best)
        checkpoints = open_checkpoints(workdir, run.checkpoints, record=record, kept=kept)
        stack.push(functools.partial(_close, checkpoints))
        if (text := broadcast_warning(checkpoints, run.checkpoints)) is not None:
            shown.out(text, highlight=False)
        latest = on_process_0(checkpoints.latest)
        stack.enter_context(counted_start(workdir, latest, run.monitoring.max_starts_without_progress))
        restored = latest is not None
        session: TrainSession | None = None
        step, first_row, state, interval, files = 0, 0, None, {}, {}
        of_data, recorded = None, dict[str, Any]()
        clock.enter("restore")
        if restored:
            found = restore_state(program, checkpoints, record, run)
            step, state, first_row, interval = found.step, found.state, found.first_row, found.interval
            of_data, recorded, files = found.meta["data"], found.meta, checkpoints.read_files(step)
            clock.go_on(found.meta["seconds"])
            checkpoints.save_seconds = found.meta.get(SAVE_SECONDS)
            if (text := too_slow(checkpoints, run)) is not None:
                shown.out(text, highlight=False)
        else:
            require_tokenizer_of_source(run, source.stores)
            state = program.with_new_average(initial_state(program, lambda line: shown.out(line, highlight=False)))
        if is_writer and source.stores:
            keep_tokenizer(workdir / run_directory.TOKENIZER, source.stores[0].tokenizer)
        base, sources = _open_base(program, recorded.get(RECORD)), dict[str, Mapping[str, Any]]()
        if base is not None:
            base = dataclasses.replace(base, params=program.kept_base(base.params))
            state, sources[RECORD] = state | {"base": base.params}, base.record
        teacher = open_teacher(program, source.stores, recorded.get(TEACHER))
        if teacher is not None:
            state, sources[TEACHER] = state | {"teacher": teacher.params}, teacher.record
            shown.out(
                f"teacher: {teacher.record['path']}, step {teacher.record['step']}, fingerprint "
                f"{teacher.record['fingerprint']}",
                highlight=False,
            )
        clock.enter("init")
        if run.training.distillation is not None and run.training.distillation.top_k is not None:
            assert isinstance(source, PreparedSource)
            sources[TEACHER] = attach_stored_teacher(
                program,
                source.stream,
                first_row=first_row,
                last_row=first_row + sizes.rows_before(run.training.num_train_steps) - sizes.rows_before(step),
                recorded=recorded.get(TEACHER),
                report=lambda line: shown.out(line, highlight=False),
                alive=lambda: clock.enter("init"),
            )
        if run.data.preference is not None:
            sources[REFERENCE] = attach_reference(
                program,
                source.stores,
                workdir,
                **_start_model(run, state, base, recorded.get(REFERENCE)),
                recorded=recorded.get(REFERENCE),
                report=lambda line: shown.out(line, highlight=False),
                # Each batch is a stage of its own for the watchdog.
                alive=lambda: clock.enter("init"),
            )
        restored_step = step if restored else None
        batches = source.start(first_row, of_data, files, step)
        stack.callback(lambda: session.batches.close() if session else batches.close())
        if is_writer:
            startup_summary.show(program, source, workdir, step, first_row, console, base)
        progress = Progress(run.training.num_train_steps, console=shown, step=step)
        stack.callback(progress.close)
        replay_every = run.monitoring.determinism_check_every
        rows = None
        if run.monitoring.record_rows and program.host_shard().keeps_state:
            rows = RowRecord(workdir, process, jax.process_count(), restored_step)
            stack.callback(rows.close)
        writers = Writers(NoWriter(), [])
        if is_writer:
            metrics = JsonlWriter(workdir / run_directory.METRICS, restored_step=restored_step)
            writers = Writers.of_run(run.monitoring.writers, workdir, restored_step, record=metrics, display=progress)
        stack.callback(writers.close)
        # From here on, time that is not spent otherwise is time of steps.
        clock.enter("step")
        callbacks.start(step)
        session = TrainSession(
            run=run,
            workdir=workdir,
            program=program,
            source=source,
            batches=batches,
            first_row=first_row,
            first_step=step,
            checkpoints=checkpoints,
            writers=writers,
            callbacks=callbacks,
            profiler=stack.enter_context(step_profiler(workdir, run.monitoring.profile_steps)),
            progress=progress,
            replay=None if replay_every is None else ReplayCheck(replay_every, program.train_step, program.mesh),
            rows=rows,
            clock=clock,
            flops_per_step=training_flops(run),
            peak=startup_summary.peak(program) if is_writer else None,
            tokens_per_step=tokens_per_step(run),
            state=state,
            step=step,
            record=record,
            collected_step=step,
            guard=StepGuard(run, workdir, checkpoints, on_process_0(checkpoints.steps)),
            sources=sources,
            accumulated_metrics=interval,
            evaluated=step if on_process_0(lambda: is_evaluated(workdir, step)) else None,
        )
        opened = session
        stack.callback(lambda: callbacks.end(opened.step))
        # Writers and checkpoints are closed as part of the last save.
        stack.callback(lambda: clock.enter("save"))
        yield session


def _close(checkpoints: Checkpoints, kind: type[BaseException] | None, *_: object) -> None:
    """Close the checkpoints; after an error in one of several processes, without waiting for the others."""
    checkpoints.close(abandon=kind is not None and jax.process_count() > 1)


def _open_base(program: Program, recorded: Mapping[str, Any] | None) -> Base | None:
    lora = program.run.training.lora
    return None if lora is None else open_base(lora, program.run.model, program.abstract_base_params, recorded)


def _start_model(
    run: RunConfig, state: PyTree, base: Base | None, recorded: Mapping[str, str] | None
) -> dict[str, Any]:
    """Return the parameters that the run starts from, and their fingerprint: those of its base if it has adapters.

    Those of a run that trains all parameters are gone (None) once it has a checkpoint, which records the fingerprint.
    """
    if base is not None:
        lora = run.training.lora
        rounded = "" if lora is None or lora.base_type == "float32" else f" {lora.base_type}"
        return {"params": base.params, "model": base.record["fingerprint"] + rounded}
    if recorded is not None:
        return {"params": None, "model": recorded["model"]}
    return {"params": state["params"], "model": fingerprint(state["params"])}


def _require_ids_of(source: DataSource, run: RunConfig) -> None:
    """Raise ConfigError if the model has other special ids than the tokenizer, or a table with too few rows: some of
    this may be known from the tokenizer's file only."""
    model, problems = run.model, []
    if source.vocab_size > model.vocab_size:
        expected = f"at least {source.vocab_size}, the ids of the tokenizer of {source.origin}"
        problems.append(ConfigProblem("model.vocab_size", str(model.vocab_size), expected))
    if source.stores:
        vocabulary = source.stores[0].vocabulary
        if model.decoder is not None and vocabulary.eos_id not in model.eos_ids:
            expected = f"{vocabulary.eos_id}, the tokenizer's"
            problems.append(ConfigProblem("model.eos_ids", str(model.eos_ids), expected))
        if model.decoder is not None and vocabulary.start_id != model.decoder_start_token_id:
            expected = f"{vocabulary.start_id}, the tokenizer's, with which the rows of a decoder begin"
            problems.append(ConfigProblem("model.decoder_start_token_id", str(model.decoder_start_token_id), expected))
        if model.pad_token_id is not None and vocabulary.pad_id != model.pad_token_id:
            expected = f"{vocabulary.pad_id}, the tokenizer's"
            problems.append(ConfigProblem("model.pad_token_id", str(model.pad_token_id), expected))
    if problems:
        raise ConfigError(problems)
