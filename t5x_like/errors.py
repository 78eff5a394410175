"""Exit codes, and errors that are shown to the user.

Every error that a user can cause is a `UserError`: one message that states what was found, what was expected and how
to fix it. The command line prints it without a traceback and exits with its exit code. Any other exception is a defect
of this package; it is printed with a traceback, and the exit code is `EXIT_UNEXPECTED`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

EXIT_OK = 0
"""The command succeeded."""
EXIT_UNEXPECTED = 1
"""An exception that is not a `UserError`: a traceback is printed."""
EXIT_USAGE = 2
"""Wrong usage, configuration or input; nothing was started, and restarting cannot help."""
EXIT_REFUSED = 3
"""Refused for safety: another configuration or tokenizer, a corrupt checkpoint, a full disk, repeated starts without a
new checkpoint."""
EXIT_RESUMABLE = 42
"""Stopped, and the same command resumes: by SIGTERM or SIGINT, from the save that was committed then; or because a
process hung, terminated or did not connect, from the last save."""
EXIT_INTERRUPTED = 130
"""Ctrl-C while there is no checkpoint to save: the shell's 128 + SIGINT."""
EXIT_BROKEN_PIPE = 141
"""The shell's 128 + SIGPIPE: the reader of the output closed the pipe."""
EXIT_ABORTED = 134
"""The shell's 128 + SIGABRT: JAX aborts a process when another process of the run terminates."""
EXIT_KILLED = 137
"""128 + SIGKILL: out of memory, or the end of the grace period."""
EXIT_TERMINATED = 143
"""128 + SIGTERM, before there was anything to save."""


@dataclasses.dataclass(frozen=True)
class ExitCode:
    """Meaning of an exit code.

    Attributes:
      code: Exit code of the process; for signals 128 + the signal's number, as in shells and schedulers.
      meaning: Short description.
      restart: True if the same command should be run again.
    """

    code: int
    meaning: str
    restart: bool


EXIT_CODES = (
    ExitCode(EXIT_OK, "done", restart=False),
    ExitCode(EXIT_UNEXPECTED, "unexpected error, with a traceback", restart=False),
    ExitCode(EXIT_USAGE, "wrong usage, configuration or input", restart=False),
    ExitCode(EXIT_REFUSED, "refused for safety", restart=False),
    ExitCode(EXIT_RESUMABLE, "stopped, or another process failed: the same command resumes", restart=True),
    ExitCode(EXIT_INTERRUPTED, "Ctrl-C with nothing to save", restart=False),
    ExitCode(EXIT_BROKEN_PIPE, "the reader of the output closed the pipe", restart=False),
    ExitCode(EXIT_ABORTED, "aborted: another process or a device failed", restart=True),
    ExitCode(EXIT_KILLED, "killed", restart=True),
    ExitCode(EXIT_TERMINATED, "terminated before there was anything to save", restart=True),
)
"""Exit codes from which launchers derive their restart rules. Codes that are not listed are not restarted."""

RESTART_CODES = tuple(entry.code for entry in EXIT_CODES if entry.restart)


@dataclasses.dataclass(frozen=True)
class ConfigProblem:
    """Problem of a configuration.

    Attributes:
      where: Dotted path of the field, for example `data.inputs_length`.
      found: The value, or a description of it.
      expected: Description of valid values.
      fix: Advice for the user; empty if `expected` is sufficient.
    """

    where: str
    found: str
    expected: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: found {self.found}, expected {self.expected}"
        return f"{text}; {self.fix}" if self.fix else text


class UserError(Exception):
    """Error that the user can fix. `exit_code` is the exit code of the process."""

    exit_code = EXIT_USAGE


class ConfigError(UserError):
    """Configuration or arguments with one or more problems, all of which are listed.

    Problems that differ in their place only, such as dimensions of many parameters, are one line.
    """

    def __init__(self, problems: Sequence[ConfigProblem]):
        self.problems = tuple(problems)
        places: dict[ConfigProblem, list[str]] = {}
        for problem in self.problems:
            places.setdefault(dataclasses.replace(problem, where=""), []).append(problem.where)
        lines = [str(dataclasses.replace(problem, where=_places(where))) for problem, where in places.items()]
        one_line = lines[0] if len(lines) == 1 else f"found {len(self.problems)} problems:"
        super().__init__("\n  - ".join([one_line, *(lines if len(lines) > 1 else ())]))


def _places(where: Sequence[str]) -> str:
    """Return the places of a problem as a text that names at most three of them."""
    if len(where) > 3:
        return f"{', '.join(where[:2])} and {len(where) - 2} others"
    return " and ".join([", ".join(where[:-1]), where[-1]] if len(where) > 1 else where)


PIPE_CLOSED = "the reader of the output closed the pipe"
"""Reason in exit.json of a command whose output was closed by its reader (`is_broken_pipe`)."""


def is_broken_pipe(error: BaseException) -> bool:
    """Return True if a closed pipe ended the command; rich turns the error into an exit with code 1."""
    found = error.__context__ if isinstance(error, SystemExit) else error
    return isinstance(found, BrokenPipeError)


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a process that ends with `error`."""
    if isinstance(error, UserError):
        return error.exit_code
    if is_broken_pipe(error):
        return EXIT_BROKEN_PIPE
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_UNEXPECTED


class DataError(UserError):
    """Unusable input data: unreadable, empty, or of an unexpected shape."""


class SafetyError(UserError):
    """Refusal: continuing would lose or mix up data, so nothing was changed."""

    exit_code = EXIT_REFUSED
