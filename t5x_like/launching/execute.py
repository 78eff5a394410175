"""Writes what was rendered, and runs it where the user asks for that."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
from collections.abc import Callable

from t5x_like.config import EXIT_OK, ConfigError, Problem, UserError
from t5x_like.launching.rendering import Rendering, Step, commands_text

COMMANDS = "commands.sh"
_SECONDS_BETWEEN_LOOKS = 30.0


def write(rendering: Rendering) -> None:
    """Writes the files into the rendering's directory, and beside them the commands, to be read and copied.

    Raises:
      UserError: the directory cannot be written.
    """
    files = {**rendering.files, COMMANDS: commands_text(rendering)}
    try:
        rendering.directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (rendering.directory / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or rendering.directory}: cannot be written: {error.strerror}") from None


def execute(rendering: Rendering, say: Callable[[str], None]) -> int:
    """Writes the files and runs the commands of the stage `launch` in their order.

    Returns:
      0, or the exit code of the first command that failed, after which none is run.

    Raises:
      ConfigError: a program is not installed; nothing was run.
      UserError: what was waited for cannot come any more.
    """
    missing = [program for program in rendering.programs if shutil.which(program) is None]
    if missing:
        expected = "it on the PATH of this machine"
        fix = "without --execute the commands are printed, to be run where it is"
        raise ConfigError([Problem("--execute", f"no {program}", expected, fix) for program in missing])
    write(rendering)
    for step in rendering.steps:
        if step.stage != "launch":
            continue
        say(f"{step.purpose}: {shlex.join(step.argv)}")
        code = _wait(step, say) if step.until is not None else subprocess.run(step.argv).returncode
        if code != EXIT_OK:
            say(f"exit code {code}: what comes after it was not run")
            return 128 - code if code < 0 else code
    return EXIT_OK


def _wait(step: Step, say: Callable[[str], None]) -> int:
    seen = None
    while True:
        result = subprocess.run(step.argv, stdout=subprocess.PIPE, text=True)
        state = result.stdout.strip()
        if result.returncode != EXIT_OK or state == step.until:
            return result.returncode
        if state in step.never:
            raise UserError(f"{step.purpose}: found {state}, expected {step.until}; {shlex.join(step.argv)} says more")
        if state != seen:
            say(f"{step.purpose}: {state or 'nothing yet'}")
            seen = state
        time.sleep(_SECONDS_BETWEEN_LOOKS)
