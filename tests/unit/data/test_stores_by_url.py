"""Stores by path and by URL. The tests use `memory://` and `file://`, which have the interface of TensorStore's object
stores, but neither their network nor their permissions."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from t5x_like.config import CausalLM, CorpusConfig, DataConfig, TokenizerConfig
from t5x_like.data.sources import work_units
from t5x_like.data.store.prepare import open_stores, prepare
from t5x_like.data.store.store_paths import store_paths
from t5x_like.data.store.token_store import Store, StoreWriter, is_committed
from t5x_like.errors import ConfigError, DataError
from t5x_like.storage import locations
from t5x_like.storage.locations import Url, location


def silent(line: str) -> None:
    del line


def test_object_store_commits_by_marker(tmp_path: Path) -> None:
    url = location(f"memory://{tmp_path.name}/s")
    info = {"vocabulary": {"base_size": 200, "num_sentinels": 10}, "tokenizer_fingerprint": ""}
    with StoreWriter(url, vocab_size=213) as writer:
        writer.append("train", [np.arange(100)], 100)
        writer.append("validation", [np.arange(10)], 10)
        assert not is_committed(url)
        writer.commit(info)
    store = Store.open(url)
    assert store.split("train").tokens(0, 100).tolist() == list(range(100))
    assert store.split("train").gather(np.array([95]), 10).tolist() == [[*range(95, 100), *range(5)]]
    locations.remove(url / "COMMITTED")
    with pytest.raises(DataError, match=r"memory://.*: found an incomplete token store.*t5x-like prepare RECIPE"):
        Store.open(url)
    with pytest.raises(KeyboardInterrupt), StoreWriter(url, vocab_size=213):
        raise KeyboardInterrupt
    assert not locations.exists(url)
    with pytest.raises(DataError, match="found no token store"):
        Store.open(url)


def test_prepare_writes_equal_stores_by_path_and_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_units, "MIN_UNIT_BYTES", 1000)
    rows = [json.dumps({"text": f"Text {i} with words, {i % 9} of them. " * 4}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    by_path = DataConfig(
        corpus=CorpusConfig(files=(str(tmp_path / "a.jsonl"),), validation_fraction=0.1),
        tokenizer=TokenizerConfig(vocab_size=290),
        layout="causal_lm",
        mixture=(CausalLM(),),
        inputs_length=8,
        targets_length=8,
        store_dir=f"file://{tmp_path}/stores",
    )
    by_url = dataclasses.replace(by_path, store_dir=f"memory://{tmp_path.name}/stores")
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
    assert locations.children(url.parent) == [url.name, "source_digests.json"], "the parts are removed"
    lines: list[str] = []
    prepare(by_url, report=lines.append)
    assert lines == [f"{url}: already prepared"]
    (tmp_path / "a.jsonl").unlink()
    assert open_stores(by_url)[0].path == url, "found without its source"


def test_unknown_url_scheme_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"'nowhere://x/s', expected a path, or a URL of gs://, s3://, memory://"):
        Store.open(location("nowhere://x/s"))


def test_name_of_a_store_depends_on_contents_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies in another folder with other times lead to the same name, a changed text of the same size to another."""
    data = DataConfig(
        corpus=CorpusConfig(files=("texts/*.txt",)),
        tokenizer=TokenizerConfig(kind="bytes"),
        layout="causal_lm",
        mixture=(CausalLM(),),
        inputs_length=8,
        targets_length=8,
        store_dir="stores",
    )
    names = []
    for copy, times in (("a", (1, 1)), ("b", (2, 2))):
        (tmp_path / copy / "texts").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / copy)
        for number in range(2):
            file = Path(f"texts/{number}.txt")
            file.write_text(f"text {number}")
            os.utime(file, times)
        names += [store_paths(data), store_paths(data)]
    assert len(set(names)) == 1
    os.utime("texts/1.txt", (3, 3))
    assert store_paths(data) == names[0]
    Path("texts/1.txt").write_text("text 2")
    changed = store_paths(data)
    assert changed != names[0]
    record = Path("stores/source_digests.json")
    before = record.read_bytes()
    assert store_paths(data) == changed and record.read_bytes() == before
    record.write_text("{damaged")
    assert store_paths(data) == changed
