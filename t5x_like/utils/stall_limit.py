"""Limit of the time without progress, outside of training, whose stages have limits of their own (`timeouts`).

What finishes a piece of work (a batch, a file, a request to a storage, a line of output) calls `progress`. A command is
ended when nothing has called it for `stall_seconds()`, and waits in it are bounded by the same number. The limit of a
wait that is not part of any work, such as that for a thread to end, is `CLEANUP_SECONDS`.
"""

from __future__ import annotations

import subprocess
import threading
import time

STALL_SECONDS = 7200.0
"""Default of `--stall-timeout`."""
CLEANUP_SECONDS = 60.0
"""Limit of the wait for a thread or a process that was told to end. It is abandoned afterwards."""
_REGULAR_THREADS = ("lease", "upload")
"""Names of threads whose requests at regular intervals are no progress of a command."""

_limit = STALL_SECONDS
_last = time.monotonic()


def set_stall_seconds(seconds: float) -> None:
    """Set the limit of this process in seconds, and begin to count."""
    global _limit
    _limit = seconds
    progress()


def stall_seconds() -> float:
    """Return the limit in seconds."""
    return _limit


def progress() -> None:
    """Note that the process has made progress. Calls in the threads of `_REGULAR_THREADS` have no effect."""
    global _last
    if threading.current_thread().name not in _REGULAR_THREADS:
        _last = time.monotonic()


def seconds_without_progress() -> float:
    """Return the seconds since the last progress of this process."""
    return time.monotonic() - _last


def end_thread(thread: threading.Thread, seconds: float = CLEANUP_SECONDS) -> bool:
    """Wait for a daemon thread that was told to end; return False, and abandon it, if it does not."""
    thread.join(seconds)
    return not thread.is_alive()


def end_process(process: subprocess.Popen[bytes], seconds: float = CLEANUP_SECONDS) -> bool:
    """Kill a process and wait for its end; return False, and abandon it, if it waits in the kernel."""
    process.kill()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
