"""Packing plans that `prepare` stores give the rows of plans that are made at the start, and are read by index."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data_examples import data_config, numbered_store, pair_store

from t5x_like.config import CausalLM, DataConfig, MaskedLM, Objective, PrefixLM, SpanCorruption, Supervised
from t5x_like.config.corpus import CorpusConfig
from t5x_like.config.objectives import Layout
from t5x_like.data.store import stored_plan, token_arrays
from t5x_like.data.store import token_store as stores
from t5x_like.data.store.prepare import open_stores, prepare, verify_stores
from t5x_like.data.store.token_store import Store, StoreWriter
from t5x_like.data.stream import first_fit, packing_planner
from t5x_like.data.stream.packing import PackedRows
from t5x_like.data.stream.packing_planner import PackingPlanner
from t5x_like.data.stream.row_stream import TrainingStream, corpus_key
from t5x_like.errors import DataError
from t5x_like.storage import locations
from t5x_like.utils.progress import ProgressDisplay

LENGTHS = [2, 3, 5, 9, 14, 30, 31, 90, 200, 7, 7, 7, 40, 1, 26] * 6
MIXTURES: dict[Layout, tuple[Objective, ...]] = {
    "encoder_decoder": (SpanCorruption(name="spans", mode="R"), PrefixLM(name="prefix", rate=2.0)),
    "causal_lm": (CausalLM(),),
    "encoder": (MaskedLM(),),
}


def documents(layout: Layout, mixture: tuple[Objective, ...]) -> DataConfig:
    return dataclasses.replace(data_config(layout, mixture), example_mode="documents")


def planner_of(store: Store, data: DataConfig) -> PackingPlanner:
    objectives = data.objectives_of(data.sources[0])
    return PackingPlanner(store.split("train"), store.sequences_per_document, data, objectives, corpus_key(data, 0))


def save_plan(store: Store, data: DataConfig) -> None:
    planner_of(store, data).store(ProgressDisplay(store.split("train").num_documents, "packing"))


def unused(*arguments: Any) -> None:
    raise AssertionError("a plan that is stored was made again")


def same_stream(one: TrainingStream, other: TrainingStream) -> None:
    """Assert that two streams have equal rows, in two epochs and in any order, and equal counts."""
    assert one.fingerprint == other.fingerprint and one.rows_per_epoch == other.rows_per_epoch
    rows = sum(one.rows_per_epoch.values())
    index = np.random.default_rng(0).permutation(2 * rows)
    features, expected = one.get_rows(index), other.get_rows(index)
    for name, values in expected.items():
        np.testing.assert_array_equal(features[name], values, name)
    readers = [stream.sources[0].reader for stream in (one, other)]
    assert readers[0].totals == readers[1].totals
    assert readers[0].totals.examples > readers[0].num_rows > 1


@pytest.fixture(params=[True, False], ids=["in memory", "by index"])
def in_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Small chunks; the second time nothing is held in memory."""
    monkeypatch.setattr(token_arrays, "SHARD_TOKENS", 64)
    monkeypatch.setattr(token_arrays, "CHUNK_TOKENS", 16)
    for module in (stores, stored_plan):
        monkeypatch.setattr(module, "IN_MEMORY_BYTES", 2**20 if request.param else 0)
    return bool(request.param)


@pytest.mark.parametrize("layout", list(MIXTURES))
def test_rows_of_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool, layout: Layout) -> None:
    store, data = numbered_store(tmp_path / "s", sum(LENGTHS), lengths=LENGTHS), documents(layout, MIXTURES[layout])
    made = TrainingStream([store], data, 4)
    save_plan(store, data)
    monkeypatch.setattr(PackingPlanner, "make", unused)
    same_stream(TrainingStream([Store.open(store.path)], data, 4), made)


@pytest.mark.parametrize("layout", ["encoder_decoder", "causal_lm"])
def test_rows_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool, layout: Layout) -> None:
    lengths = [(int(a), int(b)) for a, b in np.random.default_rng(0).integers(1, 40, (80, 2))] + [(100, 3), (4, 0)]
    store, _ = pair_store(tmp_path / "s", lengths)
    data = documents(layout, (Supervised(mode="S"),))
    made = TrainingStream([store], data, 4)
    assert made.sources[0].reader.totals.truncated and made.sources[0].reader.totals.too_short
    save_plan(store, data)
    monkeypatch.setattr(PackingPlanner, "make", unused)
    same_stream(TrainingStream([Store.open(store.path)], data, 4), made)


