"""Set-up of Python's logging: log.txt in the run directory, warnings on the console."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from rich.text import Text

from t5x_like.utils.console import Console
from t5x_like.utils.sanitize import VisibleFormatter

PACKAGE = "t5x_like"
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


class _ConsoleHandler(logging.Handler):
    """Handler that prints above the live progress line, which uses the same console."""

    def __init__(self, console: Console):
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            self._console.print(Text(text, style=_STYLES.get(record.levelno, "")), soft_wrap=True)
        except Exception:
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """Handler of the log file. On a full disk it loses messages, without an error that would hide the run's own."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing: logging prints a traceback for each message otherwise."""

    def close(self) -> None:
        # Closing flushes what could not be written, and raises the error of the disk again.
        with contextlib.suppress(OSError):
            super().close()


def _is_own_or_warning(record: logging.LogRecord) -> bool:
    is_own = record.name == PACKAGE or record.name.startswith(PACKAGE + ".")
    return is_own or record.levelno >= logging.WARNING


@contextlib.contextmanager
def logging_to(path: Path | None, console: Console) -> Iterator[None]:
    """Write this package's messages from INFO on and all warnings to `path` within the context.

    Warnings are also written to `console`.

    Args:
      path: File to append to; None: no file.
      console: Console of the run.

    Raises:
      OSError: the file cannot be opened.
    """
    handlers: list[logging.Handler] = [_ConsoleHandler(console)]
    handlers[0].setFormatter(VisibleFormatter("%(levelname)s %(name)s: %(message)s"))
    if path is not None:
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(VisibleFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        file.addFilter(_is_own_or_warning)
        handlers.append(file)
    root, package = logging.getLogger(), logging.getLogger(PACKAGE)
    level = package.level
    package.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        logging.captureWarnings(False)
        package.setLevel(level)
