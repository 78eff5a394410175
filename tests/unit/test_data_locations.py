"""Stores by path and by URL. Of the object stores, TensorStore's `memory://` and `file://` are tried here: they have
its interface, but neither the network nor the rights of the others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from t5x_like.config import CausalLM, CorpusConfig, DataConfig, DataError, TokenizerConfig
from t5x_like.data import locations, units
from t5x_like.data.locations import Url, location
from t5x_like.data.prepare import open_stores, prepare, store_paths
from t5x_like.data.store import Store, StoreWriter, is_committed


def silent(line: str) -> None:
    del line


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_what_is_written_is_read_listed_and_removed(tmp_path: Path, kind: str) -> None:
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


def test_paths_and_urls() -> None:
    assert location("runs/stores") == Path("runs/stores")
    assert location("file:///data/my%20stores") == Path("/data/my stores")
    url = location("gs://bucket/stores/")
    assert url == Url("gs://bucket/stores") and str(url / "a") == "gs://bucket/stores/a"
    assert (url / "a").with_name("b") == url / "b" and (url / "a").parent == url and (url / "a").name == "a"


def test_a_store_in_an_object_store_is_committed_by_its_marker(tmp_path: Path) -> None:
    url = location(f"memory://{tmp_path.name}/s")
    info = {"vocabulary": {"base_size": 200, "num_sentinels": 10}, "tokenizer_fingerprint": ""}
    with StoreWriter(url, vocab_size=213) as writer:
        writer.append("train", [np.arange(100)], 100)
        writer.append("validation", [np.arange(10)], 10)
        assert not is_committed(url)
        writer.commit(info, tokenizer_model=None)
    store = Store.open(url)
    assert store.split("train").tokens(0, 100).tolist() == list(range(100))
    assert store.split("train").gather(np.array([95]), 10).tolist() == [[*range(95, 100), *range(5)]]
    locations.remove(url / "COMMITTED")
    with pytest.raises(DataError, match=r"memory://.*: found a half-written token store.*t5x-like prepare RECIPE"):
        Store.open(url)
    with pytest.raises(KeyboardInterrupt), StoreWriter(url, vocab_size=213):
        raise KeyboardInterrupt
    assert not locations.exists(url)
    with pytest.raises(DataError, match="found no token store"):
        Store.open(url)


def test_prepare_writes_the_same_store_by_path_and_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_SMALLEST", 1000)
    rows = [json.dumps({"text": f"Text {i} with words, {i % 9} of them. " * 4}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    by_path = DataConfig(
        corpus=CorpusConfig(files=(str(tmp_path / "a.jsonl"),), validation_fraction=0.1),
        tokenizer=TokenizerConfig(vocab_size=290),
        layout="causal_lm",
        mixture=(CausalLM(),),
        inputs_length=8,
        targets_length=8,
        store=f"file://{tmp_path}/stores",
    )
    by_url = dataclasses.replace(by_path, store=f"memory://{tmp_path.name}/stores")
    with pytest.raises(DataError, match="found no token store"):
        open_stores(by_url)
    (one,), (other,) = prepare(by_path, report=silent), prepare(by_url, report=silent)
    assert isinstance(one.path, Path) and isinstance(other.path, Url)
    for path in sorted(one.path.rglob("*")):
        if path.is_file():
            key = other.path
            for name in path.relative_to(one.path).parts:
                key = key / name
            assert locations.read_bytes(key) == path.read_bytes(), path
    assert open_stores(by_url)[0].fingerprint == one.fingerprint
    assert open_stores(by_url)[0].tokenizer.encode("words") == one.tokenizer.encode("words")
    (url,) = store_paths(by_url)
    assert locations.children(url.parent) == [url.name], "the parts have gone"
    lines: list[str] = []
    prepare(by_url, report=lines.append)
    assert lines == [f"{url}: prepared already"]
    (tmp_path / "a.jsonl").unlink()
    assert open_stores(by_url)[0].path == url, "found without its source"


def test_a_url_that_is_no_object_store_says_so() -> None:
    with pytest.raises(DataError, match=r"nowhere://x/s: found no object store that answers"):
        Store.open(location("nowhere://x/s"))
