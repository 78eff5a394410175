"""A process of its own that evaluates the checkpoints of a run as they appear, each once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from t5x_like import run_directory
from t5x_like.config import EXIT_OK, RefusedError, UserError

POLL_SECONDS = 5.0
_LOG = logging.getLogger(__name__)


def follow(
    run_dir: Path,
    *,
    steps: Callable[[], list[int]],
    is_done: Callable[[int], bool],
    evaluate: Callable[[int], None],
    timeout: float | None = None,
    poll_seconds: float = POLL_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Evaluates what `steps` lists and `is_done` denies, the oldest first, until the run has finished.

    That a step is done must be on the disk when `evaluate` returns: then this may be killed at any moment and started
    again. A checkpoint that is deleted before its turn, or while it is read, is passed over with a word; one that
    cannot be read although it is there is told once, and not tried again by this process.

    Args:
      timeout: Leave when there was nothing to do for so many seconds; None: wait for the run's end.

    Returns:
      How many checkpoints were evaluated.

    Raises:
      RefusedError: another process follows this run.
    """
    evaluated = 0
    failed: set[int] = set()
    waiting_since = clock()
    with _alone(run_dir):
        while True:
            # Read before the steps are listed: what was saved before the end is then among them.
            over = has_finished(run_dir)
            todo = [step for step in steps() if step not in failed and not is_done(step)]
            if todo:
                try:
                    evaluate(todo[0])
                    evaluated += 1
                except (UserError, OSError) as error:
                    if todo[0] in steps():
                        failed.add(todo[0])
                        _LOG.error("step %d cannot be evaluated: %s", todo[0], error)
                    else:
                        _LOG.warning("step %d was deleted before it was evaluated", todo[0])
                waiting_since = clock()
                continue
            if over:
                return evaluated
            if timeout is not None and clock() - waiting_since >= timeout:
                return evaluated
            sleep(poll_seconds)


def wait_for(is_there: Callable[[], bool], timeout: float | None, what: str) -> None:
    """Waits for a run that has not begun yet. Raises RefusedError where it does not in time."""
    begun = time.monotonic()
    while not is_there():
        if timeout is not None and time.monotonic() - begun >= timeout:
            raise RefusedError(f"{what}: there was nothing to follow for {timeout:g} seconds")
        time.sleep(min(POLL_SECONDS, 1.0))


def has_finished(run_dir: Path) -> bool:
    """Whether exit.json says that the run has reached its last step."""
    try:
        document = json.loads((run_dir / run_directory.EXIT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("code") == EXIT_OK


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    with (run_dir / "follow.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(f"another process follows {run_dir}; one is enough") from None
        yield
