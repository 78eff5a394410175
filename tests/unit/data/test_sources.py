"""Sources of text: every kind of invalid input is reported with its location, and the split rule is exact."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import CausalLM, CorpusConfig, DataConfig, TokenizerConfig
from t5x_like.data.sources import corpus_reader, python_docs, text_formats, validation_split, work_units
from t5x_like.data.sources.document import Document, ReadStats
from t5x_like.data.sources.validation_split import assign_splits
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import DataError


def texts(config: CorpusConfig, reading: ReadStats | None = None) -> list[str]:
    return [document.text for document in corpus_reader.read_corpus(config, reading or ReadStats())]


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


def test_every_file_format_is_read(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfwith a mark\n")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    write_jsonl(tmp_path / "c.jsonl", [{"text": "é1"}, {"text": "two", "id": 3}])
    with gzip.open(tmp_path / "d.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "zipped"}\n\n{"text": "again"}\n')
    write_parquet(tmp_path / "e.parquet", text=["row", None, "last"], other=[1, 2, 3])
    reading = ReadStats()
    found = texts(config(tmp_path / "*.txt", tmp_path / "[c-e].*", tmp_path / "a.txt"), reading)
    assert found == ["first", "with a mark\n", "é1", "two", "zipped", "again", "row", "last"]
    assert reading.left_out == {"empty": 1}
    assert texts(config(tmp_path / "*.txt", max_documents=1)) == ["first"]
    other = write_jsonl(tmp_path / "f.jsonl", [{"body": "named"}])
    assert texts(config(other, text_field="body")) == ["named"]


BAD_JSONL = {
    '{"text": "fine"}\n{"text": "cut': r"bad.jsonl:2: invalid JSON",
    '{"text": "fine"}\n["a"]\n': r"bad.jsonl:2: found a JSON list, expected an object",
    '{"body": "x", "id": 1}\n': r"bad.jsonl:1: found the fields 'body', 'id', expected 'text'",
    '{"text": 7}\n': r"bad.jsonl:1: found 'text' of type number, expected a string",
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


def test_invalid_utf8_is_refused_with_its_line_or_counted(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n{"text": "three"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: found invalid UTF-8.*--data.corpus.invalid-utf8 skip"):
        texts(config(lines))
    reading = ReadStats()
    assert texts(config(lines, invalid_utf8="skip"), reading) == ["one", "three"]
    assert reading.left_out == {"invalid UTF-8": 1}
    (tmp_path / "b.txt").write_bytes(b"fine\nfine\n\xc3(")
    with pytest.raises(DataError, match=r"b.txt:3: found invalid UTF-8"):
        texts(config(tmp_path / "b.txt"))


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found no file that matches '.*/\*.txt' \(relative to "):
        texts(config(tmp_path / "*.txt"))
    with pytest.raises(DataError, match=r"found a folder, expected files; name them by a glob"):
        texts(config(tmp_path))
    (tmp_path / "a.pdf").write_text("a")
    with pytest.raises(DataError, match=r"a.pdf: found an unsupported file type, expected one of .txt, .jsonl"):
        texts(config(tmp_path / "a.pdf"))
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"a.txt: found a broken symbolic link"):
        texts(config(tmp_path / "*.txt"))


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(5000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut.jsonl.gz: found a truncated or damaged gzip file"):
        texts(config(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "none.jsonl.gz").write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(DataError, match=r"none.jsonl.gz: found a truncated or damaged gzip file"):
        texts(config(tmp_path / "none.jsonl.gz"))


def test_bad_parquet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.parquet: found the fields 'body', 'n', expected 'text'"):
        texts(config(write_parquet(tmp_path / "a.parquet", body=["x"], n=[1])))
    with pytest.raises(DataError, match=r"b.parquet, row 1: found 'text' of type number, expected a string"):
        texts(config(write_parquet(tmp_path / "b.parquet", text=[1])))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"c.parquet: not a Parquet file"):
        texts(config(tmp_path / "c.parquet"))


def test_many_documents_are_split_by_hash() -> None:
    documents = [Document(f"document {i}") for i in range(4000)]
    divided = list(assign_splits(documents, 0.1))
    assert [document.text for document in divided] == [document.text for document in documents]
    held_out = {document.text for document in divided if document.split == "validation"}
    assert 320 < len(held_out) < 480
    fewer = {document.text for document in assign_splits(documents[::-1][:2000], 0.1) if document.split == "validation"}
    assert fewer == held_out & {document.text for document in documents[2000:]}


def test_few_documents_are_split_exactly() -> None:
    divided = list(assign_splits([Document(f"document {i}") for i in range(60)], 0.1))
    assert sum(document.split == "validation" for document in divided) == 6
    assert len(divided) == 60


def test_single_document_holds_out_its_last_lines() -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    train, validation = assign_splits([Document(text)], 0.05)
    assert (train.split, validation.split) == ("train", "validation")
    assert train.text + validation.text == text and train.text.endswith("\n")
    assert 0.03 < len(validation.text) / len(text) < 0.07
    assert [document.split for document in assign_splits([Document("x")], 0.05)] == ["train"]


def test_documents_too_long_to_buffer_hold_out_their_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation_split, "_MAX_BUFFERED_CHARACTERS", 5000)
    long = [Document(f"line {number}\n" * 200) for number in range(40)]
    divided = list(assign_splits(long, 0.1))
    assert [document.split for document in divided] == ["train", "validation"] * 40
    assert "".join(document.text for document in divided) == "".join(document.text for document in long)


def test_splits_of_the_source_are_kept() -> None:
    documents = [Document("a", "train"), Document("b", "validation"), Document("c", "train")]
    assert list(assign_splits(documents, 0.5)) == documents
    assert [document.split for document in assign_splits([Document("a"), Document("b")], 0.0)] == ["train", "train"]


def test_docstrings_are_in_source_order_and_code_is_not_run() -> None:
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
    assert python_docs.docstrings(source) == ["Module.", "Class.", "Method\ncontinued.", "Inner.", "Late."]
    assert python_docs.docstrings(b"def broken(:") == []


def test_embedded_corpus_is_reproducible_and_has_no_repetitions() -> None:
    documents = python_docs.read(packages=False)
    python_docs._read.cache_clear()
    assert python_docs.read(packages=False) == documents
    assert len(documents) > 300 and 1e6 < sum(map(len, documents)) < 1e7
    assert len(set(documents)) == len(documents)
    assert any("list comprehension" in text for text in documents)
    assert not any("unittest.mock" in text and "test_mock" in text for text in documents)


def test_dependencies_match_pyproject() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    required = {requirement.split(">")[0].split("[")[0] for requirement in project["dependencies"]}
    assert set(python_docs.DEPENDENCIES) == required
    installed = python_docs._installed_dependencies()
    assert "numpy" in installed and "pytest" not in installed


def test_existing_file_with_glob_characters_in_its_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "[draft].txt").write_text("found", encoding="utf-8")
    assert texts(config(tmp_path / "[draft].txt")) == ["found"]


def test_special_files_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="pipe.txt: found a special file"):
        texts(config(tmp_path / "*.txt"))
    with pytest.raises(DataError, match="gone.jsonl: found a broken symbolic link"):
        texts(config(tmp_path / "*.jsonl"))


def test_two_columns_with_the_same_name_are_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="found 2 columns 'text', expected one"):
        texts(config(tmp_path / "twice.parquet"))


def pairs(config: CorpusConfig, reading: ReadStats | None = None) -> list[tuple[str | None, str]]:
    return [(document.inputs, document.text) for document in corpus_reader.read_corpus(config, reading or ReadStats())]


def test_pairs_are_read_from_json_lines_and_parquet(tmp_path: Path) -> None:
    rows: list[object] = [
        {"q": "one?", "a": "1"},
        {"q": " ", "a": "2"},
        {"q": "three?", "a": ""},
        {"q": "é?", "a": "é"},
    ]
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    table = write_parquet(tmp_path / "b.parquet", a=["x", None, "z"], q=["x?", "y?", "z?"])
    reading = ReadStats()
    of_pairs = {"inputs_field": "q", "text_field": "a"}
    found = pairs(config(lines, table, **of_pairs), reading)
    assert found == [("one?", "1"), ("é?", "é"), ("x?", "x"), ("z?", "z")]
    assert reading.left_out == {"empty": 3}
    with pytest.raises(DataError, match=r"a.jsonl:1: found the fields 'q', 'a', expected 'question'.*inputs-field"):
        pairs(config(lines, inputs_field="question", text_field="a"))
    with pytest.raises(DataError, match=r"b.parquet: found the fields 'a', 'q', expected 'question'.*inputs-field"):
        pairs(config(table, inputs_field="question", text_field="a"))
    blank = write_jsonl(tmp_path / "c.jsonl", rows[1:3])
    with pytest.raises(DataError, match=r"found no document with inputs and targets \(2 left out: empty\)"):
        pairs(config(blank, **of_pairs))


def test_pairs_are_held_out_completely() -> None:
    many = [Document(f"answer {i % 7}", inputs=f"question {i}") for i in range(300)]
    divided = list(assign_splits(many, 0.1))
    assert [document.texts for document in divided] == [document.texts for document in many]
    assert 10 < sum(document.split == "validation" for document in divided) < 60, "inputs count, not targets alone"
    assert [document.split for document in assign_splits(many[:3], 0.1)] == ["train"] * 3, "pairs are not cut"


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=20),
    smallest=st.integers(60, 2000),
    end=st.booleans(),
    mark=st.booleans(),
)
def test_byte_ranges_of_a_file_contain_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], smallest: int, end: bool, mark: bool
) -> None:
    """The ends of ranges and of lines may be anywhere."""
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    written = [f"{number} " + "é" * length for number, length in enumerate(lengths)]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in written]
    path.write_text("\ufeff" * mark + "\n".join(rows) + "\n" * end, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work_units, "MIN_UNIT_BYTES", smallest)
        patch.setattr(text_formats, "_READ_BYTES", 64)
        found = corpus_reader.list_work_units(config(path))
        assert sum(unit.size for unit in found) == path.stat().st_size
        assert len(found) <= -(-path.stat().st_size // smallest)
        documents = [
            document for unit in found for document in corpus_reader.read_unit(unit, config(path), ReadStats())
        ]
    assert [document.text for document in documents] == written


def test_reported_line_numbers_count_from_the_start_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_units, "MIN_UNIT_BYTES", 64)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"line {i}"} for i in range(1, 60)] + [["no object"]])
    assert len(corpus_reader.list_work_units(config(path))) > 10
    with pytest.raises(DataError, match="a.jsonl:60: found a JSON list"):
        texts(config(path))


def test_work_units_of_every_format_contain_all_documents_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(work_units, "MIN_UNIT_BYTES", 100)
    divided = corpus_reader.list_work_units(of)
    assert len(divided) > 4
    assert [document.text for document in corpus_reader.read_units(divided, of, ReadStats())] == whole
    for count in (1, 5, 6, 7, 45, 46, 54, 99):
        first = config(*of.files, max_documents=count)
        assert texts(first) == whole[:count]
        assert len(corpus_reader.list_work_units(first)) <= len(divided)


def test_invalid_rows_are_quarantined_up_to_the_limit(tmp_path: Path) -> None:
    """Each is listed with its line; the others, in order, are those of the file without the invalid ones."""
    lines = [b'{"text": "one"}', b'{"text": 5}', b"[1]", b'{"text": "two"', b'{"other": ""}', b'{"text": "\xff"}']
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\n".join([*lines, b'{"text": ""}', b'{"text": "three"}']))
    stats = ReadStats()
    allowing = CorpusConfig(files=(str(path),), max_bad_records=5)
    assert [document.text for document in corpus_reader.read_corpus(allowing, stats)] == ["one", "three"]
    assert stats.left_out == {"quarantined": 5, "empty": 1}
    assert [message.partition(": ")[0] for message in stats.quarantine] == [f"{path}:{line}" for line in range(2, 7)]
    with pytest.raises(DataError, match=r"t\.jsonl:6: found invalid UTF-8(.|\n)*Found 5 invalid rows.*at most 4"):
        list(corpus_reader.read_corpus(dataclasses.replace(allowing, max_bad_records=4), ReadStats()))


@pytest.mark.parametrize(
    "name, data, where",
    [
        ("t.csv", b"text\none\ntwo,2\nthree\n", ":3"),
        ("t.json", b'[{"text": "one"}, 2, {"text": "three"}]', ", element 2"),
        ("t.conll", b"one X\n\ntwo X\nmore\n\nthree X\n", ":4"),
    ],
)
def test_invalid_rows_of_other_formats(tmp_path: Path, name: str, data: bytes, where: str) -> None:
    (tmp_path / name).write_bytes(data)
    field = "0" if name == "t.conll" else "text"
    config = CorpusConfig(files=(str(tmp_path / name),), text_field=field, max_bad_records=1)
    stats = ReadStats()
    assert [document.text for document in corpus_reader.read_corpus(config, stats)] == ["one", "three"]
    (message,) = stats.quarantine
    assert message.startswith(f"{tmp_path / name}{where}: ")


def test_invalid_rows_of_several_units_count_together(tmp_path: Path) -> None:
    """The limit is one for the corpus; the store lists the rows in the order of the corpus."""
    for name in ("a", "b"):
        rows = [{"text": f"{name} {number}"} for number in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*map(json.dumps, rows), "{"]))
    corpus = CorpusConfig(files=(str(tmp_path / "*.jsonl"),), validation_fraction=0.2, max_bad_records=2)
    tokenizer = TokenizerConfig(kind="bytes", num_sentinels=4)
    data = DataConfig(
        corpus=corpus,
        tokenizer=tokenizer,
        layout="causal_lm",
        mixture=(CausalLM(name="text"),),
        inputs_length=0,
        targets_length=8,
        store_dir=str(tmp_path / "stores"),
    )
    lines: list[str] = []
    (store,) = prepare(data, report=lines.append)
    found = [
        json.loads(line)["error"] for line in (Path(str(store.path)) / "quarantine.jsonl").read_text().splitlines()
    ]
    assert [message.partition(": ")[0] for message in found] == [f"{tmp_path / name}.jsonl:10" for name in "ab"]
    assert store.info["left_out"] == {"quarantined": 2} and any("quarantine.jsonl lists them" in line for line in lines)
    fewer = dataclasses.replace(data, corpus=dataclasses.replace(corpus, max_bad_records=1))
    with pytest.raises(DataError, match="Found 2 invalid rows so far, expected at most 1"):
        prepare(fewer, report=lines.append)
