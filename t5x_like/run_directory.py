"""Run directory: its identity and configuration, the lock of the process that writes it, and how the last one ended.

A run has a random id, which is written to run.json, to a file in the folder of its checkpoints, and to every
checkpoint. A checkpoint of another run is refused, and so is a directory that does not contain what was saved there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_like import plugins
from t5x_like.config import RunConfig
from t5x_like.config.serialization import diff_configs, from_json, to_json
from t5x_like.errors import ConfigError, ConfigProblem, SafetyError
from t5x_like.storage import mirror as mirrors
from t5x_like.utils.atomic_write import write_atomically
from t5x_like.utils.file_lock import lock
from t5x_like.utils.json_reader import read_json
from t5x_like.utils.sanitize import say

RECORD = "run.json"
CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
LOCK = "lock"
"""File that the process of a run locks, with its id, its host and the run's id."""
EXIT = "exit.json"
COMPILATION_CACHE = "compilation_cache"
RUN_ID = "run_id"
"""Key of the run id in the meta of a checkpoint, and name of the file with it in the folder of the checkpoints."""
TOKENIZER = "tokenizer"
PLUGINS = "plugins"
"""Name by which the user allows changed plug-ins."""


def log_name(process: int) -> str:
    """Return the name of a process's log file: log.txt for process 0, log.1.txt for process 1."""
    return f"log.{process}.txt" if process else "log.txt"


FREE_TO_CHANGE = (
    "checkpoints.",
    "compilation_cache.",
    "evaluation.",
    "monitoring.",
    "data.prefetch_batches",
    "data.prefetch_threads",
    "data.store_request_concurrency",
    "data.store_cache_bytes",
    "data.store_dir",
    "sharding.",
    "timeouts.",
    "training.guard.policy",
    "training.guard.max_rollbacks",
    "xla_flags",
    "cpu_allocator",
    "training.lora.base",
    "training.distillation.teacher",
    "name",
    "plugins",
    "plugins.",
)
"""Fields that may change when a run is resumed, because they do not decide what is computed: the same state is restored
on another mesh, and a LoRA base and a teacher are identified by their parameters. Names of plug-ins may change, too;
their content is compared by digest."""


MAY_BE_ALLOWED = "training."
"""Fields whose change alters the run, but not the shape of its state and data. A change of a field that the user names
is allowed."""


def may_change(path: str, kept: RunConfig, run: RunConfig) -> bool:
    """Return True if the run `kept` may be resumed as `run`, with another value of the field at `path`."""
    if path == "training.schedule.decay_steps" and kept.training.schedule.decay_steps is None:
        return run.training.schedule.decay_steps == kept.training.num_train_steps  # What it stood for.
    if path == "training.num_train_steps":
        # A schedule that ends with the run would have had other values at the steps already taken.
        schedule = run.training.schedule
        return schedule.kind in ("constant", "rsqrt") or schedule.decay_steps is not None
    return any(path == free or (free.endswith(".") and path.startswith(free)) for free in FREE_TO_CHANGE)


def read_config(directory: Path) -> RunConfig:
    """Return the configuration of the run in `directory`.

    Raises:
      ConfigError: there is no run, its config.json cannot be read, or another version wrote it.
      SafetyError: it names plug-ins that the user does not trust, or that have been changed.
    """
    text = _read_text(directory)
    path = directory / CONFIG
    plugins.admit(text, directory, str(path))
    return from_json(text, source=str(path))


def _read_text(directory: Path) -> str:
    path = directory / CONFIG
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        missing = "no such file" if directory.is_dir() else "no such directory"
        found = missing if isinstance(error, FileNotFoundError) else f"an unreadable file ({error.strerror})"
        raise ConfigError([ConfigProblem(str(path), found, "a run directory written by `t5x-like train`")]) from None


