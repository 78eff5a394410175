"""Token stores: written data is read back, incomplete stores are refused, damage is detected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers.data_examples import numbered_store, text_store

from t5x_like.data.store import token_arrays
from t5x_like.data.store import token_store as stores
from t5x_like.data.store.token_store import Store, StoreWriter, is_committed
from t5x_like.errors import DataError


def test_tokens_offsets_and_counts(tmp_path: Path) -> None:
    store = text_store(tmp_path / "s", ["ab", "é"], ["xyz"])
    train = store.split("train")
    assert train.tokens(0, 6).tolist() == [100, 101, 1, 198, 172, 1]
    assert train.offsets.tolist() == [0, 3, 6]
    assert (train.num_documents, train.num_tokens, train.num_bytes) == (2, 6, 4)
    assert store.split("validation").num_bytes == 3
    counts = train.token_counts()
    assert counts[1] == 2 and counts[100] == 1 and counts.sum() == 6
    assert store.tokenizer.decode(train.tokens(0, 6).tolist()) == "abé"
    assert store.info["dtype"] == "uint16"


def test_token_counts_are_those_of_each_split(tmp_path: Path) -> None:
    store = text_store(tmp_path / "s", ["ab ab", "é"], ["xyz"])
    for split in map(store.split, stores.SPLITS):
        expected = np.bincount(split.tokens(0, split.num_tokens), minlength=store.vocabulary.vocab_size)
        assert split.token_counts().tolist() == expected.tolist()


@pytest.mark.parametrize("in_memory", [True, False])
def test_gather_wraps_and_crosses_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool) -> None:
    monkeypatch.setattr(token_arrays, "SHARD_TOKENS", 256)
    monkeypatch.setattr(token_arrays, "CHUNK_TOKENS", 64)
    monkeypatch.setattr(stores, "IN_MEMORY_BYTES", 2**30 if in_memory else 0)
    path = tmp_path / "s"
    with StoreWriter(path, vocab_size=70_000) as writer:
        rest = np.arange(1000)
        for size in (1, 300, 0, 255, 444):  # Appended in pieces of arbitrary sizes.
            part, rest = rest[:size], rest[size:]
            writer.append("train", [part], size)
        info = {"vocabulary": {"base_size": 69_000, "num_sentinels": 10}, "tokenizer_fingerprint": ""}
        writer.commit(info)
    store = Store.open(path)
    assert store.info["dtype"] == "uint32"
    assert len(list((path / "train" / "tokens" / "c").iterdir())) == 4
    rows = store.split("train").gather(np.array([0, 250, 990]), 20)
    assert rows.tolist() == [list(range(20)), list(range(250, 270)), [*range(990, 1000), *range(10)]]
    assert store.split("train").tokens(255, 258).tolist() == [255, 256, 257]


@pytest.mark.parametrize("in_memory", [True, False])
def test_ids_outside_the_vocabulary_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    """A store whose vocabulary is smaller than its ids: its files agree with their checksums."""
    monkeypatch.setattr(stores, "IN_MEMORY_BYTES", 2**30 if in_memory else 0)
    with StoreWriter(tmp_path / "s", vocab_size=300) as writer:
        writer.append("train", [np.arange(200)], 200)
        info = {"vocabulary": {"base_size": 87, "num_sentinels": 10}, "tokenizer_fingerprint": ""}
        writer.commit(info)
    for method, arguments in (("tokens", (90, 101)), ("gather", (np.array([0, 90]), 11))):
        with pytest.raises(DataError, match=r"found the id \d+, expected ids below 100"):
            getattr(Store.open(tmp_path / "s").split("train"), method)(*arguments)
    if not in_memory:
        assert Store.open(tmp_path / "s").split("train").tokens(89, 100).max() == 99


def test_commit_flushes_files_and_names_before_the_rename_and_the_rename_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what has been flushed survives a power failure."""
    path = tmp_path / "stores" / "s"
    flushed: list[tuple[bool, int]] = []
    monkeypatch.setattr(
        "os.fsync", lambda descriptor: flushed.append((path.exists(), os.fstat(descriptor).st_ino)), raising=True
    )
    numbered_store(path, 50)
    before = {inode for renamed, inode in flushed if not renamed}
    assert {entry.stat().st_ino for entry in (path, *path.rglob("*"))} <= before
    assert (True, path.parent.stat().st_ino) in flushed


def test_missing_store_error_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no token store.*t5x-like prepare RECIPE"):
        Store.open(tmp_path / "none")


def test_incomplete_store_is_refused_and_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "s"
    writer = StoreWriter(path, vocab_size=300)
    writer.append("train", [np.arange(5)], 5)  # The process dies here.
    with pytest.raises(DataError, match="an incomplete token store"):
        Store.open(path)
    store = numbered_store(path, 50)
    assert store.split("train").num_tokens == 50
    assert not writer.partial.exists()


def test_error_while_writing_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "s", vocab_size=300):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["marker", "info", "version"])
def test_store_without_valid_commit_is_refused(tmp_path: Path, damage: str) -> None:
    path = numbered_store(tmp_path / "s", 50).path
    info = path / "info.json"
    if damage == "marker":
        (path / "COMMITTED").unlink()
    elif damage == "info":
        info.write_text(info.read_text().replace("50", "51"))
    else:
        document = json.loads(info.read_text()) | {"format_version": 0}
        info.write_text(json.dumps(document))
        (path / "COMMITTED").write_text(stores._digest(info.read_text()))
    assert not is_committed(path)
    with pytest.raises(DataError, match="incomplete"):
        Store.open(path)


