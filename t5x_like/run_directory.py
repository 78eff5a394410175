"""A run's directory: who may write there, for which configuration, and how the last process ended."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from t5x_like.config import ConfigError, Problem, RefusedError, RunConfig
from t5x_like.config.serialization import differences, from_json, to_json

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
EXIT = "exit.json"


def log_name(process: int) -> str:
    """The log of a process: log.txt of the first, log.1.txt of the second."""
    return f"log.{process}.txt" if process else "log.txt"


FREE_TO_CHANGE = (
    "checkpoints.",
    "evaluation.",
    "monitoring.",
    "data.prefetch",
    "data.store",
    "partitioning.",
    "training.lora.base",
    "name",
)
"""Fields that do not decide what is computed (a changed mesh restores the same state, a base is known by its numbers):
a run may resume with others."""


MAY_BE_ALLOWED = "training."
"""Fields whose change alters the run, and is let pass where the user names them: the state and the data still fit."""


def may_change(path: str, run: RunConfig) -> bool:
    """Whether a run may be resumed with another value of the field at `path`."""
    if path == "training.num_train_steps":
        # A schedule that ends with the run would take other values at steps already taken.
        schedule = run.training.schedule
        return schedule.kind in ("constant", "rsqrt") or schedule.decay_steps is not None
    return any(path == free or (free.endswith(".") and path.startswith(free)) for free in FREE_TO_CHANGE)


def read_config(directory: Path) -> RunConfig:
    """The configuration of the run in `directory`.

    Raises:
      ConfigError: there is no run, or its config.json cannot be read.
    """
    path = directory / CONFIG
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        missing = "no such file" if directory.is_dir() else "no such directory"
        found = missing if isinstance(error, FileNotFoundError) else f"it unreadable ({error.strerror})"
        raise ConfigError([Problem(str(path), found, "a run directory written by `t5x-like train`")]) from None
    return from_json(text, source=str(path))


def claim_config(directory: Path, run: RunConfig, allowed: Sequence[str] = ()) -> RunConfig:
    """Writes config.json, or checks that the one that is there describes the same run.

    One that was refused before its first step has left a config.json too: it holds nothing back.

    Args:
      allowed: Fields of `training` that may differ from now on, because the user says so.

    Returns:
      The run as it is read back from there, where every number has the type of its field.

    Raises:
      RefusedError: the directory holds a run with another configuration, of which the differences are listed; or it
        cannot be written.
    """
    path = directory / CONFIG
    if path.exists() and _has_begun(directory):
        kept = read_config(directory)
        changed = differences(kept, run)
        named = [field for field in allowed if field.startswith(MAY_BE_ALLOWED)]
        refused = {
            field: values
            for field, values in changed.items()
            if not may_change(field, run) and not any(field == name or field.startswith(f"{name}.") for name in named)
        }
        if refused:
            lines = "\n".join(f"  {field}: {old!r} in the run, {new!r} now" for field, (old, new) in refused.items())
            raise RefusedError(
                f"{directory} holds a run with another configuration:\n{lines}\n"
                f"Take another --workdir, or the run's own values{_or_allowed(refused)}."
            )
    text = to_json(run)
    try:
        write_atomically(path, text)
    except OSError as error:
        raise _unwritable(directory, error) from None
    return from_json(text, source=str(path))


def _or_allowed(refused: Iterable[str]) -> str:
    """What may be said of differences that the user can let pass."""
    fields = [field for field in refused if field.startswith(MAY_BE_ALLOWED)]
    return "; to go on with other values, " + " ".join(f"--allow-change {field}" for field in fields) if fields else ""


def _has_begun(directory: Path) -> bool:
    """Whether there is something that another configuration must not go on with."""
    metrics, checkpoints = directory / METRICS, directory / CHECKPOINTS
    return (metrics.exists() and metrics.stat().st_size > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def write_atomically(path: Path, text: str, *, suffix: str = "partial") -> None:
    """Writes a file that is either there in whole or as it was before. Those who write at the same time need a suffix
    each, for the file that is not yet whole."""
    temporary = path.with_name(f"{path.name}.{suffix}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_exit(
    directory: Path, *, code: int, reason: str, step: int | None, seconds: Mapping[str, float], process: int = 0
) -> None:
    """Says in exit.json how the process left its run: for people, schedulers and the report.

    Args:
      directory: The run directory.
      code: Exit code of the process.
      reason: One sentence.
      step: The step that was saved last; None if this process saved none.
      seconds: Wall-clock seconds by state (`Clock.totals`).
      process: Which of several it was.
    """
    document = {"code": code, "reason": reason, "step": step, "process": process, "seconds": dict(seconds)}
    # A full disk, say, is why the process leaves: failing to say so must not hide it.
    with contextlib.suppress(OSError):
        write_atomically(directory / EXIT, json.dumps(document) + "\n", suffix=f"{process}.partial")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the directory for this process. The lock goes with the process, however that ends.

    Raises:
      RefusedError: another process trains in this directory, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / "lock").open("a+")
    except OSError as error:
        raise _unwritable(directory, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise RefusedError(
                f"another process (pid {holder}) trains in {directory}; stop it or take another --workdir"
            ) from None
        try:
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        except OSError as error:
            raise _unwritable(directory, error) from None
        yield


def _unwritable(directory: Path, error: OSError) -> RefusedError:
    fix = "free some space or take another --workdir" if error.errno == errno.ENOSPC else "take another --workdir"
    return RefusedError(f"cannot write to the run directory {directory}: {error.strerror or error}; {fix}")
