"""Lock of a token store: one process at a time makes it, or adds a plan to it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from t5x_like.data.store.token_store import partial_of
from t5x_like.errors import SafetyError
from t5x_like.storage.lease import lease
from t5x_like.storage.locations import Location
from t5x_like.utils.file_lock import lock
from t5x_like.utils.stall_limit import progress, stall_seconds

_POLL_SECONDS = 1.0


@contextlib.contextmanager
def store_lock(path: Location, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a store, so that one process at a time makes it.

    The operating system releases the lock of a local store when the process dies. An object store has a lease.
    """
    if not isinstance(path, Path):
        key = path.with_name(path.name + ".lease")
        with lease(key, lambda by: report(f"{key}: another process ({by}) is preparing this store; waiting")):
            yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as file:
        if not lock(file):
            report(f"{path}: another process is preparing this store; waiting")
            _wait_for_lock(file, path)
        yield


def _wait_for_lock(file: IO[str], path: Path) -> None:
    """Wait for the lock of a store as long as the process that holds it writes files."""
    partial = partial_of(path)
    assert isinstance(partial, Path)
    newest, since = 0, time.monotonic()
    while not lock(file):
        # A store is made in its partial folder, and a packing plan is added to the complete one.
        found = max(last_change(partial), last_change(path))
        if found != newest:
            newest, since = found, time.monotonic()
            progress()
        elif time.monotonic() - since > stall_seconds():
            raise SafetyError(
                f"{path}: found another process that prepares this store and has written nothing for "
                f"{stall_seconds():g} s, the limit of --stall-timeout; end it (`fuser {file.name}` shows its id), and "
                "run the same command again"
            )
        time.sleep(_POLL_SECONDS)


def last_change(folder: Path) -> int:
    """Return the newest time of change of the files in a folder in nanoseconds, while they are written and removed."""
    newest = 0
    for path, _, names in os.walk(folder):  # It skips folders that are removed meanwhile.
        for name in names:
            with contextlib.suppress(OSError):
                newest = max(newest, os.stat(os.path.join(path, name)).st_mtime_ns)
    return newest
