"""Local copies of run directories in object stores: what is copied, uploaded and removed, and who may do so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from t5x_like.errors import ConfigError, SafetyError
from t5x_like.storage import lease as leases
from t5x_like.storage import locations, mirror
from t5x_like.storage.locations import Url, location
from t5x_like.storage.mirror import Mirror, fetch, local_copy, mirror_of, original, path_to_read, upload_results


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Url]:
    monkeypatch.setattr(leases, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(leases, "EXPIRY_SECONDS", 0.3)
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "UPLOAD_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "_MIRRORS", {})
    url = location(f"memory://{tmp_path.name}/run")
    assert isinstance(url, Url)
    yield url


def content(url: Url) -> dict[str, bytes | None]:
    return {name: locations.read_bytes(url / name) for name in locations.keys(url) if name != mirror.LEASE}


def wait_for(url: Url, expected: dict[str, bytes | None]) -> None:
    deadline = time.monotonic() + 120
    while content(url) != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert content(url) == expected


def test_owner_works_on_a_copy_that_is_uploaded(url: Url) -> None:
    locations.write_bytes(url / "config.json", b"{}")
    locations.write_bytes(url / "exit.json", b"{}")
    locations.write_bytes(url / "checkpoints" / "run_id", b"1")
    locations.write_bytes(url / "checkpoints" / "data" / "4.x" / "w", b"large")
    own, mirror_started = Mirror(url), time.time() - 3600
    with own.owned(0):
        assert {path.name for path in own.path.rglob("*") if path.is_file()} == {"config.json", "exit.json", "run_id"}
        assert (own.path / "exit.json").stat().st_mtime < mirror_started
        (own.path / "metrics.jsonl").write_bytes(b"1\n")
        (own.path / "tokenizer").mkdir()
        (own.path / "tokenizer" / "model").write_bytes(b"m")
        (own.path / "config.json.partial").write_bytes(b"half")
        (own.path / "exit.json").unlink()
        kept = {"checkpoints/data/4.x/w": b"large", "checkpoints/run_id": b"1", "config.json": b"{}"}
        wait_for(url, {**kept, "metrics.jsonl": b"1\n", "tokenizer/model": b"m"})
        with (own.path / "metrics.jsonl").open("ab") as file:
            file.write(b"2\n")
        own.upload()
        assert locations.read_bytes(url / "metrics.jsonl") == b"1\n2\n"
        (own.path / "report.html").write_bytes(b"end")
    assert locations.read_bytes(url / "report.html") == b"end" and locations.read_bytes(url / mirror.LEASE) is None

    other = Mirror(url)
    other.download()
    assert (other.path / "metrics.jsonl").read_bytes() == b"1\n2\n" and not other.has_changes()
    other.remove()
    assert not other.path.exists()


def test_run_has_one_owner(url: Url) -> None:
    with Mirror(url).owned(0):
        with pytest.raises(SafetyError, match=r"another process \(host .*\) holds the lease: it trains in memory://"):
            with Mirror(url).owned(10):
                pass


def test_owner_that_has_lost_its_lease_uploads_nothing(url: Url) -> None:
    own = Mirror(url)
    with own.owned(0):
        (own.path / "metrics.jsonl").write_bytes(b"1\n")
        own.upload()
        locations.write_bytes(url / mirror.LEASE, b"another process")
        (own.path / "metrics.jsonl").write_bytes(b"2\n")
        with pytest.raises(SafetyError, match="another process has taken the lease"):
            own.upload()
    assert locations.read_bytes(url / "metrics.jsonl") == b"1\n"
    assert locations.read_bytes(url / mirror.LEASE) == b"another process"


def test_process_that_follows_uploads_what_it_writes_only(url: Url) -> None:
    owner, follower = Mirror(url), Mirror(url)
    with owner.owned(0):
        (owner.path / "metrics.jsonl").write_bytes(b"1\n")
        owner.upload()
        with follower.followed():
            (owner.path / "metrics.jsonl").write_bytes(b"1\n2\n")
            owner.upload()
            (follower.path / "log.1.txt").write_bytes(b"line")
        assert content(url) == {"metrics.jsonl": b"1\n2\n", "log.1.txt": b"line"}


def test_failed_upload_does_not_end_the_run(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    own, failures, failed = Mirror(url), [1, 2], threading.Event()
    write = locations.write_bytes

    def fail(path: Url, *data: bytes) -> None:
        if failures and path.name == "log.txt":
            failures.pop()
            raise SafetyError("the store is away")
        failed.set()
        write(path, *data)

    monkeypatch.setattr(locations, "write_bytes", fail)
    with own.owned(0):
        (own.path / "log.txt").write_bytes(b"1")
        assert failed.wait(120)
        wait_for(url, {"log.txt": b"1"})


def test_refreshed_files_are_read_where_they_have_changed(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, reader = Mirror(url), Mirror(url)
    names = ("config.json", "exit.json", "metrics.jsonl")
    with owner.owned(0):
        (owner.path / "config.json").write_bytes(b"{}")
        (owner.path / "exit.json").write_bytes(b"{}")
        (owner.path / "metrics.jsonl").write_bytes(b"1\n" * 50)
        owner.upload()
        reader.refresh(names)
        assert (reader.path / "metrics.jsonl").read_bytes() == b"1\n" * 50
        read, values = locations.read_key_if_changed, []
        monkeypatch.setattr(locations, "read_key_if_changed", lambda *key: values.append(read(*key)) or values[-1])
        monkeypatch.setattr(locations, "read_key", pytest.fail)
        reader.refresh(names)
        assert values == [None] * 3, "nothing has changed"
        monkeypatch.undo()
        with (owner.path / "metrics.jsonl").open("ab") as file:
            file.write(b"2\n")
        (owner.path / "exit.json").unlink()
        owner.upload()
        reader.refresh(names)
        assert (reader.path / "metrics.jsonl").read_bytes() == b"1\n" * 50 + b"2\n"
        assert not (reader.path / "exit.json").exists() and not reader.has_changes()


def test_results_of_a_reader_are_added_although_the_run_is_in_progress(url: Url) -> None:
    path = path_to_read(str(url), "MODEL")
    with pytest.raises(ConfigError, match="memory://.*no objects"):
        fetch(path)
    locations.write_bytes(url / "checkpoints" / "committed" / "4.json", b"")
    locations.write_bytes(url / "config.json", b"{}")
    assert path_to_read(str(url), "MODEL") == path
    fetch(path)
    found = mirror_of(path)
    assert found is not None and found.url == url and (path / "checkpoints").is_dir() and mirror_of(path.parent) is None
    owner = Mirror(url)
    with owner.owned(0):
        (path / "evaluation.json").write_bytes(b"1")
        upload_results()
        (owner.path / "metrics.jsonl").write_bytes(b"2")
    assert locations.read_bytes(url / "evaluation.json") == b"1" and locations.read_bytes(url / "metrics.jsonl") == b"2"


def test_growing_files_are_uploaded_in_segments_and_joined(url: Url) -> None:
    owner = Mirror(url)
    lines = [b"%d\n" % number for number in range(1000, 1100)]
    with owner.owned(0):
        for number in range(len(lines)):
            with (owner.path / "metrics.jsonl").open("ab") as file:
                file.write(lines[number])
            owner.upload()
            if number == 70:
                # A resumed run cuts what was after its checkpoint.
                (owner.path / "metrics.jsonl").write_bytes(b"".join(lines[:50]) + lines[number])
                owner.upload()
        expected = b"".join([*lines[:50], *lines[70:]])
        keys = [key for key in locations.keys(url) if key.startswith("segments/metrics.jsonl/")]
        assert 1 <= len(keys) <= 10
        reader = Mirror(url)
        reader.download()
        assert (reader.path / "metrics.jsonl").read_bytes() == expected and not (reader.path / "segments").exists()
        with (owner.path / "metrics.jsonl").open("ab") as file:
            file.write(b"end")
        owner.upload()
        reader.refresh(["metrics.jsonl", "exit.json"])
        assert (reader.path / "metrics.jsonl").read_bytes() == expected + b"end" and not reader.has_changes()
    assert content(url) == {"metrics.jsonl": expected + b"end"}, "one object stays at the end"
    successor = Mirror(url)
    with successor.owned(0):
        (successor.path / "metrics.jsonl").unlink()
        successor.upload()
        assert content(url) == {}


def test_failed_upload_of_a_segment_is_repaired(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "UPLOAD_SECONDS", 600)
    own, write = Mirror(url), locations.write_bytes
    with own.owned(0):
        data = b""
        for size in (60, 20, 5):
            data += bytes(size)
            (own.path / "log.txt").write_bytes(data)
            own.upload()

        def fail(path: Url, *parts: bytes) -> None:
            raise SafetyError("the store is away")

        monkeypatch.setattr(locations, "write_bytes", fail)
        data = data[:70] + b"2" * 30
        (own.path / "log.txt").write_bytes(data)
        with pytest.raises(SafetyError):
            own.upload()
        monkeypatch.setattr(locations, "write_bytes", write)
        own.upload()
        reader = Mirror(url)
        reader.download()
        assert (reader.path / "log.txt").read_bytes() == data


def test_model_and_file_are_fetched_once(url: Url) -> None:
    """A directory with checkpoints in the layout of a disk is copied with them, and a single object becomes a file."""
    for name in ("model.json", "checkpoints/0/params/x", "checkpoints/0/SHA256SUMS", "folder/"):
        locations.write_bytes(url / name, name.encode())
    locations.write_bytes(url.parent / "spiece.model", b"pieces")
    path = local_copy(str(url), "initialize_from.directory")
    assert (path / "checkpoints/0/params/x").read_bytes() == b"checkpoints/0/params/x"
    assert mirror._MIRRORS[path].has_local_checkpoints and not mirror._MIRRORS[path].has_changes()
    assert local_copy(str(url), "again") == path and original(path / "model.json") == f"{url}/model.json"
    upload_results()
    assert "checkpoints/0/params/x" in locations.keys(url)
    file = local_copy(str(url.parent / "spiece.model"), "data.tokenizer.path")
    assert file.read_bytes() == b"pieces" and file.name == "spiece.model"
    for missing in (f"{url}x", f"memory://{url.text.split('/')[2]}x"):
        with pytest.raises(ConfigError, match="no objects"):
            local_copy(missing, "data.tokenizer.path")
    assert local_copy("a/b", "x") == Path("a/b") and local_copy("file:///a/b", "x") == Path("/a/b")
    assert original("a/b") == "a/b"
