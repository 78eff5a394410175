"""Checkpoint watcher: evaluates the checkpoints of a run as they appear, each once, in a separate process."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from t5x_like import run_directory
from t5x_like.errors import EXIT_OK, SafetyError, UserError
from t5x_like.storage import lease as leases
from t5x_like.storage.mirror import mirror_of
from t5x_like.utils.file_lock import lock
from t5x_like.utils.json_reader import read_json
from t5x_like.utils.stall_limit import progress

POLL_SECONDS = 5.0
LOCK = "follow.lock"
"""File, or key of a lease, of the process that follows a run."""
_LOG = logging.getLogger(__name__)


def watch_checkpoints(
    run_dir: Path,
    *,
    steps: Callable[[], list[int]],
    is_done: Callable[[int], bool],
    evaluate: Callable[[int], None],
    refresh: Callable[[], object] = lambda: None,
    timeout: float | None = None,
    poll_seconds: float = POLL_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Evaluate the steps of `steps` for which `is_done` is False, the oldest first, until the run has finished.

    When `evaluate` returns, the result must be on the disk: the watcher may be killed at any moment and started again.
    A checkpoint that is deleted before it has been evaluated is skipped with a warning. A checkpoint that exists but
    cannot be read is reported once, and not tried again by this process.

    Args:
      refresh: Called before the state of the run is read.
      timeout: Return after this number of seconds without a new checkpoint; None: wait for the end of the run.

    Returns:
      The number of evaluated checkpoints.

    Raises:
      SafetyError: another process follows this run.
    """
    evaluated = 0
    failed: set[int] = set()
    waiting_since = clock()
    with _exclusive_lock(run_dir):
        while True:
            refresh()
            # Read before the steps are listed, so that the list contains all steps of a finished run.
            finished = has_finished(run_dir)
            pending = [step for step in steps() if step not in failed and not is_done(step)]
            if pending:
                try:
                    evaluate(pending[0])
                    evaluated += 1
                except (UserError, OSError) as error:
                    if pending[0] in steps():
                        failed.add(pending[0])
                        _LOG.error("step %d cannot be evaluated: %s", pending[0], error)
                    else:
                        _LOG.warning("step %d was deleted before it was evaluated", pending[0])
                waiting_since = clock()
                continue
            if finished:
                return evaluated
            if timeout is not None and clock() - waiting_since >= timeout:
                return evaluated
            progress()
            sleep(poll_seconds)


def wait_for(exists: Callable[[], bool], timeout: float | None, what: str) -> None:
    """Wait for a run that has not begun yet.

    Raises:
      SafetyError: the run has not begun after `timeout` seconds.
    """
    begun = time.monotonic()
    while not exists():
        if timeout is not None and time.monotonic() - begun >= timeout:
            raise SafetyError(f"{what}: no run has appeared within {timeout:g} seconds")
        progress()
        time.sleep(min(POLL_SECONDS, 1.0))


def has_finished(run_dir: Path) -> bool:
    """Return True if exit.json records that the run has reached its last step."""
    try:
        document = read_json(run_dir / run_directory.EXIT)
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("code") == EXIT_OK


@contextlib.contextmanager
def _exclusive_lock(run_dir: Path) -> Iterator[None]:
    if (mirror := mirror_of(run_dir)) is not None:
        try:
            with leases.lease(mirror.url / LOCK, lambda by: None, refuse=True, patience=leases.EXPIRY_SECONDS):
                yield
        except leases.HeldError as error:
            raise SafetyError(f"{error}: it follows {mirror.url}; stop it first") from None
        return
    with (run_dir / LOCK).open("a") as file:
        if not lock(file):
            raise SafetyError(f"another process follows {run_dir}; stop it first")
        yield
