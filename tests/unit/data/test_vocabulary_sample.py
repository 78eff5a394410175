"""Text that a vocabulary is trained on: all sides of pairs and all parts of a corpus in proportion."""

import json
from pathlib import Path

import pytest

from t5x_like.config.corpus import CorpusConfig
from t5x_like.data.store.vocabulary_sample import sample_chunks, sample_texts


@pytest.mark.parametrize("times", [0.5, 2, 3, 4, 16, 40])
def test_periodic_texts_are_sampled_in_proportion(times: float) -> None:
    limit = 40_000
    texts = ["input " * 10, "target" * 10] * round(times * limit / 120)
    found = sample_chunks(texts, limit)
    assert sum(map(len, found)) == pytest.approx(min(times, 1) * limit, rel=0.1)
    share = sum(len(text) for text in found if text[0] == "t") / sum(map(len, found))
    assert share == pytest.approx(0.5, abs=0.05)
    long = sample_chunks(["b" * 6000 + "text " * 400] * round(times * 10), 20_000)
    assert any("text" in chunk for chunk in long)


def test_all_files_of_a_large_corpus_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t5x_like.data.sources.work_units.MIN_UNIT_BYTES", 10_000)
    for name in "abc":
        lines = (json.dumps({"source": f"{name} {number}", "target": name * 90}) for number in range(400))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    corpus = CorpusConfig(files=(f"{tmp_path}/*.jsonl",), inputs_field="source", text_field="target")
    found = "".join(sample_texts(corpus, 1500))
    assert {name: found.count(name * 90) > 0 for name in "abc"} == dict.fromkeys("abc", True)
