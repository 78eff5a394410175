"""Token stores: what is written is read, half of one is none, damage is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_examples import numbered_store, text_store

from t5x_like.config import DataError
from t5x_like.data import store as stores
from t5x_like.data.store import Store, StoreWriter, is_committed


def test_tokens_offsets_and_counts(tmp_path: Path) -> None:
    store = text_store(tmp_path / "s", ["ab", "é"], ["xyz"])
    train = store.split("train")
    assert train.tokens(0, 6).tolist() == [100, 101, 1, 198, 172, 1]
    assert train.offsets.tolist() == [0, 3, 6]
    assert (train.num_documents, train.num_tokens, train.num_bytes) == (2, 6, 4)
    assert store.split("validation").num_bytes == 3
    counts = train.token_counts(store.vocabulary.vocab_size)
    assert counts[1] == 2 and counts[100] == 1 and counts.sum() == 6
    assert store.tokenizer.decode(train.tokens(0, 6).tolist()) == "abé"
    assert store.info["dtype"] == "uint16"


@pytest.mark.parametrize("in_memory", [True, False])
def test_gather_wraps_and_crosses_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool) -> None:
    monkeypatch.setattr(stores, "_SHARD", 256)
    monkeypatch.setattr(stores, "_CHUNK", 64)
    monkeypatch.setattr(stores, "IN_MEMORY_BYTES", 2**30 if in_memory else 0)
    path = tmp_path / "s"
    with StoreWriter(path, vocab_size=70_000) as writer:
        rest = np.arange(1000)
        for size in (1, 300, 0, 255, 444):  # appended in pieces that end anywhere
            part, rest = rest[:size], rest[size:]
            writer.append("train", [part], size)
        info = {"vocabulary": {"base_size": 69_000, "num_sentinels": 10}, "tokenizer_fingerprint": ""}
        writer.commit(info, tokenizer_model=None)
    store = Store.open(path)
    assert store.info["dtype"] == "uint32"
    assert len(list((path / "train" / "tokens" / "c").iterdir())) == 4
    rows = store.split("train").gather(np.array([0, 250, 990]), 20)
    assert rows.tolist() == [list(range(20)), list(range(250, 270)), [*range(990, 1000), *range(10)]]
    assert store.split("train").tokens(255, 258).tolist() == [255, 256, 257]


def test_a_store_that_is_not_there_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no token store.*t5x-like prepare RECIPE"):
        Store.open(tmp_path / "none")


def test_a_half_written_store_is_refused_and_the_next_writer_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "s"
    writer = StoreWriter(path, vocab_size=300)
    writer.append("train", [np.arange(5)], 5)  # and the process dies here
    with pytest.raises(DataError, match="a half-written token store"):
        Store.open(path)
    store = numbered_store(path, 50)
    assert store.split("train").num_tokens == 50
    assert not writer.partial.exists()


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "s", vocab_size=300):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["marker", "info", "version"])
def test_what_is_not_committed_is_no_store(tmp_path: Path, damage: str) -> None:
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
    with pytest.raises(DataError, match="half-written"):
        Store.open(path)


def test_a_flipped_bit_is_an_error_and_no_token(tmp_path: Path) -> None:
    path = numbered_store(tmp_path / "s", 5000).path
    (shard,) = [file for file in (path / "train" / "tokens" / "c").iterdir()]
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="unreadable.*prepare"):
        Store.open(path).split("train").tokens(0, 10)


def test_fingerprint_is_of_the_tokens(tmp_path: Path) -> None:
    one = text_store(tmp_path / "a", ["same text"])
    assert one.fingerprint == text_store(tmp_path / "b", ["same text"]).fingerprint
    assert one.fingerprint != text_store(tmp_path / "c", ["same texT"]).fingerprint
    assert one.fingerprint != text_store(tmp_path / "d", ["same", "text"]).fingerprint
    assert one.fingerprint != text_store(tmp_path / "e", ["same text"], num_sentinels=65).fingerprint


def test_opening_a_store_imports_nothing_heavy(tmp_path: Path) -> None:
    """The time to the first batch is the time of what is imported."""
    path = text_store(tmp_path / "s", ["some text"]).path
    code = f"""
import pathlib, sys
from t5x_like.data.prepare import open_stores
from t5x_like.data.store import Store
store = Store.open(pathlib.Path({str(path)!r}))
assert store.tokenizer.decode(store.split("train").tokens(0, 9).tolist()) == "some text"
print(sorted({{name.partition(".")[0] for name in sys.modules}} & set({HEAVY!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


HEAVY = ("tensorflow", "tensorflow_datasets", "seqio", "jax", "flax", "pyarrow", "apache_beam", "sentencepiece")
