"""Preparing as an Apache Beam pipeline, by Beam's runner on this machine. Needs the extra `beam`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from t5x_like.config import CausalLM, CorpusConfig, DataConfig, DataError, TokenizerConfig
from t5x_like.data import units
from t5x_like.data.beam import make_parts_by
from t5x_like.data.prepare import prepare


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(units, "_SMALLEST", 2000)
    rows = [json.dumps({"text": f"Text {i} has words that come again, {i % 7} times. " * 5}) + "\n" for i in range(80)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    return DataConfig(
        corpus=CorpusConfig(files=(str(tmp_path / "a.jsonl"),), validation_fraction=0.0),
        tokenizer=TokenizerConfig(vocab_size=290),
        layout="causal_lm",
        mixture=(CausalLM(),),
        inputs_length=8,
        targets_length=8,
        store=str(tmp_path / "stores"),
    )


def silent(line: str) -> None:
    del line


def test_without_beam_the_error_names_the_extra() -> None:
    try:
        import apache_beam  # noqa: F401
    except ImportError:
        with pytest.raises(DataError, match=r"found no Apache Beam.*pip install 't5x-like\[beam\]'"):
            make_parts_by([])


def test_a_pipeline_and_processes_make_the_same_bytes(data: DataConfig) -> None:
    pytest.importorskip("apache_beam")
    assert len(units_of(data)) > 5
    (by_processes,) = prepare(data, report=silent, workers=1)
    other = dataclasses.replace(data, store=data.store + "-beam")
    (by_beam,) = prepare(other, report=silent, make_parts=make_parts_by(["--runner=DirectRunner"]))
    for path in sorted(by_processes.path.rglob("*")):  # type: ignore[union-attr]
        if path.is_file():
            assert path.read_bytes() == (by_beam.path / str(path.relative_to(str(by_processes.path)))).read_bytes()


def units_of(data: DataConfig) -> list[units.Unit]:
    from t5x_like.data import corpora

    return corpora.units(data.corpus)


def test_bad_input_has_its_one_message(data: DataConfig) -> None:
    pytest.importorskip("apache_beam")
    path = Path(data.corpus.files[0])
    rows = path.read_bytes().splitlines(keepends=True)
    rows[30] = b'{"text": "\xff"}\n'
    path.write_bytes(b"".join(rows))
    bytes_only = dataclasses.replace(data, tokenizer=TokenizerConfig(kind="bytes"))
    with pytest.raises(DataError, match=r"a.jsonl:31: found invalid UTF-8"):
        prepare(bytes_only, report=silent, make_parts=make_parts_by(["--runner=DirectRunner"]))
