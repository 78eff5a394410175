"""Report of a process that hangs: the stacks of its threads, and its exit record. Nothing here waits without a limit.

This module imports nothing that takes time, because imports may be what hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from t5x_like.errors import EXIT_RESUMABLE
from t5x_like.trainer.exit_timer import exit_after
from t5x_like.utils.sanitize import say

GRACE_SECONDS = 60.0
"""Time after a limit after which the C library ends a process whose threads do not run Python any more."""
_DUMP_SECONDS = 5.0
"""Time for the C library to print the stacks before the process ends."""
_WRITE_SECONDS = 10.0
"""Limit of each access to the run directory: its storage may be what hangs."""


def stacks_name(process: int | str) -> str:
    """Return the name of the file in the run directory with the stacks of a process that hung."""
    return f"stacks.{process}.txt"


def report_hang(message: str, stacks: Path, record: Callable[[str], None]) -> None:
    """Write the stacks to standard error and to a file, and record the message as the reason of the exit."""
    dump_stacks(message, stacks)
    within_limit(lambda: record(message))


def dump_stacks(message: str, stacks: Path | None) -> None:
    """Write a message and the stacks of all threads to standard error and to a file, if there is one; a failure is
    ignored."""
    with contextlib.suppress(Exception):
        say(f"t5x-like: {message}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
    if stacks is not None:
        within_limit(lambda: _write(message, stacks))


def end_later(seconds: float | None) -> None:
    """Let the C library print the stacks and end the process with EXIT_RESUMABLE after `seconds`; None cancels this.

    A thread that holds the interpreter's lock forever stops every watchdog written in Python. Where the C library has
    no such timer, the exit code is that of `faulthandler`, 1.
    """
    # Under a test runner, standard error may not be a file.
    with contextlib.suppress(Exception):
        has_timer = False
        with contextlib.suppress(OSError, AttributeError):
            has_timer = exit_after(None if seconds is None else seconds + _DUMP_SECONDS, EXIT_RESUMABLE)
        if seconds is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(seconds, exit=not has_timer)


def _write(message: str, stacks: Path) -> None:
    stacks.parent.mkdir(parents=True, exist_ok=True)
    with stacks.open("w") as file:
        say(message, file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)


def within_limit(action: Callable[[], object]) -> None:
    """Run an action that may hang, for at most 10 s; a failure is ignored."""

    def attempt() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_WRITE_SECONDS)
