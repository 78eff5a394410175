"""Preparation by several processes gives the same bytes for any number of workers and kills."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t5x_like.config import CausalLM, CorpusConfig, DataConfig, TokenizerConfig
from t5x_like.data.sources import corpus_reader, validation_split, work_units
from t5x_like.data.store import prepare as preparing
from t5x_like.data.store import shards, worker_pool
from t5x_like.data.store.prepare import prepare
from t5x_like.data.store.store_paths import store_paths
from t5x_like.data.store.token_store import StoreWriter
from t5x_like.errors import DataError

REPOSITORY = Path(__file__).parents[2]


def silent(line: str) -> None:
    del line


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide small corpora into many units, and give them to worker processes."""
    monkeypatch.setattr(work_units, "MIN_UNIT_BYTES", 2000)
    monkeypatch.setattr(preparing, "SMALL_BYTES", 0)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Return a corpus of files of every format, about 20 units of 2,000 bytes."""
    lines = [f"Line {i} of a text in which words come again and again, {i * i % 97} times.\n" for i in range(400)]
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("".join(lines[number::40]))
    rows = [json.dumps({"text": "".join(lines[i::50]), "q": f"question {i}?"}) for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["".join(lines[i::60]) for i in range(60)], "q": [f"q {i}" for i in range(60)]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=7)
    return DataConfig(
        corpus=CorpusConfig(
            files=(str(tmp_path / "*.txt"), str(tmp_path / "*.jsonl"), str(tmp_path / "*.parquet")),
            validation_fraction=0.1,
        ),
        tokenizer=TokenizerConfig(vocab_size=320),
        layout="causal_lm",
        mixture=(CausalLM(),),
        inputs_length=8,
        targets_length=8,
        store_dir=str(tmp_path / "stores"),
    )


def elsewhere(data: DataConfig, name: str) -> DataConfig:
    return dataclasses.replace(data, store_dir=f"{data.store_dir}-{name}")


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_number_of_workers_does_not_change_the_store(data: DataConfig, small_units: None) -> None:
    (one,) = prepare(data, report=silent, workers=1)
    assert len(corpus_reader.list_work_units(data.corpus)) > 10
    for number in (2, 3):
        (other,) = prepare(elsewhere(data, str(number)), report=silent, workers=number)
        assert contents(other.path) == contents(one.path)  # type: ignore[arg-type]
        assert not Path(f"{other.path}.partial").exists()
    assert one.split("train").num_documents + one.split("validation").num_documents == 113


SLOW = """
import time
from t5x_like.data.sources import work_units
from t5x_like.data.store import prepare as preparing, shards
work_units.MIN_UNIT_BYTES, preparing.SMALL_BYTES = 2000, 0
"""


@pytest.mark.parametrize("workers_", [1, 2])
def test_next_call_resumes_after_a_kill(data: DataConfig, small_units: None, workers_: int, tmp_path: Path) -> None:
    (undisturbed,) = prepare(elsewhere(data, "undisturbed"), report=silent, workers=1)
    (path,) = store_paths(data)
    folder = Path(f"{path}.partial") / "parts"
    made: set[str] = set()
    for _ in range(3):
        # Each shard waits before it is made. The hook reaches the workers by sitecustomize in PYTHONPATH.
        (tmp_path / "hook").mkdir(exist_ok=True)
        (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "hook"), str(REPOSITORY)])}
        code = f"{SLOW}\nfrom t5x_like.config import *\npreparing.prepare({data!r}, workers={workers_})"
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment)
        before = set(made)
        deadline = time.monotonic() + 60
        while len(made) < len(before) + 2 and process.poll() is None and time.monotonic() < deadline:
            made = {file.name for file in folder.glob("*.json")}
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGTERM and b"Traceback" not in errors, errors
        made = {file.name for file in folder.glob("*.json")}
        assert made >= before and len(made) >= len(before) + 2
    times = {file: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    lines: list[str] = []
    made_again: list[int] = []
    real = shards.make_shard

    def counted(job: shards.ShardJob, index: int, *rest: object, **keywords: object) -> None:
        made_again.append(index)
        real(job, index, *rest, **keywords)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "make_shard", counted)
        (store,) = prepare(data, report=lines.append, workers=1)
    assert any(line.startswith("resuming: ") for line in lines)
    assert len(made_again) == len(corpus_reader.list_work_units(data.corpus)) - len(times)
    assert contents(store.path) == contents(undisturbed.path)  # type: ignore[arg-type]


HOOK = """
import sys
def slow():
    import time
    from t5x_like.data.store import shards
    real = shards.make_shard
    def make_shard(*arguments, **keywords):
        time.sleep(0.1)
        real(*arguments, **keywords)
    shards.make_shard = make_shard
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "t5x_like.data.store.worker_pool":
            sys.meta_path.remove(Finder)
            slow()
