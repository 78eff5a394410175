"""Sources of text: bad input of every kind has its message with its place; the division holds out what it says."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import CorpusConfig, DataError
from t5x_like.data import corpora, docstrings, documents, python_docs, text_files, units
from t5x_like.data.documents import Document, Reading, divide
from t5x_like.data.progress import Meter


def texts(config: CorpusConfig, reading: Reading | None = None) -> list[str]:
    return [document.text for document in corpora.read(config, reading or Reading())]


def config(*patterns: Path | str, **fields: object) -> CorpusConfig:
    return CorpusConfig(files=tuple(map(str, patterns)), validation_fraction=0.0, **fields)  # type: ignore[arg-type]


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, **columns: list[object]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfwith a mark\n")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    write_jsonl(tmp_path / "c.jsonl", [{"text": "é1"}, {"text": "two", "id": 3}])
    with gzip.open(tmp_path / "d.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "zipped"}\n\n{"text": "again"}\n')
    write_parquet(tmp_path / "e.parquet", text=["row", None, "last"], other=[1, 2, 3])
    reading = Reading()
    found = texts(config(tmp_path / "*.txt", tmp_path / "[c-e].*", tmp_path / "a.txt"), reading)
    assert found == ["first", "with a mark\n", "é1", "two", "zipped", "again", "row", "last"]
    assert reading.left_out == {"empty": 1}
    assert texts(config(tmp_path / "*.txt", max_documents=1)) == ["first"]
    other = write_jsonl(tmp_path / "f.jsonl", [{"body": "named"}])
    assert texts(config(other, text_field="body")) == ["named"]


BAD_JSONL = {
    '{"text": "fine"}\n{"text": "cut': r"bad.jsonl:2: found no JSON",
    '{"text": "fine"}\n["a"]\n': r"bad.jsonl:2: found a JSON list, expected an object",
    '{"body": "x", "id": 1}\n': r"bad.jsonl:1: found the fields 'body', 'id', expected 'text'",
    '{"text": 7}\n': r"bad.jsonl:1: found 'text' of type int, expected a string",
    '{"text": "\\ud800"}\n': r"bad.jsonl:1: found invalid UTF-8",
    "": r"found no document with text \(no documents at all\)",
    '{"text": ""}\n{"text": " \\n"}\n': r"found no document with text \(2 left out: empty\)",
}


@pytest.mark.parametrize("content", BAD_JSONL)
def test_bad_json_lines(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=BAD_JSONL[content]):
        texts(config(path))


def test_invalid_utf8_is_refused_with_its_place_or_counted(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n{"text": "three"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: found invalid UTF-8.*--data.corpus.invalid-utf8 skip"):
        texts(config(lines))
    reading = Reading()
    assert texts(config(lines, invalid_utf8="skip"), reading) == ["one", "three"]
    assert reading.left_out == {"invalid UTF-8": 1}
    (tmp_path / "b.txt").write_bytes(b"fine\nfine\n\xc3(")
    with pytest.raises(DataError, match=r"b.txt:3: found invalid UTF-8"):
        texts(config(tmp_path / "b.txt"))


def test_files_that_are_not_there_or_not_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found no file that matches '.*/\*.txt' \(seen from "):
        texts(config(tmp_path / "*.txt"))
    with pytest.raises(DataError, match=r"found a folder, expected files; name them by a glob"):
        texts(config(tmp_path))
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(DataError, match=r"a.csv: found an unknown kind of file, expected one of .txt, .jsonl"):
        texts(config(tmp_path / "a.csv"))
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"a.txt: found a link to nothing"):
        texts(config(tmp_path / "*.txt"))


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(5000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut.jsonl.gz: found a truncated or damaged gzip file"):
        texts(config(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "none.jsonl.gz").write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(DataError, match=r"none.jsonl.gz: found no gzip data"):
        texts(config(tmp_path / "none.jsonl.gz"))


def test_bad_parquet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.parquet: found the columns 'body', 'n', expected 'text'"):
        texts(config(write_parquet(tmp_path / "a.parquet", body=["x"], n=[1])))
    with pytest.raises(DataError, match=r"b.parquet: found the column 'text' of type int64, expected strings"):
        texts(config(write_parquet(tmp_path / "b.parquet", text=[1])))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"c.parquet: found no Parquet file"):
        texts(config(tmp_path / "c.parquet"))


def test_many_documents_are_divided_by_their_hash() -> None:
    documents = [Document(f"document {i}") for i in range(4000)]
    divided = list(divide(documents, 0.1))
    assert [document.text for document in divided] == [document.text for document in documents]
    held_out = {document.text for document in divided if document.split == "validation"}
    assert 320 < len(held_out) < 480
    fewer = {document.text for document in divide(documents[::-1][:2000], 0.1) if document.split == "validation"}
    assert fewer == held_out & {document.text for document in documents[2000:]}


def test_few_documents_are_divided_exactly() -> None:
    divided = list(divide([Document(f"document {i}") for i in range(60)], 0.1))
    assert sum(document.split == "validation" for document in divided) == 6
    assert len(divided) == 60


def test_one_document_gives_its_last_lines() -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    train, validation = divide([Document(text)], 0.05)
    assert (train.split, validation.split) == ("train", "validation")
    assert train.text + validation.text == text and train.text.endswith("\n")
    assert 0.03 < len(validation.text) / len(text) < 0.07
    assert [document.split for document in divide([Document("x")], 0.05)] == ["train"]


def test_documents_too_long_to_be_held_give_their_last_lines_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_HELD_CHARACTERS", 5000)
    long = [Document(f"line {number}\n" * 200) for number in range(40)]
    divided = list(divide(long, 0.1))
    assert [document.split for document in divided] == ["train", "validation"] * 40
    assert "".join(document.text for document in divided) == "".join(document.text for document in long)


def test_a_sources_own_division_stands() -> None:
    documents = [Document("a", "train"), Document("b", "validation"), Document("c", "train")]
    assert list(divide(documents, 0.5)) == documents
    assert [document.split for document in divide([Document("a"), Document("b")], 0.0)] == ["train", "train"]


def test_docstrings_in_the_order_of_the_source_without_running_it() -> None:
    source = b'''
"""Module."""
raise SystemExit
class A:
    """Class."""
    def method(self):
        """Method
        continued."""
        def inner():
            "Inner."
if True:
    async def late():
        """Late."""
else:
    def other():
        """ """
'''
    assert docstrings.docstrings(source) == ["Module.", "Class.", "Method\ncontinued.", "Inner.", "Late."]
    assert docstrings.docstrings(b"def broken(:") == []


def test_the_embedded_corpus_is_the_same_twice_and_has_nothing_twice() -> None:
    documents = python_docs.read(packages=False)
    python_docs._read.cache_clear()
    assert python_docs.read(packages=False) == documents
    assert len(documents) > 300 and 1e6 < sum(map(len, documents)) < 1e7
    assert len(set(documents)) == len(documents)
    assert any("list comprehension" in text for text in documents)
    assert not any("unittest.mock" in text and "test_mock" in text for text in documents)


def test_dependencies_are_those_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    required = {requirement.split(">")[0].split("[")[0] for requirement in project["dependencies"]}
    assert set(python_docs.DEPENDENCIES) == required
    installed = python_docs._installed_dependencies()
    assert "numpy" in installed and "pytest" not in installed


def test_a_name_with_the_characters_of_a_glob_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "[draft].txt").write_text("found", encoding="utf-8")
    assert texts(config(tmp_path / "[draft].txt")) == ["found"]


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="pipe.txt: found no regular file"):
        texts(config(tmp_path / "*.txt"))
    with pytest.raises(DataError, match="gone.jsonl: found a link to nothing"):
        texts(config(tmp_path / "*.jsonl"))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="found 2 columns 'text', expected one"):
        texts(config(tmp_path / "twice.parquet"))


def pairs(config: CorpusConfig, reading: Reading | None = None) -> list[tuple[str | None, str]]:
    return [(document.inputs, document.text) for document in corpora.read(config, reading or Reading())]


def test_pairs_of_json_lines_and_parquet(tmp_path: Path) -> None:
    rows: list[object] = [
        {"q": "one?", "a": "1"},
        {"q": " ", "a": "2"},
        {"q": "three?", "a": ""},
        {"q": "é?", "a": "é"},
    ]
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    table = write_parquet(tmp_path / "b.parquet", a=["x", None, "z"], q=["x?", "y?", "z?"])
    reading = Reading()
    of_pairs = {"inputs_field": "q", "text_field": "a"}
    found = pairs(config(lines, table, **of_pairs), reading)
    assert found == [("one?", "1"), ("é?", "é"), ("x?", "x"), ("z?", "z")]
    assert reading.left_out == {"empty": 3}
    with pytest.raises(DataError, match=r"a.jsonl:1: found the fields 'q', 'a', expected 'question'.*inputs-field"):
        pairs(config(lines, inputs_field="question", text_field="a"))
    with pytest.raises(DataError, match=r"b.parquet: found the columns 'a', 'q', expected 'question'.*inputs-field"):
        pairs(config(table, inputs_field="question", text_field="a"))
    blank = write_jsonl(tmp_path / "c.jsonl", rows[1:3])
    with pytest.raises(DataError, match=r"found no document with inputs and targets \(2 left out: empty\)"):
        pairs(config(blank, **of_pairs))


def test_pairs_are_held_out_whole() -> None:
    many = [Document(f"answer {i % 7}", inputs=f"question {i}") for i in range(300)]
    divided = list(divide(many, 0.1))
    assert [document.texts for document in divided] == [document.texts for document in many]
    assert 10 < sum(document.split == "validation" for document in divided) < 60, "inputs count, not targets alone"
    assert [document.split for document in divide(many[:3], 0.1)] == ["train"] * 3, "pairs are not cut"


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=20),
    smallest=st.integers(60, 2000),
    end=st.booleans(),
    mark=st.booleans(),
)
def test_ranges_of_a_file_have_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], smallest: int, end: bool, mark: bool
) -> None:
    """However the ends of the ranges and of the lines lie."""
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    written = [f"{number} " + "é" * length for number, length in enumerate(lengths)]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in written]
    path.write_text("\ufeff" * mark + "\n".join(rows) + "\n" * end, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "_SMALLEST", smallest)
        patch.setattr(text_files, "_BLOCK", 64)
        found = corpora.units(config(path))
        assert sum(unit.size for unit in found) == path.stat().st_size
        assert len(found) <= -(-path.stat().st_size // smallest)
        documents = [document for unit in found for document in corpora.read_unit(unit, config(path), Reading())]
    assert [document.text for document in documents] == written


def test_lines_are_counted_from_the_top_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_SMALLEST", 64)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"line {i}"} for i in range(1, 60)] + [["no object"]])
    assert len(corpora.units(config(path))) > 10
    with pytest.raises(DataError, match="a.jsonl:60: found a JSON list"):
        texts(config(path))


def test_units_of_every_kind_hold_all_documents_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [f"row {i}" for i in range(40)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=6)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("".join(f'{{"text": "packed {i}"}}\n' for i in range(9)))
    of = config(tmp_path / "*.txt", tmp_path / "*.parquet", tmp_path / "*.gz")
    whole = texts(of)
    assert len(whole) == 5 + 40 + 9
    monkeypatch.setattr(units, "_SMALLEST", 100)
    divided = corpora.units(of)
    assert len(divided) > 4
    assert [document.text for document in corpora.read_units(divided, of, Reading())] == whole
    for count in (1, 5, 6, 7, 45, 46, 54, 99):
        first = config(*of.files, max_documents=count)
        assert texts(first) == whole[:count]
        assert len(corpora.units(first)) <= len(divided)


def test_progress_says_documents_tokens_their_rate_and_the_time_left() -> None:
    lines: list[str] = []
    with Meter(lines.append, total=1000, every_seconds=0.0) as meter:
        meter.add(1_200, 30_000, 250)
        meter.add(0, 10_000, 250)
    assert re.fullmatch(r"1,200 documents, 30,000 tokens, [\d,]+ tokens/s, \d+ s left", lines[0])
    assert lines[1].startswith("1,200 documents, 40,000 tokens, ")