def test_flipped_bit_raises_data_error(tmp_path: Path) -> None:
    path = numbered_store(tmp_path / "s", 5000).path
    (shard,) = [file for file in (path / "train" / "tokens" / "c").iterdir()]
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="unreadable.*prepare"):
        Store.open(path).split("train").tokens(0, 10)


def test_fingerprint_depends_on_the_tokens(tmp_path: Path) -> None:
    one = text_store(tmp_path / "a", ["same text"])
    assert one.fingerprint == text_store(tmp_path / "b", ["same text"]).fingerprint
    assert one.fingerprint != text_store(tmp_path / "c", ["same texT"]).fingerprint
    assert one.fingerprint != text_store(tmp_path / "d", ["same", "text"]).fingerprint
    assert one.fingerprint != text_store(tmp_path / "e", ["same text"], num_sentinels=65).fingerprint


def test_opening_a_store_imports_no_heavy_packages(tmp_path: Path) -> None:
    """Imports dominate the time to the first batch."""
    path = text_store(tmp_path / "s", ["some text"]).path
    code = f"""
import pathlib, sys
from t5x_like.data.store.prepare import open_stores
from t5x_like.data.store.token_store import Store
store = Store.open(pathlib.Path({str(path)!r}))
assert store.tokenizer.decode(store.split("train").tokens(0, 9).tolist()) == "some text"
print(sorted({{name.partition(".")[0] for name in sys.modules}} & set({HEAVY!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


HEAVY = ("tensorflow", "tensorflow_datasets", "seqio", "jax", "flax", "pyarrow", "apache_beam", "sentencepiece")


@pytest.mark.parametrize("kind", ["tokens", "offsets"])
@pytest.mark.parametrize("damage", ["file lost", "file cut", "zarr.json lost", "shape forged", "chunk lost"])
def test_incomplete_array_is_refused_and_never_read_as_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, damage: str
) -> None:
    """A shape of 3e9 elements is refused before memory of its size is allocated."""
    monkeypatch.setattr(token_arrays, "SHARD_TOKENS", 8)
    monkeypatch.setattr(token_arrays, "CHUNK_TOKENS", 4)
    store = text_store(tmp_path / "s", ["abcdefgh", "ij"] * 8, ["k"])
    assert not store.find_damage()
    array = tmp_path / "s" / "train" / kind
    shard = array / "c" / "1"
    if damage == "file lost":
        shard.unlink()
    elif damage == "file cut":
        shard.write_bytes(shard.read_bytes()[:8])
    elif damage == "chunk lost":
        content = bytearray(shard.read_bytes())
        # The index at the end: offset and length of each chunk, all bits set for one that does not exist.
        content[-36:-20] = b"\xff" * 16
        content[-4:] = google_crc32c(bytes(content[-36:-4]))
        shard.write_bytes(content)
    elif damage == "zarr.json lost":
        (array / "zarr.json").unlink()
    else:
        document = json.loads((array / "zarr.json").read_text())
        (array / "zarr.json").write_text(json.dumps({**document, "shape": [3_000_000_000]}))
    for damaged in (Store.open(tmp_path / "s"), Store.open(tmp_path / "s")):
        with pytest.raises(DataError, match=f"train/{kind}.*prepare RECIPE"):
            _ = damaged.split("train").offsets if kind == "offsets" else damaged.split("train").tokens(0, 20)
    (problem,) = Store.open(tmp_path / "s").find_damage()
    assert f"train/{kind}" in problem


def google_crc32c(data: bytes) -> bytes:
    """Return the CRC-32C (Castagnoli) of `data`, little-endian."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return (crc ^ 0xFFFFFFFF).to_bytes(4, "little")


def test_a_writer_holds_one_shard_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2**18
    monkeypatch.setattr(token_arrays, "SHARD_TOKENS", size)
    writer = token_arrays.ArrayWriter(tmp_path / "array", "uint64")
    values = np.arange(10 * size, dtype=np.uint64)
    pieces = np.split(values, np.cumsum([3, size - 1, 0, 2 * size + 5, size // 2, 7]))
    tracemalloc.start()
    try:
        for piece in pieces:
            writer.append(piece)
        writer.close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * size * values.itemsize
    record = writer.record()
    array = token_arrays.open_array(tmp_path / "array", record)
    assert record.size == len(values) and np.array_equal(token_arrays.read(array, tmp_path), values)
    assert token_arrays.find_damage(tmp_path / "array", record) == []


def test_zeros_are_stored(tmp_path: Path) -> None:
    """The fill value is written like any other: a missing chunk is damage."""
    with StoreWriter(tmp_path / "s", vocab_size=300) as writer:
        writer.append("train", [np.zeros(100)], 100)
        info = {"vocabulary": {"base_size": 200, "num_sentinels": 10}, "tokenizer_fingerprint": ""}
        writer.commit(info)
    store = Store.open(tmp_path / "s")
    assert store.split("train").tokens(0, 100).tolist() == [0] * 100
    assert store.split("validation").offsets.tolist() == [0]


def test_verification_compares_the_content(tmp_path: Path) -> None:
    """Files of another store, each intact and of the same size."""
    text_store(tmp_path / "s", ["abc"], ["d"])
    text_store(tmp_path / "other", ["abd"], ["d"])
    (tmp_path / "other/train/tokens/c/0").replace(tmp_path / "s/train/tokens/c/0")
    (problem,) = Store.open(tmp_path / "s").find_damage()
    assert "not those that were written" in problem
