"""Limits of a process before its run is open (imports, the first use of devices) and after it is closed.

In between, the watchdog follows the clock of the run.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from t5x_like.errors import EXIT_RESUMABLE
from t5x_like.trainer.stacks import GRACE_SECONDS, end_later, report_hang, stacks_name


class ProcessLimit:
    """Timer that ends the process with EXIT_RESUMABLE and its stacks."""

    def __init__(self, workdir: Path, record: Callable[[str], None]) -> None:
        """
        Args:
          workdir: The run directory.
          record: Called with the reason before the process ends.
        """
        # The index of the process is not known yet, and several hosts may use the same process ids.
        self._stacks = workdir / stacks_name(f"{socket.gethostname()}.{os.getpid()}")
        self._record = record
        self._timer: threading.Timer | None = None

    def set(self, what: str, seconds: float | None) -> None:
        """Begin to count anew.

        Args:
          what: What is limited, for the message.
          seconds: Limit; None: there is none from now on.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            end_later(None)
        if seconds is not None:
            self._timer = threading.Timer(seconds, self._end, (what, seconds))
            self._timer.daemon = True
            self._timer.start()
            end_later(seconds + GRACE_SECONDS)

    def _end(self, what: str, seconds: float) -> None:
        message = (
            f"the {what} takes longer than {seconds:g} seconds, its limit (`timeouts.start`); the stacks of all "
            f"threads are in {self._stacks}"
        )
        report_hang(message, self._stacks, self._record)
        # An import of the module could wait for the thread that hangs.
        startup = sys.modules.get("t5x_like.distributed.startup")
        if startup is not None and hasattr(startup, "announce_exit"):
            startup.announce_exit(EXIT_RESUMABLE)
        os._exit(EXIT_RESUMABLE)
