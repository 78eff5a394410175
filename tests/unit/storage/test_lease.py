"""Leases of keys: one holder, takeover of a dead or silent one, and the loss of a lease."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from t5x_like.errors import SafetyError
from t5x_like.storage import lease as leases
from t5x_like.storage import locations
from t5x_like.storage.locations import Url, location


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Url:
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(leases, "EXPIRY_SECONDS", 2.0)
    monkeypatch.setattr(leases, "_POLL_SECONDS", 0.01)
    key = location(f"memory://{tmp_path.name}/s.lease")
    assert isinstance(key, Url)
    return key


def silent(line: str) -> None:
    del line


def holder(pid: int, **fields: object) -> bytes:
    return json.dumps({**json.loads(leases._holder("another")), "pid": pid, **fields}).encode()


def test_lease_is_held_by_one_process(key: Url) -> None:
    events: list[str] = []

    def second() -> None:
        with leases.lease(key, events.append):
            events.append("second")

    with leases.lease(key, silent) as first:
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(3.0)  # Longer than the expiry: renewals keep the lease.
        first.require_held()
        events.append("first")
    thread.join(timeout=120)
    waiting, *order = events
    assert "pid" in waiting and order == ["first", "second"]
    assert not locations.exists(key.parent), "the lease is released"


def test_lease_of_a_silent_holder_is_taken_when_it_expires(key: Url) -> None:
    locations.write_bytes(key, b"a holder that was killed on another machine")
    start = time.monotonic()
    with leases.lease(key, silent, refuse=True, patience=60):
        assert time.monotonic() - start >= leases.EXPIRY_SECONDS


def test_lease_of_a_living_holder_is_refused(key: Url) -> None:
    with leases.lease(key, silent):
        with pytest.raises(leases.HeldError, match=r"another process \(host .*, pid \d+\) holds the lease"):
            with leases.lease(key, silent, refuse=True, patience=60):
                pass


def test_lease_of_a_process_of_this_machine_that_has_ended_is_taken_at_once(
    key: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "EXPIRY_SECONDS", 1e9)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    own = leases._start_time(0) or "1"
    locations.write_bytes(key, holder(ended.pid, started=own))
    with leases.lease(key, silent, refuse=True):
        pass
    # Another process that has got the same pid is not the holder.
    locations.write_bytes(key, holder(1, started="-1"))
    with leases.lease(key, silent, refuse=True):
        pass
    locations.write_bytes(key, holder(ended.pid, machine="another machine"))
    with pytest.raises(leases.HeldError), leases.lease(key, silent, refuse=True):
        pass


def test_process_that_has_lost_the_lease_is_stopped(key: Url) -> None:
    with leases.lease(key, silent) as held:
        locations.write_bytes(key, holder(1, machine="another machine"))
        with pytest.raises(SafetyError, match="another process has taken the lease"):
            held.require_held()
    assert b"another machine" in (locations.read_bytes(key) or b""), "a lost lease is not released"


def test_lost_answers_lose_no_lease(key: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write is done, but looks as if its condition had failed."""
    replace, lost = locations.replace_key, [True]

    def replace_without_answer(path: Url, value: bytes | None, generation: bytes) -> bytes:
        written = replace(path, value, generation)
        return b"" if lost[0] else written

    monkeypatch.setattr(locations, "replace_key", replace_without_answer)
    with leases.lease(key, silent, refuse=True) as held:
        time.sleep(0.3)  # Some renewals.
        held.require_held()
        lost[0] = False
    assert locations.read_bytes(key) is None
