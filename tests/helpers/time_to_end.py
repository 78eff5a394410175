"""Time that the processes of a run take to end after a fault that a restart does not cure."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

WITHIN_SECONDS = 60
"""Time in which all processes end."""


def ended(processes: Sequence[subprocess.Popen[str]]) -> tuple[list[str], float]:
    """Wait for processes, and return their outputs and the largest number of seconds that one needed.

    The time of a process begins when it names its place in the run. What it does before, to import libraries, depends
    on the load of the machine.
    """

    def output_and_seconds(process: subprocess.Popen[str]) -> tuple[str, float]:
        assert process.stdout is not None
        began, lines = None, []
        for line in process.stdout:
            lines.append(line)
            if began is None and line.startswith("launcher: "):
                began = time.monotonic()
        process.wait()
        assert began is not None, lines
        return "".join(lines), time.monotonic() - began

    with ThreadPoolExecutor(len(processes)) as pool:
        found = list(pool.map(output_and_seconds, processes))
    return [output for output, _ in found], max(seconds for _, seconds in found)
