"""Restarts: runs a command again after exit codes with which the same command resumes.

`RestartLoop` is the rule, for every launcher that has no scheduler to restart its processes. On TPU VMs this module
runs the process of a worker:

    python -m t5x_like.launching.restart_loop --max-restarts 10 --restart-on 42 134 -- COMMAND ...

SIGTERM and SIGINT are forwarded to the command, which is then not restarted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from t5x_like.errors import EXIT_REFUSED, EXIT_RESUMABLE, RESTART_CODES

RESTART_DELAY_SECONDS = 10.0
"""Delay before a restart, so that the processes on other machines have noticed the end too."""
MAX_DELAY_SECONDS = 300.0
"""Longest delay: each run shorter than STABLE_SECONDS doubles the delay before the next one."""
STABLE_SECONDS = 600.0
KILL_SECONDS = 60.0
"""Time after which a process that has called exit and is still there is killed, and one that was killed is given up: a
thread of it waits in the kernel, usually for a disk that does not answer."""
_POLL_SECONDS = 1.0


class RestartLoop:
    """Repeats a run until it succeeds, ends with a code after which a restart cannot help, or is asked to stop.

    A run that makes no progress ends by itself with a code that is not restarted (`trainer/crash_loop.py`).
    """

    def __init__(
        self, *, max_restarts: int, restart_codes: Sequence[int], seconds: float, report: Callable[[str], None]
    ) -> None:
        """
        Args:
          max_restarts: Maximum number of restarts.
          restart_codes: Exit codes after which the run is started again.
          seconds: Delay before the first restart.
          report: Called with a line for the user before each restart.
        """
        self._max_restarts = max_restarts
        self._restart_codes = frozenset(restart_codes)
        self._seconds = seconds
        self._report = report
        self.is_stopped = False

    def stop(self) -> None:
        """Start nothing more; the run in progress is not ended."""
        self.is_stopped = True

    def run(self, once: Callable[[], int]) -> int:
        """Call `once` until no restart is due, and return the exit code of its last call."""
        restarts = short_runs = 0
        while True:
            began = time.monotonic()
            code = once()
            if code not in self._restart_codes or restarts >= self._max_restarts or self.is_stopped:
                return code
            restarts += 1
            self._report(f"exit code {code}, restart {restarts} of {self._max_restarts}")
            short_runs = short_runs + 1 if time.monotonic() - began < STABLE_SECONDS else 0
            self._wait(min(self._seconds * 2 ** max(short_runs - 1, 0), MAX_DELAY_SECONDS))
            if self.is_stopped:
                return code

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.is_stopped:
            time.sleep(0.1)


@contextlib.contextmanager
def forwarded_signals(forward: Callable[[int], None]) -> Iterator[None]:
    """Call `forward` with the number of each SIGTERM and SIGINT within the context, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda received, _: forward(received)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Supervisor:
    """Runs one command with restarts."""

    def __init__(self, command: Sequence[str], *, max_restarts: int, restart_codes: Sequence[int], seconds: float):
        self._command = list(command)
        self._loop = RestartLoop(
            max_restarts=max_restarts, restart_codes=restart_codes, seconds=seconds, report=_report
        )
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def is_stopped(self) -> bool:
        """Return whether a signal has asked for the end of the command."""
        return self._loop.is_stopped

    def run(self) -> int:
        """Run the command and return the exit code of its last run; 128 + N for signal N."""
        with forwarded_signals(self.stop):
            return self._loop.run(self._once)

    def _once(self) -> int:
        # In its own session, Ctrl-C reaches the command only through `stop`, and not a second time from the terminal.
        self._child = subprocess.Popen(self._command, start_new_session=True)
        if self._loop.is_stopped:
            self._child.terminate()
        code = self._wait(self._child)
        self._child = None
        return 128 - code if code < 0 else code

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        """Return the exit code of the command, which runs as long as it takes; EXIT_RESUMABLE if it cannot end."""
        half_ended: float | None = None
        is_killed = False
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(timeout=_POLL_SECONDS)
            if not is_ending(child.pid):
                half_ended = None
                continue
            half_ended = half_ended or time.monotonic()
            if is_killed and time.monotonic() > half_ended + 2 * KILL_SECONDS:
                # It still holds the devices: another start beside it would fail.
                self._loop.stop()
                _report(f"process {child.pid} cannot be killed; restart this machine, and run the same command again")
                return EXIT_RESUMABLE
            if not is_killed and time.monotonic() > half_ended + KILL_SECONDS:
                _report(f"killing process {child.pid}, which has ended but for a thread")
                is_killed = True
                self._kill(child)

    @staticmethod
    def _kill(child: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)

    def stop(self, number: int) -> None:
        """Begin no further run of the command, and send the signal to the one in progress."""
        self._loop.stop()
        if self._child is not None:
            self._child.send_signal(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m t5x_like.launching.restart_loop", description=__doc__)
    parser.add_argument("--max-restarts", type=int, default=10, metavar="N")
    parser.add_argument("--restart-on", type=int, nargs="*", default=list(RESTART_CODES), metavar="CODE")
    parser.add_argument("--restart-delay", type=float, default=RESTART_DELAY_SECONDS, metavar="S")
    parser.add_argument(
        "--pid-file", type=Path, metavar="FILE", help="written at the start; refuse to start if its process is running"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args(argv)
    if options.pid_file is not None:
        if _is_running(options.pid_file):
            _report(f"{options.pid_file}: the process of this file is still running; stop it first")
            return EXIT_REFUSED
        options.pid_file.write_text(f"{os.getpid()}\n")
    code = Supervisor(
        options.command,
        max_restarts=options.max_restarts,
        restart_codes=options.restart_on,
        seconds=options.restart_delay,
    ).run()
    _report(f"exit code {code}")
    return code


def process_state(pid: int) -> str | None:
    """Return the state of the first thread of a process, as `ps` shows it; None if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def is_ending(pid: int) -> bool:
    """Return whether a process has called exit or was killed, but has a thread that has not ended.

    Its exit code is not available before the last thread ends.
    """
    if process_state(pid) == "Z":
        return True
    # The first thread is the one that has not ended. To end a process, Linux sends SIGKILL to each of its threads.
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    pending = next((line.split()[1] for line in status.splitlines() if line.startswith("SigPnd:")), "0")
    return bool(int(pending, 16) & 1 << (signal.SIGKILL - 1))


def _is_running(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


def _report(message: str) -> None:
    print(f"restart_loop: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
