"""Locks of files between processes. The operating system releases a lock when the process that holds it ends."""

from __future__ import annotations

import fcntl
from typing import IO, Any

from t5x_like.errors import SafetyError


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file for this process.

    Args:
      file: The file; closing it releases the lock.
      wait: Wait for another process that holds the lock.

    Returns:
      False if another process holds the lock, which cannot be if `wait` is True.

    Raises:
      SafetyError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        raise SafetyError(
            f"{file.name}: found a file system that cannot lock files ({error.strerror}), expected one that can, so "
            "that two processes do not write the same files; use a directory on another file system, or mount this "
            "one with locks"
        ) from None
    return True
