"""Watch of a command that is not a training run: ends it, with its stacks, when it makes no progress.

Waits that the program itself bounds raise their own errors before. What is left are calls that have no limit: reads of
a file system that does not answer, compilations, and results of a device whose peers have ended.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from t5x_like.errors import EXIT_RESUMABLE
from t5x_like.trainer.stacks import GRACE_SECONDS, dump_stacks, end_later
from t5x_like.utils.stall_limit import seconds_without_progress, stall_seconds

_MARGIN = 1.05
"""Factor of the limit, so that a wait with the same limit raises its error before."""


@contextlib.contextmanager
def ended_when_stalled() -> Iterator[None]:
    """End the process with EXIT_RESUMABLE if nothing within the context makes progress for `stall_seconds()`."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(min(1.0, stall_seconds() / 4)):
            left = _MARGIN * stall_seconds() - seconds_without_progress()
            end_later(max(left, 0.0) + GRACE_SECONDS)
            if left < 0:
                _end()
        end_later(None)

    thread = threading.Thread(target=watch, name="stall watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(2.0)


def _end() -> None:
    dump_stacks(
        f"found no progress for {stall_seconds():g} s, expected a batch, a file or a line of output; the stacks of all "
        "threads follow. If the work takes longer, increase --stall-timeout; otherwise the same command resumes",
        None,
    )
    # An import of the module could wait for the thread that hangs.
    startup = sys.modules.get("t5x_like.distributed.startup")
    if startup is not None and hasattr(startup, "announce_exit"):
        startup.announce_exit(EXIT_RESUMABLE)
    os._exit(EXIT_RESUMABLE)
