"""Keys, conditions, leases and faults against servers of both protocols."""

from __future__ import annotations

import threading

import pytest
from helpers.bucket_proxy import Faults
from helpers.bucket_servers import Server

from t5x_like.errors import EXIT_RESUMABLE, EXIT_USAGE, DataError, SafetyError, UserError
from t5x_like.faults import FaultError
from t5x_like.storage import lease as leases
from t5x_like.storage import locations
from t5x_like.storage.locations import Url, location

pytestmark = pytest.mark.buckets


@pytest.fixture(autouse=True)
def settings(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


def at(server: Server, name: str, **bucket: str) -> Url:
    url = location(server.url(name, **bucket))
    assert isinstance(url, Url)
    return url


def test_keys_are_written_listed_and_removed(server: Server) -> None:
    root = at(server, "keys")
    assert locations.read_bytes(root / "x" / "a+b c") is None and not locations.exists(root)
    for name in ("a+b c", "two", "two/deeper"):
        locations.write_bytes(root / "x" / name, name.encode())
    locations.write_bytes(root / "y", b"")
    assert locations.keys(root) == ["x/a+b c", "x/two", "x/two/deeper", "y"] and locations.children(root) == ["x", "y"]
    assert locations.keys(root, without="x/two") == ["x/a+b c", "y"]
    assert locations.read_bytes(root / "x" / "a+b c") == b"a+b c" and locations.read_bytes(root / "y") == b""
    locations.remove(root / "x")
    assert locations.keys(root) == ["y"]


def test_conditions_hold(server: Server) -> None:
    key = at(server, "conditions") / "one"
    assert locations.write_new(key, b"1") and not locations.write_new(key, b"2")
    _, generation = locations.read_key(key)
    newer = locations.replace_key(key, b"2", generation)
    assert newer and not locations.replace_key(key, b"3", generation)
    assert not locations.replace_key(key, None, generation) and locations.read_bytes(key) == b"2"
    assert locations.replace_key(key, None, newer) and locations.read_bytes(key) is None


def test_of_many_processes_one_gets_the_lease(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_POLL_SECONDS", 0.01)
    key, holders, most = at(server, "leases") / "lease", 0, 0
    guard = threading.Lock()

    def hold() -> None:
        nonlocal holders, most
        with leases.lease(key, lambda by: None) as held:
            with guard:
                holders += 1
                most = max(most, holders)
            held.require_held()
            with guard:
                holders -= 1

    threads = [threading.Thread(target=hold) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert most == 1 and holders == 0 and locations.read_bytes(key) is None


@pytest.mark.parametrize("fault", ["503", "429", "lost answer", "cut answer"])
def test_transient_errors_are_repeated(server: Server, faults: Faults, fault: str) -> None:
    root = at(server, f"transient {fault}")
    faults.every = 3
    faults.is_lost, faults.is_cut = fault == "lost answer", fault == "cut answer"
    faults.status = int(fault) if fault.isdecimal() else 0
    before = locations.num_repeated_requests()
    for number in range(12):
        locations.write_bytes(root / str(number), str(number).encode())
    assert [locations.read_bytes(root / str(number)) for number in range(12)] == [b"%d" % n for n in range(12)]
    assert len(locations.keys(root)) == 12 and faults.injected > 6
    if fault.isdecimal():  # The HTTP library itself repeats some requests on a connection that was closed.
        assert locations.num_repeated_requests() - before > 6


def test_permanent_errors_are_told_at_once(server: Server, faults: Faults) -> None:
    missing = at(server, "x", bucket="missing")
    with pytest.raises(DataError, match="NOT_FOUND"), leases.lease(missing, lambda by: None):
        pass
    faults.status = 403
    for request in (locations.read_bytes, locations.keys, lambda url: locations.write_bytes(url, b"1")):
        before = faults.injected
        with pytest.raises(UserError, match="PERMISSION_DENIED") as error:
            request(at(server, "a"))
        assert error.value.exit_code == EXIT_USAGE and faults.injected <= before + 2


def test_lasting_outage_ends_with_a_code_that_restarts(
    server: Server, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults.status = 503
    with pytest.raises((FaultError, SafetyError)) as error:
        locations.read_bytes(at(server, "outage"))
    assert error.value.exit_code == EXIT_RESUMABLE
