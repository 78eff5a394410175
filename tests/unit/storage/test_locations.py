"""Files and keys by path and by URL. `memory://` has the interface of TensorStore's object stores, but neither their
network nor their permissions; tests/buckets has servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from t5x_like.storage import locations
from t5x_like.storage.locations import Url, location


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_written_files_can_be_read_listed_and_removed(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "a b" if kind == "folder" else location(f"memory://{tmp_path.name}/a")
    assert locations.read_bytes(root / "x" / "one") is None and not locations.exists(root)
    for name in ("one", "two"):
        locations.write_bytes(root / "x" / name, name.encode())
    locations.write_bytes(root / "x" / "one", b"again")
    locations.write_bytes(root / "y", b"")
    assert locations.read_bytes(root / "x" / "one") == b"again" and locations.read_bytes(root / "y") == b""
    assert locations.children(root) == ["x", "y"] and locations.children(root / "x", "t") == ["two"]
    locations.remove(root / "y")
    locations.remove(root / "x")
    locations.remove(root / "x")
    assert not locations.children(root)


def test_children_with_a_prefix_request_no_keys_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = location(f"memory://{tmp_path.name}/a")
    for name in ("one", "two", "tx"):
        locations.write_bytes(root / name / "file", b"")
    listed: list[list[str]] = []
    between = locations.keys_between
    monkeypatch.setattr(locations, "keys_between", lambda *range_: listed.append(between(*range_)) or listed[-1])
    assert locations.children(root, "tw") == ["two"] and listed == [["two/file"]]
    assert locations.children(root, "none") == []


def test_locations_of_paths_and_urls() -> None:
    assert location("runs/stores") == Path("runs/stores")
    assert location("file:///data/my%20stores") == Path("/data/my stores")
    url = location("gs://bucket/stores/")
    assert url == Url("gs://bucket/stores") and str(url / "a") == "gs://bucket/stores/a"
    assert (url / "a").with_name("b") == url / "b" and (url / "a").parent == url and (url / "a").name == "a"


def test_a_new_key_is_written_once(tmp_path: Path) -> None:
    key = location(f"memory://{tmp_path.name}/a/b")
    assert isinstance(key, Url)
    assert locations.write_new(key, b"1") and not locations.write_new(key, b"2")
    assert locations.read_bytes(key) == b"1" and locations.keys(key.parent) == ["b"]


def test_names_are_listed_with_one_beginning_or_without_one() -> None:
    with pytest.raises(AssertionError, match="not implemented"):
        locations.keys(Url("memory://a"), prefix="b", without="c")


def test_a_key_is_replaced_only_if_nobody_else_has_changed_it(tmp_path: Path) -> None:
    key = location(f"memory://{tmp_path.name}/a")
    assert isinstance(key, Url)
    locations.write_bytes(key, b"1")
    _, generation = locations.read_key(key)
    newer = locations.replace_key(key, b"2", generation)
    assert newer and not locations.replace_key(key, b"3", generation)
    assert locations.replace_key(key, None, newer) and locations.read_bytes(key) is None
