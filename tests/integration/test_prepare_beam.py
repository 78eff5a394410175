"""Preparation as an Apache Beam pipeline with Beam's runner on this machine.

Beam needs an environment of its own (the `beam` extra), which `make test-beam` creates. Elsewhere only the error
message for a missing Beam is tested.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from t5x_like.config import CausalLM, CorpusConfig, DataConfig, TokenizerConfig
from t5x_like.data.sources import corpus_reader, work_units
from t5x_like.data.store.beam_runner import beam_shard_maker
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import DataError

HAS_BEAM = importlib.util.find_spec("apache_beam") is not None
needs_beam = pytest.mark.skipif(not HAS_BEAM, reason="Apache Beam is not installed; `make test-beam` installs it")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(work_units, "MIN_UNIT_BYTES", 2000)
    rows = [json.dumps({"text": f"Text {i} has words that come again, {i % 7} times. " * 5}) + "\n" for i in range(80)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    return DataConfig(
        corpus=CorpusConfig(files=(str(tmp_path / "a.jsonl"),), validation_fraction=0.0),
        tokenizer=TokenizerConfig(vocab_size=290),
        layout="causal_lm",
        mixture=(CausalLM(),),
        inputs_length=8,
        targets_length=8,
        store_dir=str(tmp_path / "stores"),
    )


def silent(line: str) -> None:
    del line


@pytest.mark.skipif(HAS_BEAM, reason="Apache Beam is installed")
def test_error_without_beam_names_the_extra() -> None:
    with pytest.raises(DataError, match=r"Apache Beam cannot be imported.*pip install 't5x-like\[beam\]'"):
        beam_shard_maker([])


@needs_beam
@pytest.mark.beam
def test_pipeline_and_processes_write_the_same_bytes(data: DataConfig) -> None:
    assert len(corpus_reader.list_work_units(data.corpus)) > 5
    (by_processes,) = prepare(data, report=silent, workers=1)
    other = dataclasses.replace(data, store_dir=data.store_dir + "-beam")
    (by_beam,) = prepare(other, report=silent, make_shards=beam_shard_maker(["--runner=DirectRunner"]))
    for path in sorted(by_processes.path.rglob("*")):  # type: ignore[union-attr]
        if path.is_file():
            assert path.read_bytes() == (by_beam.path / str(path.relative_to(str(by_processes.path)))).read_bytes()


@needs_beam
@pytest.mark.beam
def test_unusable_input_is_reported_with_its_line(data: DataConfig) -> None:
    path = Path(data.corpus.files[0])
    rows = path.read_bytes().splitlines(keepends=True)
    rows[30] = b'{"text": "\xff"}\n'
    path.write_bytes(b"".join(rows))
    bytes_only = dataclasses.replace(data, tokenizer=TokenizerConfig(kind="bytes"))
    with pytest.raises(DataError, match=r"a.jsonl:31: found invalid UTF-8"):
        prepare(bytes_only, report=silent, make_shards=beam_shard_maker(["--runner=DirectRunner"]))