def test_plan_of_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool) -> None:
    """Parts are made by the number of documents, and by that of examples where documents are long."""
    store, data = numbered_store(tmp_path / "s", sum(LENGTHS), lengths=LENGTHS), documents("causal_lm", (CausalLM(),))
    monkeypatch.setattr(packing_planner, "DOCUMENTS_PER_PART", 25)
    monkeypatch.setattr(first_fit, "LANES", 3)
    by_documents = TrainingStream([store], data, 4)
    save_plan(store, data)
    with monkeypatch.context() as context:
        context.setattr(PackingPlanner, "make", unused)
        same_stream(TrainingStream([Store.open(store.path)], data, 4), by_documents)
    monkeypatch.setattr(packing_planner, "EXAMPLES_PER_PART", 4)
    by_examples = TrainingStream([store], data, 4)
    assert by_examples.fingerprint != by_documents.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"inputs_length": 50},
        {"mixture": (SpanCorruption(name="spans", mode="R"), PrefixLM(name="prefix", rate=3.0))},
    ],
)
def test_plan_of_other_settings_is_not_used(tmp_path: Path, change: dict[str, Any]) -> None:
    store = numbered_store(tmp_path / "s", sum(LENGTHS), lengths=LENGTHS)
    data = documents("encoder_decoder", MIXTURES["encoder_decoder"])
    save_plan(store, data)
    other = dataclasses.replace(data, **change)
    assert planner_of(store, data).is_stored() and not planner_of(store, other).is_stored()
    assert TrainingStream([store], other, 4).fingerprint != TrainingStream([store], data, 4).fingerprint


def test_plan_in_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    url = locations.Url("memory://bucket/plans/s")
    store = numbered_store(url, sum(LENGTHS), lengths=LENGTHS)  # type: ignore[arg-type]
    data = documents("causal_lm", (CausalLM(),))
    made = TrainingStream([store], data, 4)
    save_plan(store, data)
    monkeypatch.setattr(PackingPlanner, "make", unused)
    monkeypatch.setattr(stored_plan, "IN_MEMORY_BYTES", 0)
    same_stream(TrainingStream([Store.open(url)], data, 4), made)


@pytest.fixture
def prepared(tmp_path: Path) -> DataConfig:
    texts = [f"{number} " * (1 + number % 7) for number in range(60)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = CorpusConfig(files=(str(tmp_path / "corpus.jsonl"),), validation_fraction=0.1)
    data = documents("causal_lm", (CausalLM(),))
    return dataclasses.replace(data, corpus=corpus, store_dir=str(tmp_path / "stores"))


def plan_folder(data: DataConfig) -> Path:
    (store,) = open_stores(data)
    (folder,) = (Path(str(store.path)) / "train" / "packing").iterdir()
    return folder


def test_prepare_stores_the_plan_once(prepared: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    prepare(prepared, report=lines.append)
    assert sum("packed" in line for line in lines) == 1
    folder = plan_folder(prepared)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    lines.clear()
    prepare(prepared, report=lines.append)
    assert not any("packed" in line for line in lines)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    monkeypatch.setattr(PackingPlanner, "make", unused)
    TrainingStream(open_stores(prepared), prepared, 4)
    prepare(dataclasses.replace(prepared, seed=1), report=lines.append)
    assert sum("packed" in line for line in lines) == 1, "another seed has another plan"


def test_plan_that_was_not_finished_is_made_again(prepared: DataConfig) -> None:
    prepare(prepared, report=lambda line: None)
    folder = plan_folder(prepared)
    (folder / "plan.json").unlink()
    made = TrainingStream(open_stores(prepared), prepared, 4)
    prepare(prepared, report=lambda line: None)
    same_stream(TrainingStream(open_stores(prepared), prepared, 4), made)
    assert plan_folder(prepared) == folder


def flip_byte(folder: Path) -> None:
    (file,) = (folder / "examples" / "c").iterdir()
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)


def point_outside(folder: Path) -> None:
    """Another plan's arrays, with correct checksums: an example is beyond the tokens."""
    identity = json.loads((folder / "plan.json").read_text())["identity"]
    totals = stored_plan.PlanTotals.model_validate(json.loads((folder / "plan.json").read_text())["totals"])
    writer = stored_plan.StoredPlanWriter(folder.parents[1], identity)
    writer.examples.append(np.full(2 * totals.examples, 2**30, np.uint64))
    writer.first_example.append(np.minimum(np.arange(totals.rows + 1), totals.examples).astype(np.uint64))
    writer.commit(totals)


def replace_totals(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / "plan.json").read_text())
    change(document["totals"])
    (folder / "plan.json").write_text(json.dumps(document))


