"""Lease of a key in an object store, which has no locks: its holder renews it, and one that is not renewed expires."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from t5x_like.errors import SafetyError
from t5x_like.storage import locations
from t5x_like.storage.locations import Url
from t5x_like.utils.json_reader import parse_json
from t5x_like.utils.sanitize import visible
from t5x_like.utils.stall_limit import end_thread, progress

RENEWAL_SECONDS = 10.0
EXPIRY_SECONDS = 60.0
"""Time without a renewal after which another process takes the lease. Each process measures it by its own clock, from
the last change that it has seen, so clocks that differ do no harm."""
_POLL_SECONDS = 2.0
_RETRY_SECONDS = 0.1
_LOG = logging.getLogger(__name__)


class HeldError(SafetyError):
    """Another process holds the lease."""


class Lease:
    """A lease that this process holds. Every write names the generation of the key that it replaces."""

    def __init__(self, key: Url, secret: str, generation: bytes) -> None:
        self._key, self._secret, self._generation = key, secret, generation
        self._is_lost = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def require_held(self) -> None:
        """Raise SafetyError if another process has taken the lease, for example because this one was suspended."""
        if not self._is_lost:
            self._is_lost = locations.read_key(self._key)[1] != self._generation and not self._was_renewed()
        if self._is_lost:
            raise SafetyError(
                f"{self._key}: another process has taken the lease, because this one did not renew it for "
                f"{EXPIRY_SECONDS:g} seconds; this process stops, and nothing more is written"
            )

    def release(self) -> None:
        """Release the lease, if this process still holds it."""
        self._released.set()
        end_thread(self._thread, 2 * locations.REQUEST_SECONDS)
        if not self._is_lost:
            with contextlib.suppress(Exception):
                locations.replace_key(self._key, None, self._generation)

    def _was_renewed(self) -> bool:
        """Return whether the key still names this lease: it may have been renewed since the generation was read."""
        return _is_of(locations.read_key(self._key)[0], self._secret)

    def _renew(self) -> None:
        while not self._released.wait(RENEWAL_SECONDS):
            try:
                renewed = locations.replace_key(self._key, _holder(self._secret), self._generation)
                if not renewed and self._was_renewed():
                    # The answer to an earlier write was lost.
                    renewed = locations.read_key(self._key)[1]
            except Exception as error:
                # It is tried again; another process takes over after several failures.
                _LOG.warning("%s: the lease could not be renewed (%s)", self._key, error)
                continue
            if not renewed:
                self._is_lost = True
                _LOG.error("%s: another process has taken the lease", self._key)
                return
            self._generation = renewed


@contextlib.contextmanager
def lease(
    key: Url, on_wait: Callable[[str], object], *, refuse: bool = False, patience: float = 0.0
) -> Iterator[Lease]:
    """Hold the lease at `key`.

    A lease whose holder ran on this machine and has ended is taken at once, any other one when it has expired.

    Args:
      key: The key.
      on_wait: Called once with a description of the holder if there is one.
      refuse: Raise an error as soon as the holder renews the lease, or after `patience`. Otherwise, wait.
      patience: Seconds to wait for a renewal, or for the lease to expire, before the lease is refused.

    Raises:
      HeldError: another process holds it, and `refuse` is True.
      DataError: the object store cannot be accessed.
    """
    secret = secrets.token_hex(8)
    held = Lease(key, secret, _acquire(key, secret, on_wait, refuse, patience))
    try:
        yield held
    finally:
        held.release()


def _acquire(key: Url, secret: str, on_wait: Callable[[str], object], refuse: bool, patience: float) -> bytes:
    """Write the key and return its generation; `secret` distinguishes this lease from all others."""
    seen, since, start, is_told = b"", time.monotonic(), time.monotonic(), False
    while True:
        holder, generation = locations.read_key(key)
        if _is_of(holder, secret):
            # The answer to the write was lost.
            return generation
        is_expired = generation == seen and time.monotonic() - since > EXPIRY_SECONDS
        if holder is None or is_expired or _has_ended(holder):
            written = locations.replace_key(key, _holder(secret), generation)
            if written:
                return written
            locations.require_bucket(key)
            time.sleep(random.uniform(0.0, _RETRY_SECONDS))
            continue
        by = _named(holder)
        is_renewed = bool(seen) and generation != seen
        if refuse and (is_renewed or time.monotonic() - start >= patience):
            raise HeldError(f"{key}: another process ({by}) holds the lease")
        if generation != seen:
            seen, since = generation, time.monotonic()
        if not is_told:
            on_wait(by)
            is_told = True
        # A holder that renews its lease has limits of its own.
        progress()
        time.sleep(_POLL_SECONDS)


def _holder(secret: str) -> bytes:
    """Return the content of the key, different each time."""
    identity = {"host": socket.gethostname(), "pid": os.getpid(), "secret": secret, "renewal": secrets.token_hex(4)}
    return json.dumps({**identity, "machine": _machine(), "started": _start_time(os.getpid())}).encode()


def _described(holder: bytes) -> dict[str, Any]:
    try:
        found = parse_json(holder)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_of(holder: bytes | None, secret: str) -> bool:
    return holder is not None and _described(holder).get("secret") == secret


def _named(holder: bytes) -> str:
    found = _described(holder)
    return visible(f"host {found.get('host')}, pid {found.get('pid')}" if found else holder.decode(errors="replace"))


def _has_ended(holder: bytes) -> bool:
    """Return whether the holder was a process of this machine that does not exist any more."""
    found = _described(holder)
    machine, pid = _machine(), found.get("pid")
    if machine is None or found.get("machine") != machine or not isinstance(pid, int):
        return False
    return _start_time(pid) != found.get("started")


def _machine() -> str | None:
    """Return a name of this boot of this machine and its namespace of processes; None if there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _start_time(pid: int) -> str | None:
    """Return when a process began, in ticks since the boot; None if there is no such process, or it is a zombie."""
    try:
        # The name of the program, in parentheses, may contain spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
