"""Sanitization of untrusted text: file names, configurations, documents and predictions can contain terminal control
sequences. Everything that the program writes to a terminal or a log passes `visible`: plain lines by `say`, log records
by `VisibleFormatter`, and tables by `console.Console`."""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
from types import TracebackType
from typing import IO

from t5x_like.utils.stall_limit import progress

# C0 except tab and newline, DEL, C1, bidirectional overrides and isolates, line and paragraph separators, surrogates.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return `text` with every control character except tab and newline escaped, as in `\\x1b`."""

    def spell(match: re.Match[str]) -> str:
        code = ord(match.group())
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _CONTROL.sub(spell, text)


def say(text: object = "", *, file: IO[str] | None = None, end: str = "\n", flush: bool = False) -> None:
    """Print `text`, sanitized, to `file`, by default standard output. A line of output is progress."""
    progress()
    print(visible(str(text)), file=sys.stdout if file is None else file, end=end, flush=flush)


class VisibleFormatter(logging.Formatter):
    """Formatter of log records whose result, with the traceback, is sanitized."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def sanitize_tracebacks() -> None:
    """Sanitize what Python itself prints on standard error: the traceback of an exception that nothing catches, in this
    thread or another, and log records while no handler is set up."""

    def print_traceback(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        say("".join(traceback.format_exception(kind, error, trace)), file=sys.stderr, end="")

    sys.excepthook = print_traceback
    threading.excepthook = lambda args: print_traceback(args.exc_type, args.exc_value, args.exc_traceback)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(VisibleFormatter())