def shorten(folder: Path) -> None:
    """Another plan's arrays, with correct checksums: there are fewer words than the totals say."""
    document = json.loads((folder / "plan.json").read_text())
    totals = stored_plan.PlanTotals.model_validate(document["totals"])
    writer = stored_plan.StoredPlanWriter(folder.parents[1], document["identity"])
    writer.examples.append(np.zeros(2, np.uint64))
    writer.first_example.append(np.minimum(np.arange(totals.rows + 1), totals.examples).astype(np.uint64))
    writer.commit(totals)


def point_before(folder: Path) -> None:
    """As `shorten`, with rows whose first examples are negative as signed integers."""
    document = json.loads((folder / "plan.json").read_text())
    totals = stored_plan.PlanTotals.model_validate(document["totals"])
    writer = stored_plan.StoredPlanWriter(folder.parents[1], document["identity"])
    writer.examples.append(np.zeros(2 * totals.examples, np.uint64))
    writer.first_example.append(np.arange(totals.rows + 1).astype(np.uint64) + np.uint64(2**64 - 2**10))
    writer.commit(totals)


def without_rows(folder: Path) -> None:
    document = json.loads((folder / "plan.json").read_text())
    writer = stored_plan.StoredPlanWriter(folder.parents[1], document["identity"])
    writer.first_example.append(np.zeros(1, np.uint64))
    objectives = document["totals"]["objectives"]
    writer.commit(stored_plan.PlanTotals.model_validate({"rows": 0, "examples": 0, "objectives": objectives}))


RIGHT_SUMS = (point_outside, shorten, point_before, without_rows)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shorten, "places of rows outside"),
        (point_before, "places of rows outside"),
        (without_rows, "0 rows of "),
        (lambda folder: replace_totals(folder, lambda totals: totals.update(objectives=[])), "of 0 objectives"),
        (flip_byte, "unreadable"),
        (point_outside, "an example outside of the"),
        (lambda folder: (folder / "plan.json").write_text("{}"), "expected a packing plan"),
        (lambda folder: (folder / "first_example" / "zarr.json").unlink(), "found no zarr.json"),
    ],
)
def test_damaged_plan_is_refused_and_made_again(
    prepared: DataConfig, damage: Callable[[Path], Any], message: str
) -> None:
    prepare(prepared, report=lambda line: None)
    made = TrainingStream(open_stores(prepared), prepared, 4)
    made.get_rows(np.arange(3))
    folder = plan_folder(prepared)
    damage(folder)
    with pytest.raises(DataError, match=message):
        TrainingStream(open_stores(prepared), prepared, 4).get_rows(np.arange(3))
    if damage not in RIGHT_SUMS and "objectives" not in message:  # The checksums of these are correct.
        with pytest.raises(DataError, match="packing"):
            verify_stores(prepared, report=lambda line: None)
    stored_plan.locations.remove(folder)
    prepare(prepared, report=lambda line: None)
    same_stream(TrainingStream(open_stores(prepared), prepared, 4), made)
    verify_stores(prepared, report=lambda line: None)


def test_memory_of_a_plan_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when the plan is made nor when rows of it are read."""
    monkeypatch.setattr(packing_planner, "DOCUMENTS_PER_PART", 2**12)
    monkeypatch.setattr(token_arrays, "SHARD_TOKENS", 2**12)
    monkeypatch.setattr(token_arrays, "CHUNK_TOKENS", 2**10)
    monkeypatch.setattr(stored_plan, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(stores, "IN_MEMORY_BYTES", 0)
    data = documents("causal_lm", (CausalLM(),))
    peaks = []
    for parts in (2, 6):
        lengths = np.random.default_rng(0).integers(3, 90, parts * 2**12).astype(np.uint64)
        path = tmp_path / str(parts)
        with StoreWriter(path, vocab_size=100) as writer:
            writer.extend("train", np.ones(int(lengths.sum()), np.uint16), lengths, 1)
            writer.commit({"vocabulary": {"base_size": 90, "num_sentinels": 0}, "tokenizer_fingerprint": ""})
        store = Store.open(path)
        tracemalloc.start()
        save_plan(store, data)
        made = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        stream = TrainingStream([Store.open(path)], data, 8)
        stream.batch(10**9)
        peaks.append((made, tracemalloc.get_traced_memory()[1] - before))
        tracemalloc.stop()
        reader = stream.sources[0].reader
        assert isinstance(reader, PackedRows) and reader.totals.examples == parts * 2**12
    (made_small, read_small), (made_large, read_large) = peaks
    assert made_large < 1.3 * made_small, "three times as many documents"
    assert read_large < 1.3 * read_small + 2**16
