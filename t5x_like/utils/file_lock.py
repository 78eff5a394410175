"""Locks of files between processes. The operating system releases a lock when the process that holds it ends."""

from __future__ import annotations

import fcntl
import time
from typing import IO, Any

from t5x_like.errors import SafetyError

_POLL_SECONDS = 0.1


def lock(file: IO[Any]) -> bool:
    """Lock an open file for this process, if no other process holds the lock; return whether it does now.

    Closing the file releases the lock.

    Raises:
      SafetyError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise SafetyError(
            f"{file.name}: found a file system that cannot lock files ({error.strerror}), expected one that can, so "
            "that two processes do not write the same files; use a directory on another file system, or mount this "
            "one with locks"
        ) from None
    return True


def lock_within(file: IO[Any], seconds: float) -> None:
    """Lock an open file, and wait for another process that holds the lock for a short time.

    Raises:
      SafetyError: the other process holds it for longer than `seconds`, or the file system has no locks.
    """
    deadline = time.monotonic() + seconds
    while not lock(file):
        if time.monotonic() > deadline:
            raise SafetyError(
                f"{file.name}: found another process that holds the lock for more than {seconds:g} s, expected less "
                "than a second; end it (`fuser` shows its id), and run the same command again"
            )
        time.sleep(_POLL_SECONDS)
