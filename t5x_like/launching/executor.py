"""Executor: writes rendered files and runs the rendered commands."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
from collections.abc import Callable

from t5x_like.errors import EXIT_OK, ConfigError, ConfigProblem, UserError
from t5x_like.launching.rendering import Rendering, Step, commands_text

COMMANDS = "commands.sh"
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
      UserError: A state that was waited for can no longer be reached.
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
        code = _wait(step, report) if step.until is not None else subprocess.run(step.argv).returncode
        if code != EXIT_OK:
            report(f"exit code {code}: the commands after it were not run")
            return 128 - code if code < 0 else code
    return EXIT_OK


def _wait(step: Step, report: Callable[[str], None]) -> int:
    last_state = None
    while True:
        result = subprocess.run(step.argv, stdout=subprocess.PIPE, text=True)
        state = result.stdout.strip()
        if result.returncode != EXIT_OK or state == step.until:
            return result.returncode
        if state in step.never:
            raise UserError(f"{step.purpose}: found {state}, expected {step.until}; see {shlex.join(step.argv)}")
        if state != last_state:
            report(f"{step.purpose}: {state or 'no state yet'}")
            last_state = state
        time.sleep(_POLL_SECONDS)