sys.meta_path.insert(0, Finder)
"""


def test_damaged_or_foreign_shards_are_not_reused(data: DataConfig, small_units: None) -> None:
    (undisturbed,) = prepare(elsewhere(data, "undisturbed"), report=silent, workers=1)
    (path,) = store_paths(data)

    class Stop(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreWriter, "commit", stop)
        with pytest.raises(Stop):
            prepare(data, report=silent, workers=1)
    folder = Path(f"{path}.partial") / "parts"
    damaged, foreign = sorted(folder.glob("*.tokens"))[:2]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    marker = foreign.with_name(foreign.name.replace("-00.tokens", ".json"))
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"key": "another"}))
    foreign.write_bytes(b"")
    (store,) = prepare(data, report=silent, workers=1)
    assert contents(store.path) == contents(undisturbed.path)  # type: ignore[arg-type]


def test_first_error_is_reported_for_any_number_of_workers(data: DataConfig, small_units: None, tmp_path: Path) -> None:
    rows = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
    rows[21], rows[44] = b'{"text": "\xff"}', b"no JSON"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    # Nothing is held out, so only the workers read the first documents.
    bytes_only = TokenizerConfig(kind="bytes")
    data = dataclasses.replace(
        data, tokenizer=bytes_only, corpus=dataclasses.replace(data.corpus, validation_fraction=0.0)
    )
    for number in (1, 2):
        with pytest.raises(DataError, match=r"a.jsonl:22: found invalid UTF-8"):
            prepare(elsewhere(data, str(number)), report=silent, workers=number)
    skipping = dataclasses.replace(data, corpus=dataclasses.replace(data.corpus, invalid_utf8="skip"))
    with pytest.raises(DataError, match=r"a.jsonl:45: invalid JSON"):
        prepare(skipping, report=silent, workers=2)
    rows[44] = b"{}"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    with pytest.raises(DataError, match=r"a.jsonl:45: found the fields none, expected 'text'"):
        prepare(skipping, report=silent, workers=2)


def test_killed_worker_is_reported_and_finished_shards_are_kept(data: DataConfig, small_units: None) -> None:
    real = worker_pool._WorkerProcess.make

    def make(self: worker_pool._WorkerProcess, index: int, unit: work_units.WorkUnit) -> object:
        if index == 5:
            os.kill(self._process.pid, signal.SIGKILL)
        return real(self, index, unit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_pool._WorkerProcess, "make", make)
        with pytest.raises(DataError, match=r"a worker process ended by signal 9.*finished shards are kept"):
            prepare(data, report=silent, workers=2)
    lines: list[str] = []
    prepare(data, report=lines.append)
    assert any(line.startswith("resuming: ") for line in lines)


def test_segment_size_does_not_change_the_store(
    data: DataConfig, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = prepare(data, report=silent, workers=1)
    monkeypatch.setattr(shards, "_SEGMENT_TOKENS", 100)
    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", 300)
    (other,) = prepare(elsewhere(data, "segments"), report=silent, workers=1)
    assert contents(other.path) == contents(whole.path)  # type: ignore[arg-type]


def test_pairs_are_prepared_by_any_number_of_workers(data: DataConfig, small_units: None, tmp_path: Path) -> None:
    files = (str(tmp_path / "*.jsonl"), str(tmp_path / "*.parquet"))
    pairs = dataclasses.replace(
        data, corpus=CorpusConfig(files=files, inputs_field="q", validation_fraction=0.1, max_documents=70)
    )
    stores = [prepare(elsewhere(pairs, str(number)), report=silent, workers=number)[0] for number in (1, 2)]
    one, two = stores
    assert contents(one.path) == contents(two.path)  # type: ignore[arg-type]
    assert one.sequences_per_document == 2
    train, validation = one.split("train"), one.split("validation")
    assert train.num_documents + validation.num_documents == 70 and validation.num_documents == 7
    offsets = train.offsets.astype(int)
    assert len(offsets) == 2 * train.num_documents + 1
    sides = [one.tokenizer.decode(train.tokens(a, b).tolist()) for a, b in zip(offsets, offsets[1:], strict=False)]
    questions, answers = sides[::2], sides[1::2]
    assert all(question.startswith("q") for question in questions) and not any(a.startswith("q") for a in answers)
    assert one.tokenizer.eos_id not in train.tokens(0, train.num_tokens)
    assert train.num_bytes == len("".join(sides).encode())


def test_truncated_gzip_keeps_finished_shards(data: DataConfig, small_units: None, tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(b'{"text": "packed %d"}\n' % (i * 7919) for i in range(2000)))
    (tmp_path / "z.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    files = (*data.corpus.files, str(tmp_path / "z.jsonl.gz"))
    corpus = CorpusConfig(files=files, validation_fraction=0.001)
    data = dataclasses.replace(data, corpus=corpus, tokenizer=TokenizerConfig(kind="bytes"))
    for number in (1, 2):
        there = elsewhere(data, str(number))
        # The first documents decide the split rule; a small corpus is read completely for it.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(validation_split, "_MAX_BUFFERED_CHARACTERS", 1000)
            with pytest.raises(DataError, match=r"z.jsonl.gz: found a truncated or damaged gzip file"):
                prepare(there, report=silent, workers=number)
        (path,) = store_paths(there)
        made = list((Path(f"{path}.partial") / "parts").glob("*.json"))
        assert len(made) == len(corpus_reader.list_work_units(corpus)) - 1
