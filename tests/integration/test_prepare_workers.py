"""Preparing by several processes: the same bytes whoever did the work, however often they were killed."""

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

from t5x_like.config import CausalLM, CorpusConfig, DataConfig, DataError, TokenizerConfig
from t5x_like.data import corpora, documents, parts, units, workers
from t5x_like.data import prepare as preparing
from t5x_like.data.prepare import prepare, store_paths
from t5x_like.data.store import StoreWriter

REPOSITORY = Path(__file__).parents[2]


def silent(line: str) -> None:
    del line


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small corpora are many units, and go to processes."""
    monkeypatch.setattr(units, "_SMALLEST", 2000)
    monkeypatch.setattr(preparing, "SMALL_BYTES", 0)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Files of every kind, some 20 units of 2,000 bytes."""
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
        store=str(tmp_path / "stores"),
    )


def elsewhere(data: DataConfig, name: str) -> DataConfig:
    return dataclasses.replace(data, store=f"{data.store}-{name}")


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_number_of_workers_changes_no_byte(data: DataConfig, small_units: None) -> None:
    (one,) = prepare(data, report=silent, workers=1)
    assert len(corpora.units(data.corpus)) > 10
    for number in (2, 3):
        (other,) = prepare(elsewhere(data, str(number)), report=silent, workers=number)
        assert contents(other.path) == contents(one.path)  # type: ignore[arg-type]
        assert not Path(f"{other.path}.partial").exists()
    assert one.split("train").num_documents + one.split("validation").num_documents == 113


SLOW = """
import time
from t5x_like.data import parts, prepare as preparing, units
units._SMALLEST, preparing.SMALL_BYTES = 2000, 0
"""


@pytest.mark.parametrize("workers_", [1, 2])
def test_killed_in_the_middle_the_next_call_goes_on(
    data: DataConfig, small_units: None, workers_: int, tmp_path: Path
) -> None:
    (undisturbed,) = prepare(elsewhere(data, "undisturbed"), report=silent, workers=1)
    (path,) = store_paths(data)
    folder = Path(f"{path}.partial") / "parts"
    made: set[str] = set()
    for _ in range(3):
        # Slow parts: each waits before its marker. The hook travels to helpers by PYTHONPATH's sitecustomize.
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
    real = parts.make

    def counted(job: parts.Job, index: int, *rest: object, **keywords: object) -> None:
        made_again.append(index)
        real(job, index, *rest, **keywords)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "make", counted)
        (store,) = prepare(data, report=lines.append, workers=1)
    assert any(line.startswith("going on: ") for line in lines)
    assert len(made_again) == len(corpora.units(data.corpus)) - len(times)
    assert contents(store.path) == contents(undisturbed.path)  # type: ignore[arg-type]


HOOK = """
import sys
def slow():
    import time
    from t5x_like.data import parts
    real = parts.make
    def make(*arguments, **keywords):
        time.sleep(0.1)
        real(*arguments, **keywords)
    parts.make = make
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "t5x_like.data.workers":
            sys.meta_path.remove(Finder)
            slow()
sys.meta_path.insert(0, Finder)
"""


def test_parts_of_another_tokenizer_or_damaged_ones_are_not_used(data: DataConfig, small_units: None) -> None:
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


def test_the_first_error_is_told_whoever_meets_it(data: DataConfig, small_units: None, tmp_path: Path) -> None:
    rows = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
    rows[21], rows[44] = b'{"text": "\xff"}', b"no JSON"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    # Nothing is held out, so that nobody reads the first documents but the workers.
    bytes_only = TokenizerConfig(kind="bytes")
    data = dataclasses.replace(
        data, tokenizer=bytes_only, corpus=dataclasses.replace(data.corpus, validation_fraction=0.0)
    )
    for number in (1, 2):
        with pytest.raises(DataError, match=r"a.jsonl:22: found invalid UTF-8"):
            prepare(elsewhere(data, str(number)), report=silent, workers=number)
    skipping = dataclasses.replace(data, corpus=dataclasses.replace(data.corpus, invalid_utf8="skip"))
    with pytest.raises(DataError, match=r"a.jsonl:45: found no JSON"):
        prepare(skipping, report=silent, workers=2)
    rows[44] = b"{}"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    with pytest.raises(DataError, match=r"a.jsonl:45: found the fields none, expected 'text'"):
        prepare(skipping, report=silent, workers=2)


