"""Executor: writes rendered files and runs the rendered commands."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from t5x_like.errors import EXIT_OK, ConfigError, ConfigProblem, UserError
from t5x_like.launching.rendering import Rendering, Step, commands_text

COMMANDS = "commands.sh"
COMMAND_SECONDS = 7200.0
"""Limit of a command, which may copy files to all machines."""
STATE_SECONDS = 600.0
"""Limit of a command that asks for a state."""
_POLL_SECONDS = 30.0


def write(rendering: Rendering) -> None:
    """Write the files and a script with the commands into the rendering's directory.

    Raises:
      UserError: The directory cannot be written.
    """
    files = {**rendering.files, COMMANDS: commands_text(rendering)}
    try:
        rendering.directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (rendering.directory / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or rendering.directory}: cannot be written: {error.strerror}") from None


def execute(rendering: Rendering, report: Callable[[str], None]) -> int:
    """Write the files and run the commands of the stage `launch` in order.

    Args:
      rendering: The rendered files and commands.
      report: Called with a line for each command.

    Returns:
      0, or the exit code of the first command that failed; the commands after it are not run.

    Raises:
      ConfigError: A program is not installed; nothing was run.
      UserError: A state that was waited for can no longer be reached, or a command has not ended within its limit.
    """
    missing = [program for program in rendering.programs if shutil.which(program) is None]
    if missing:
        expected = "the program on the PATH of this machine"
        fix = "without --execute the commands are printed, so that they can be run on another machine"
        raise ConfigError([ConfigProblem("--execute", f"no {program}", expected, fix) for program in missing])
    write(rendering)
    for step in rendering.steps:
        if step.stage != "launch":
            continue
        report(f"{step.purpose}: {shlex.join(step.argv)}")
        code = _wait(step, report) if step.until is not None else run_within(step.argv, COMMAND_SECONDS).returncode
        if code != EXIT_OK:
            report(f"exit code {code}: the commands after it were not run")
            return 128 - code if code < 0 else code
    return EXIT_OK


def run_within(argv: Sequence[str], seconds: float, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as `subprocess.run` does.

    Raises:
      UserError: It has not ended after `seconds`, and was killed.
    """
    try:
        return subprocess.run(argv, text=True, timeout=seconds, **keywords)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{shlex.join(argv)}: found a command that runs for more than {seconds:g} s, expected it to end; it was "
            "killed. Check the network and the credentials with this command, and launch again"
        ) from None


def _wait(step: Step, report: Callable[[str], None]) -> int:
    last_state = None
    while True:
        result = run_within(step.argv, STATE_SECONDS, stdout=subprocess.PIPE)
        state = result.stdout.strip()
        if result.returncode != EXIT_OK or state == step.until:
            return result.returncode
        if state in step.never:
            raise UserError(f"{step.purpose}: found {state}, expected {step.until}; see {shlex.join(step.argv)}")
        if state != last_state:
            report(f"{step.purpose}: {state or 'no state yet'}")
            last_state = state
        time.sleep(_POLL_SECONDS)
