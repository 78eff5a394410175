"""Runs a command and runs it again after exits that can be resumed: where no scheduler does, on TPU VMs.

    python -m t5x_like.launching.supervise --max-restarts 10 --restart-on 42 134 -- COMMAND ...

SIGTERM and SIGINT are handed on to the command, after whose end it is not started again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from t5x_like.config.errors import EXIT_REFUSED, RESTART_CODES

SECONDS_BETWEEN = 10.0
"""So that the processes of other machines have seen the end too."""


class Supervisor:
    """One command, its restarts, and whether a signal has ended them."""

    def __init__(self, command: Sequence[str], *, max_restarts: int, restart_codes: Sequence[int], seconds: float):
        self._command = list(command)
        self._max_restarts = max_restarts
        self._restart_codes = frozenset(restart_codes)
        self._seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self) -> int:
        """Returns the exit code of the last run; 128 + N for signal N."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        restarts = 0
        while True:
            code = self._once()
            again = code in self._restart_codes and restarts < self._max_restarts and not self._stopped
            _say(f"exit code {code}" + (f", restart {restarts + 1} of {self._max_restarts}" if again else ""))
            if not again:
                return code
            restarts += 1
            deadline = time.monotonic() + self._seconds
            while time.monotonic() < deadline and not self._stopped:
                time.sleep(0.1)
            if self._stopped:
                return code

    def _once(self) -> int:
        # In a group of its own: Ctrl-C reaches it by `_stop` alone, not a second time by the terminal.
        self._child = subprocess.Popen(self._command, start_new_session=True)
        if self._stopped:
            self._child.terminate()
        code = self._child.wait()
        self._child = None
        return 128 - code if code < 0 else code

    def _stop(self, number: int, _: FrameType | None) -> None:
        self._stopped = True
        if self._child is not None:
            self._child.send_signal(number)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m t5x_like.launching.supervise", description=__doc__)
    parser.add_argument("--max-restarts", type=int, default=10, metavar="N")
    parser.add_argument("--restart-on", type=int, nargs="*", default=list(RESTART_CODES), metavar="CODE")
    parser.add_argument("--seconds-between", type=float, default=SECONDS_BETWEEN, metavar="S")
    parser.add_argument("--pid-file", type=Path, metavar="FILE", help="another one that runs is refused")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args(argv)
    if options.pid_file is not None:
        if _runs(options.pid_file):
            _say(f"{options.pid_file}: its process still runs; stop it first")
            return EXIT_REFUSED
        options.pid_file.write_text(f"{os.getpid()}\n")
    return Supervisor(
        options.command,
        max_restarts=options.max_restarts,
        restart_codes=options.restart_on,
        seconds=options.seconds_between,
    ).run()


def _runs(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


def _say(message: str) -> None:
    print(f"supervise: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