@dataclasses.dataclass
class RunRecord:
    """Content of run.json: what must be found again when the run is resumed.

    Attributes:
      directory: The run directory.
      run_id: Random id of the run.
      saved_step: Step of the newest checkpoint that was completed; None before the first one.
      allowed_changes: Fields whose values were changed since the run began, because the user allowed it.
      rollbacks: (step of the restored checkpoint, rejected step, first row after the checkpoint) of each rollback.
    """

    directory: Path
    run_id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    saved_step: int | None = None
    allowed_changes: tuple[str, ...] = ()
    rollbacks: tuple[tuple[int, int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        del document["directory"]
        return document

    @staticmethod
    def from_json(document: Mapping[str, Any], directory: Path) -> RunRecord:
        """Return the record; raise TypeError or KeyError for a malformed document."""
        record = RunRecord(**{**document, "directory": directory})
        record.allowed_changes = tuple(record.allowed_changes)
        record.rollbacks = tuple((step, rejected, row) for step, rejected, row in record.rollbacks)
        return record

    def first_row_after(self, step: int, rows: int) -> int:
        """Return the row with which training continues from the checkpoint of `step`, which has seen `rows` rows."""
        for restored, _, first_row in reversed(self.rollbacks):
            if restored <= step:
                return first_row if restored == step else rows
        return rows

    def write(self) -> None:
        """Write run.json, and the id into the folder of the checkpoints.

        Raises:
          SafetyError: a file cannot be written.
        """
        checkpoints = self.directory / CHECKPOINTS
        try:
            if _read_id(checkpoints) != self.run_id:
                checkpoints.mkdir(parents=True, exist_ok=True)
                write_atomically(checkpoints / RUN_ID, self.run_id)
            self._write_record()
        except OSError as error:
            raise _unwritable(self.directory, error) from None

    def _write_record(self) -> None:
        write_atomically(self.directory / RECORD, json.dumps(self.to_json()) + "\n")

    def completed(self, step: int) -> None:
        """Record that the checkpoint of `step` is complete.

        Raises:
          SafetyError: the directory is no longer that of this run, or the record cannot be written.
        """
        # Never `write` here: it would mark a folder that took the place of the run's own in mid-save as the run's.
        self.require_present()
        self.saved_step = step
        try:
            self._write_record()
        except OSError as error:
            raise _unwritable(self.directory, error) from None

    def require_present(self) -> None:
        """Raise SafetyError unless the directory and its folder of checkpoints are still those of this run."""
        found = _read_record(self.directory)
        directories = {
            self.directory: None if found is None else found.run_id,
            self.directory / CHECKPOINTS: _read_id(self.directory / CHECKPOINTS),
        }
        for path, run_id in directories.items():
            if run_id != self.run_id:
                raise SafetyError(
                    f"{path}: found {_named(run_id)}, expected the directory of run {self.run_id}, which this process "
                    "opened: was a file system unmounted, or the directory moved? Nothing was written. Restore it and "
                    "run the same command again."
                )

    def require_own(self, run: RunConfig, path: Path, meta: Mapping[str, Any]) -> None:
        """Raise SafetyError unless a checkpoint was written by this run, with a configuration that `run` continues.

        Args:
          run: Configuration of the run now.
          path: The checkpoint, for the message.
          meta: Meta of the checkpoint.
        """
        if meta.get(RUN_ID) != self.run_id:
            raise SafetyError(
                f"{path}: found a checkpoint of {_named(meta.get(RUN_ID))}, expected one of run {self.run_id}, which "
                f"this directory belongs to ({RECORD}). Move it to its own run directory; a new run can start from its "
                "parameters by `initialize_from`."
            )
        refused = _refused_changes(_config_of(meta, path), run, self.allowed_changes)
        if refused:
            raise SafetyError(f"{path} was saved with another configuration:\n{_listed(refused)}")


def _named(run_id: Any) -> str:
    return "no run id" if run_id is None else f"run {run_id}"


def _read_id(checkpoints: Path) -> str | None:
    """Return the run id in the folder of the checkpoints; None without one."""
    try:
        return (checkpoints / RUN_ID).read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _read_record(directory: Path) -> RunRecord | None:
    """Return the record of the run in `directory`; None if run.json is missing or damaged."""
    try:
        return RunRecord.from_json(read_json(directory / RECORD), directory)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def claim_identity(
    directory: Path, newest: Mapping[str, Any] | None, start_over: Callable[[RunRecord], None] | None = None
) -> RunRecord:
    """Return the record of the run in `directory`, a new one for a new run, and write it.

    Args:
      directory: The run directory.
      newest: Meta of the newest checkpoint; None without checkpoints.
      start_over: Called with the record of a new run, which begins although results of another one are here whose
        checkpoints are gone; None: this is refused.

    Raises:
      SafetyError: the checkpoints of a run are gone, for example because a file system is not mounted, or a file cannot
        be written.
    """
    record, marker = _read_record(directory), _read_id(directory / CHECKPOINTS)
    if newest is not None:
        # A lost run.json: the newest checkpoint has the id.
        record = record or RunRecord(directory, newest.get(RUN_ID) or secrets.token_hex(8))
    else:
        found = _traces(directory, record, marker)
        if found and start_over is None:
            raise SafetyError(
                f"{directory / CHECKPOINTS} has no checkpoint, but {found}: is a file system not mounted, or was the "
                "folder moved? Nothing was changed. Restore the folder and run the same command again; to give up its "
                "checkpoints and train from step 0, add --allow-start-over."
            )
        record = RunRecord(directory) if found or record is None else record
        if found and start_over is not None:
            start_over(record)
        elif marker is not None:
            record.run_id = marker
    record.write()
    return record


def _traces(directory: Path, record: RunRecord | None, marker: str | None) -> str:
    """Return what shows that a run had checkpoints or steps here; empty for a new run."""
    if record is None:
        return f"{METRICS} has records" if has_records(directory) else ""
    if record.saved_step is not None:
        return f"step {record.saved_step} of run {record.run_id} was saved there"
    return "" if marker == record.run_id else f"it is not the folder that run {record.run_id} created"


def has_records(directory: Path) -> bool:
    """Return whether a run has logged a step."""
    metrics = directory / METRICS
    return metrics.exists() and metrics.stat().st_size > 0


def claim_config(
    record: RunRecord,
    run: RunConfig,
    allowed: Sequence[str] = (),
    newest: Mapping[str, Any] | None = None,
    describe_effect: Callable[[RunConfig, RunConfig], str | None] = lambda kept, run: None,
) -> RunConfig:
    """Write config.json, or check that the existing one describes the same run.

    The config.json of a run that has not completed a step (one that was refused at the start, for example) is replaced.
    If a run has lost its config.json, the configuration in its newest checkpoint is compared.

    Args:
      record: Record of the run.
      run: The configuration.
      allowed: Fields of `training`, or "plugins", that the user allows to differ from now on.
      newest: Meta of the newest checkpoint; None without checkpoints.
      describe_effect: Returns what changes at the next step if the run `kept` continues as `run`, or None. It is part
        of a refusal, and printed if the user has allowed the change.

    Returns:
      The run as read back from the file, where every number has the type of its field.

    Raises:
      SafetyError: the directory contains a run with another configuration or other plug-ins (the differences are
        listed), or it cannot be written.
    """
    directory = record.directory
    path = directory / CONFIG
    kept = None
    if path.exists() and (newest is not None or has_records(directory)):
        # The plug-ins of the run are compared with those that the recipe has imported, and not imported from here.
        kept = from_json(_read_text(directory), source=str(path))
    elif newest is not None:
        kept = _config_of(newest, directory / CHECKPOINTS)
    if kept is not None:
        named = [field for field in allowed if field.startswith(MAY_BE_ALLOWED)]
        refused = _refused_changes(kept, run, named)
        effect = describe_effect(kept, run)
        if refused:
            raise SafetyError(
                f"{directory} contains a run with another configuration:\n{_listed(refused)}\n"
                f"Use another --workdir, or the values of that run{_or_allowed(refused)}."
                + (f"\n{effect}" if effect else "")
            )
        if effect:
            say(f"{directory}: {effect}")
        if PLUGINS not in allowed:
            plugins.require_unchanged(run.plugins, directory)
        if named:
            record.allowed_changes = tuple(sorted({*record.allowed_changes, *named}))
            record.write()
    text = to_json(run)
    try:
        plugins.keep(run.plugins, directory)
        write_atomically(path, text)
    except OSError as error:
        raise _unwritable(directory, error) from None
    return from_json(text, source=str(path))


def _config_of(meta: Mapping[str, Any], path: Path) -> RunConfig:
    return from_json(json.dumps(meta["config"]), source=str(path))


Changes = Mapping[str, tuple[Any, Any]]


def _refused_changes(kept: RunConfig, run: RunConfig, allowed: Sequence[str]) -> Changes:
    """Return the fields in which `run` differs from `kept` and must not, with both values."""
    return {
        field: values
        for field, values in diff_configs(kept, run).items()
        if not may_change(field, kept, run)
        and not any(field == name or field.startswith(f"{name}.") for name in allowed)
    }


def _listed(changes: Changes) -> str:
    return "\n".join(f"  {field}: {old!r} in the run, {new!r} now" for field, (old, new) in changes.items())


def _or_allowed(refused: Iterable[str]) -> str:
    """Return advice on the differences that the user can allow."""
    fields = [field for field in refused if field.startswith(MAY_BE_ALLOWED)]
    return f"; to change them, add {' '.join(f'--allow-change {field}' for field in fields)}" if fields else ""


def write_exit(
    directory: Path, *, code: int, reason: str, step: int | None, seconds: Mapping[str, float], process: int = 0
) -> None:
    """Write the exit status of a process to exit.json, for users, schedulers and the report.

    Args:
      directory: The run directory.
      code: Exit code of the process.
      reason: One sentence.
      step: Last saved step; None if this process saved none.
      seconds: Wall-clock seconds by state (`Clock.totals`).
      process: Index of the process.
    """
    document = {"code": code, "reason": reason, "step": step, "process": process, "seconds": dict(seconds)}
    # The reason for the exit may be a full disk: a failure to record it must not hide the original error.
    with contextlib.suppress(OSError):
        write_atomically(directory / EXIT, json.dumps(document) + "\n", suffix=f"{process}.partial")
        # The process may end without leaving the context of the lock.
        mirrors.upload_now(directory)


@contextlib.contextmanager
def locked(directory: Path, patience: float = 0.0) -> Iterator[None]:
    """Lock the directory for this process. The operating system releases the lock when the process ends.

    A directory in an object store has a lease; files that are written within the context are uploaded.

    Args:
      directory: The directory.
      patience: Seconds for which the lease of another process is observed before it is refused.

    Raises:
      SafetyError: another process trains in this directory, or it cannot be written.
    """
    if (mirror := mirrors.mirror_of(directory)) is not None:
        with mirror.owned(patience):
            yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("a+")
    except OSError as error:
        raise _unwritable(directory, error) from None
    with file:
        if not lock(file):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise SafetyError(f"another process (pid {holder}) trains in {directory}; stop it or use another --workdir")
        name_holder(directory)
        yield


def name_holder(directory: Path) -> None:
    """Write this process, which holds the lock, and its run, if it is known by now, into the file of the lock.

    Raises:
      SafetyError: it cannot be written.
    """
    record = _read_record(directory)
    run = "" if record is None else f", run {record.run_id}"
    try:
        # In place: the lock belongs to the file, which must stay the same.
        (directory / LOCK).write_text(f"{os.getpid()} on {socket.gethostname()}{run}", encoding="utf-8")
    except OSError as error:
        raise _unwritable(directory, error) from None


def _unwritable(directory: Path, error: OSError) -> SafetyError:
    fix = "free some space or use another --workdir" if error.errno == errno.ENOSPC else "use another --workdir"
    return SafetyError(f"cannot write to the run directory {directory}: {error.strerror or error}; {fix}")
