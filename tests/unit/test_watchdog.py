"""A process without a sign of life ends itself, and says where it hung."""

from __future__ import annotations

import subprocess
import sys

from t5x_like.config import EXIT_RESUMABLE

SCRIPT = """
import threading, time
from t5x_like.watchdog import Watchdog
watchdog = Watchdog(1.5, lambda message: print("last words:", message, flush=True), patience={patience})
def beats():
    for _ in range(4):
        time.sleep(0.1)
        watchdog.beat()
def hangs_here():
    threading.Event().wait()
beats()
print("alive", flush=True)
{end}
"""


def run(end: str, patience: float = 1.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT.format(end=end, patience=patience)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_hung_process_ends_with_its_stacks_and_a_code_that_restarts_it() -> None:
    result = run("hangs_here()")
    assert result.returncode == EXIT_RESUMABLE
    assert "alive" in result.stdout and "last words: no sign of life for 1.5 seconds" in result.stdout
    assert "in hangs_here" in result.stderr


def test_a_closed_one_ends_nothing_and_patience_is_for_one_beat() -> None:
    closed = run("watchdog.close(); time.sleep(2.0)", patience=10)
    assert (closed.returncode, closed.stdout) == (0, "alive\n")