def test_a_worker_that_is_killed_is_told_and_costs_nothing_finished(data: DataConfig, small_units: None) -> None:
    real = workers._Helper.make

    def make(self: workers._Helper, index: int, unit: units.Unit) -> object:
        if index == 5:
            os.kill(self._process.pid, signal.SIGKILL)
        return real(self, index, unit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers._Helper, "make", make)
        with pytest.raises(DataError, match=r"a worker process ended by signal 9.*finished parts are kept"):
            prepare(data, report=silent, workers=2)
    lines: list[str] = []
    prepare(data, report=lines.append)
    assert any(line.startswith("going on: ") for line in lines)


def test_segments_of_parts_change_no_byte(data: DataConfig, small_units: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = prepare(data, report=silent, workers=1)
    monkeypatch.setattr(parts, "_SEGMENT_TOKENS", 100)
    monkeypatch.setattr(parts, "_BATCH_CHARACTERS", 300)
    (other,) = prepare(elsewhere(data, "segments"), report=silent, workers=1)
    assert contents(other.path) == contents(whole.path)  # type: ignore[arg-type]


def test_the_units_of_a_pair_of_fields_are_pairs(data: DataConfig, small_units: None, tmp_path: Path) -> None:
    files = (str(tmp_path / "*.jsonl"), str(tmp_path / "*.parquet"))
    pairs = dataclasses.replace(
        data, corpus=CorpusConfig(files=files, inputs_field="q", validation_fraction=0.1, max_documents=70)
    )
    stores = [prepare(elsewhere(pairs, str(number)), report=silent, workers=number)[0] for number in (1, 2)]
    one, two = stores
    assert contents(one.path) == contents(two.path)  # type: ignore[arg-type]
    assert one.parts == 2
    train, validation = one.split("train"), one.split("validation")
    assert train.num_documents + validation.num_documents == 70 and validation.num_documents == 7
    offsets = train.offsets.astype(int)
    assert len(offsets) == 2 * train.num_documents + 1
    sides = [one.tokenizer.decode(train.tokens(a, b).tolist()) for a, b in zip(offsets, offsets[1:], strict=False)]
    questions, answers = sides[::2], sides[1::2]
    assert all(question.startswith("q") for question in questions) and not any(a.startswith("q") for a in answers)
    assert one.tokenizer.eos_id not in train.tokens(0, train.num_tokens)
    assert train.num_bytes == len("".join(sides).encode())


def test_a_truncated_gzip_costs_nothing_that_is_finished(data: DataConfig, small_units: None, tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(b'{"text": "packed %d"}\n' % (i * 7919) for i in range(2000)))
    (tmp_path / "z.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    files = (*data.corpus.files, str(tmp_path / "z.jsonl.gz"))
    corpus = CorpusConfig(files=files, validation_fraction=0.001)
    data = dataclasses.replace(data, corpus=corpus, tokenizer=TokenizerConfig(kind="bytes"))
    for number in (1, 2):
        there = elsewhere(data, str(number))
        # The first documents decide on the division: of so few, all are read for it.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents, "_HELD_CHARACTERS", 1000)
            with pytest.raises(DataError, match=r"z.jsonl.gz: found a truncated or damaged gzip file"):
                prepare(there, report=silent, workers=number)
        (path,) = store_paths(there)
        made = list((Path(f"{path}.partial") / "parts").glob("*.json"))
        assert len(made) == len(corpora.units(corpus)) - 1
