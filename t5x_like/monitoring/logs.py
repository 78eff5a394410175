"""Python's logging, set up in one place: log.txt in the run directory, warnings on the console."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from t5x_like.monitoring.text import visible

PACKAGE = "t5x_like"
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


class _ConsoleHandler(logging.Handler):
    """Prints above the live progress line, which uses the same console."""

    def __init__(self, console: Console):
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = visible(self.format(record))
            self._console.print(Text(text, style=_STYLES.get(record.levelno, "")), soft_wrap=True)
        except Exception:
            self.handleError(record)


def _ours_or_warning(record: logging.LogRecord) -> bool:
    ours = record.name == PACKAGE or record.name.startswith(PACKAGE + ".")
    return ours or record.levelno >= logging.WARNING


@contextlib.contextmanager
def logging_to(path: Path | None, console: Console) -> Iterator[None]:
    """Within: this package's messages from INFO on and everybody's warnings go to `path`, warnings to `console` too.

    Args:
      path: log.txt, appended to; None for no file.
      console: The console of the run.

    Raises:
      OSError: the file cannot be opened.
    """
    handlers: list[logging.Handler] = [_ConsoleHandler(console)]
    handlers[0].setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    if path is not None:
        file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        file.addFilter(_ours_or_warning)
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
