"""Supervisor of preemptible machines: requests them again when the provider has taken them away, until the run ends."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable

from t5x_like.errors import EXIT_OK, UserError
from t5x_like.launching.executor import COMMAND_SECONDS, STATE_SECONDS, execute, run_within
from t5x_like.launching.rendering import Recovery, Rendering

POLL_SECONDS = 60.0
MAX_FAILURES = 10
"""Number of failures in a row to ask for the state after which the supervisor gives up: the machines were deleted, or
the credentials have expired."""


def supervise(rendering: Rendering, recovery: Recovery, report: Callable[[str], None]) -> int:
    """Launch a run and launch it again on new machines whenever they are lost; return the exit code of the run.

    How often is limited by the run itself, which is refused after several starts without a new checkpoint.

    Raises:
      ConfigError, UserError: see `execute`; or the state of the machines cannot be asked for.
    """
    while True:
        code = execute(rendering, report)
        if code != EXIT_OK and _state(recovery) not in recovery.lost:
            return code
        ended = _wait(recovery, report)
        if ended is not None:
            report(f"the run has ended with exit code {ended}")
            return ended
        report(f"the machines were taken away; {shlex.join(recovery.remove)}")
        removed = run_within(recovery.remove, COMMAND_SECONDS)
        if removed.returncode != EXIT_OK:
            return removed.returncode


def _wait(recovery: Recovery, report: Callable[[str], None]) -> int | None:
    """Return the exit code of the run when it has ended, or None when its machines are lost."""
    failures = 0
    while True:
        state = _state(recovery)
        if state in recovery.lost:
            return None
        failures = failures + 1 if state is None else 0
        if failures >= MAX_FAILURES:
            raise UserError(f"the state of the machines is not known after {failures} tries: {recovery.state}")
        if state is not None and (code := _output(recovery.result)) is not None and code.isdecimal():
            return int(code)
        time.sleep(POLL_SECONDS)


def _state(recovery: Recovery) -> str | None:
    return _output(recovery.state)


def _output(argv: tuple[str, ...]) -> str | None:
    """Return the output of a command; None if it fails, or does not end within `STATE_SECONDS`."""
    try:
        result = run_within(argv, STATE_SECONDS, stdout=subprocess.PIPE)
    except UserError:
        return None
    return result.stdout.strip() if result.returncode == EXIT_OK else None
