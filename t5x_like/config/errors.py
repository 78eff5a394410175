"""Exit codes, and the errors that users see.

Every error a user can cause is a ``UserError``: one message that says what was found, what was expected and what to
do. The command line prints it without a traceback and leaves with its exit code; anything else is a defect of ours
and leaves with a traceback and ``EXIT_UNEXPECTED``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

EXIT_OK = 0
"""The job did what it was asked to do."""
EXIT_UNEXPECTED = 1
"""An exception that is not a ``UserError``: a traceback is printed."""
EXIT_USAGE = 2
"""Wrong usage, configuration or input; nothing was started and restarting cannot help."""
EXIT_REFUSED = 3
"""Refused for safety: another configuration or tokenizer, a corrupt checkpoint, no room on the disk."""
EXIT_RESUMABLE = 42
"""Stopped where the same command goes on: by SIGTERM or SIGINT after a committed save; or because a process hung, has
gone or did not come, from the last save."""
EXIT_INTERRUPTED = 130
"""Ctrl-C where no checkpoint is at stake: the shell's 128 + SIGINT."""
EXIT_BROKEN_PIPE = 141
"""The shell's 128 + SIGPIPE: whoever read the output has left."""
EXIT_ABORTED = 134
"""The shell's 128 + SIGABRT: JAX ends a process whose peer has gone."""
EXIT_KILLED = 137
"""128 + SIGKILL: out of memory, or the grace period was over."""
EXIT_TERMINATED = 143
"""128 + SIGTERM, before there was anything to save."""


@dataclasses.dataclass(frozen=True)
class ExitCode:
    """One way for a job to end.

    Attributes:
      code: Of the process; those of signals are 128 + the signal's number, as shells and schedulers have them.
      meaning: In a few words.
      restart: Whether the same command is to be run again.
    """

    code: int
    meaning: str
    restart: bool


EXIT_CODES = (
    ExitCode(EXIT_OK, "done", restart=False),
    ExitCode(EXIT_UNEXPECTED, "unexpected error, with a traceback", restart=False),
    ExitCode(EXIT_USAGE, "wrong usage, configuration or input", restart=False),
    ExitCode(EXIT_REFUSED, "refused for safety", restart=False),
    ExitCode(EXIT_RESUMABLE, "stopped, or left by another process: the same command goes on", restart=True),
    ExitCode(EXIT_INTERRUPTED, "Ctrl-C where nothing is at stake", restart=False),
    ExitCode(EXIT_BROKEN_PIPE, "the reader of the output has gone", restart=False),
    ExitCode(EXIT_ABORTED, "aborted: a peer or a device has gone", restart=True),
    ExitCode(EXIT_KILLED, "killed", restart=True),
    ExitCode(EXIT_TERMINATED, "terminated before there was anything to save", restart=True),
)
"""The table from which every launcher renders when it starts a job again. A code that is not here is no reason to."""

RESTART_CODES = tuple(entry.code for entry in EXIT_CODES if entry.restart)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration.

    Attributes:
      where: Dotted path of the field, for example ``data.inputs_length``.
      found: What stands there.
      expected: What would be accepted.
      fix: What the user can do about it; may be empty where ``expected`` says it all.
    """

    where: str
    found: str
    expected: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: found {self.found}, expected {self.expected}"
        return f"{text}; {self.fix}" if self.fix else text


class UserError(Exception):
    """Something the user can mend. ``exit_code`` is what the process returns."""

    exit_code = EXIT_USAGE


class ConfigError(UserError):
    """A configuration with one or more problems, all of them listed."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"the configuration has {count}:\n{lines}")


def reader_has_gone(error: BaseException) -> bool:
    """Whether a closed pipe has ended a command; rich makes an exit with 1 of it."""
    found = error.__context__ if isinstance(error, SystemExit) else error
    return isinstance(found, BrokenPipeError)


class DataError(UserError):
    """Input data that cannot be used: unreadable, empty, of another shape than stated."""


class RefusedError(UserError):
    """Going on would lose or mix up something, so nothing was done."""

    exit_code = EXIT_REFUSED
