"""File formats: the same rows give the same documents in every format, and damaged or unknown files are refused."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from t5x_like.config import CorpusConfig
from t5x_like.data.sources import corpus_reader, generators, text_formats, work_units
from t5x_like.data.sources.document import ReadStats
from t5x_like.data.sources.generators import register_corpus
from t5x_like.errors import ConfigError, DataError, UserError

ROWS: list[dict[str, Any]] = [
    {"en": "one, two", "de": "eins\nzwei", "n": 1},
    {"en": None, "de": "leer", "n": 2},
    {"en": 'é𝄞 "quoted"', "de": "", "n": 3},
    {"en": "last", "de": "letzte", "n": 4},
]
PAIRS = [("one, two", "eins\nzwei"), ("last", "letzte")]


def read(config: CorpusConfig, stats: ReadStats | None = None) -> list[tuple[str | None, str | None, str]]:
    """Return (split, inputs, text) of the documents."""
    stats = stats or ReadStats()
    units = corpus_reader.list_work_units(config)
    return [
        (document.split, document.inputs, document.text) for document in corpus_reader.read_units(units, config, stats)
    ]


def of(*files: Path | str, **fields: Any) -> CorpusConfig:
    return CorpusConfig(files=tuple(map(str, files)), **fields)


def write_rows(folder: Path) -> list[Path]:
    """Write ROWS in every format that has fields and named columns."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    zstd = pyarrow.compress(lines, codec="zstd", asbytes=True)
    files = {
        "a.jsonl": lines,
        "b.JSON": lines,
        "c.json": b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=1).encode(),
        "d.json.gz": gzip.compress(lines),
        "e.jsonl.zst": zstd + zstd[:0],
        "f.json.zst": pyarrow.compress(json.dumps(ROWS).encode(), codec="zstd", asbytes=True),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with open(folder / "g.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["en", "de", "n"])
        writer.writeheader()
        writer.writerows(ROWS)
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, folder / "h.parquet")
    with pyarrow.ipc.new_stream(folder / "i.arrow", table.schema) as stream:
        stream.write_table(table)
    with pyarrow.ipc.new_file(folder / "j.arrow", table.schema) as arrow:
        arrow.write_table(table)
    with array_record(folder / "k.array_record") as write:
        for row in ROWS:
            write(json.dumps(row).encode())
    return sorted(folder.iterdir())


@contextlib.contextmanager
def array_record(path: Path) -> Iterator[Any]:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    yield writer.write
    writer.close()


def test_nulls_empty_texts_and_types_are_the_same_in_every_format(tmp_path: Path) -> None:
    paths = write_rows(tmp_path)
    assert len(paths) == 11
    for path in paths:
        stats = ReadStats()
        found = read(of(path, inputs_field="en", text_field="de"), stats)
        assert [(inputs, text) for _, inputs, text in found] == PAIRS, path
        assert stats.left_out == {"empty": 2}, path
        template = of(path, inputs_field="translate {n}: {en}", text_field="{de}")
        assert [inputs for _, inputs, _ in read(template)] == [
            "translate 1: one, two",
            "translate 2: ",
            "translate 4: last",
        ]
        if path.suffix != ".csv":  # All cells of CSV are text.
            with pytest.raises(DataError, match=r"found 'n' of type number, expected a string"):
                read(of(path, text_field="n"))
        with pytest.raises(DataError, match=r"found the fields 'en', 'de', 'n', expected 'fr'; set .*text-field"):
            read(of(path, text_field="fr"))
        assert [text for _, _, text in read(of(path, text_field="de", max_documents=2))] == ["eins\nzwei", "leer"]


def test_nested_fields_and_templates_of_them(tmp_path: Path) -> None:
    rows = [
        {"translation": {"en": "a", "de": "b"}, "answers": {"text": ["x", "y"]}, "a.b": "dotted"},
        {"translation": None, "answers": None, "a.b": "d"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    for path in (tmp_path / "a.jsonl", tmp_path / "b.parquet"):
        assert read(of(path, inputs_field="translation.en", text_field="{translation.de}{{}}")) == [(None, "a", "b{}")]
        assert read(of(path, text_field="answers.text.1")) == [(None, None, "y")]
        assert [text for _, _, text in read(of(path, text_field="a.b"))] == ["dotted", "d"]
    with pytest.raises(DataError, match=r"a.jsonl:1: found the fields 'en', 'de', expected 'translation.fr'"):
        read(of(tmp_path / "a.jsonl", text_field="translation.fr"))


def test_array_of_json_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_formats, "_READ_BYTES", 7)
    path = tmp_path / "a.json"
    rows = [{"text": f'[{i}, "]"' * (i % 5 + 1), "n": 10**i} for i in range(20)]
    path.write_text(json.dumps(rows))
    assert [text for _, _, text in read(of(path))] == [row["text"] for row in rows]
    for content, problem in (
        ('[{"text": "a"}, {"text": ', "element 2: invalid JSON"),
        ('[{"text": "a"} {"text": "b"}]', "element 1: invalid JSON .no comma"),
        ('[{"text": "a"}] x', "found text after the array"),
        ('[{"text": "a"}, 3]', "element 2: found a JSON int, expected an object"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=problem):
            read(of(path))
    path.write_text("[]")
    assert read(of(path)) == []


def test_tables_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"unbalanced\t1\n')
    assert read(of(tmp_path / "a.tsv")) == [(None, None, '"unbalanced')]
    (tmp_path / "b.csv").write_text("text,label\na\n")
    with pytest.raises(DataError, match=r"b.csv:2: found 1 cells, expected 2 as in the first line"):
        read(of(tmp_path / "b.csv"))
    (tmp_path / "b.csv").write_text("text,text\na,b\n")
    with pytest.raises(DataError, match=r"b.csv:1: found the field 'text' twice"):
        read(of(tmp_path / "b.csv"))
    (tmp_path / "b.csv").write_text('text\n"a" b\n')
    with pytest.raises(DataError, match=r"b.csv:2: invalid CSV"):
        read(of(tmp_path / "b.csv"))
    (tmp_path / "c.csv").write_bytes(b"text\nfine\n\xff\n")
    with pytest.raises(DataError, match=r"c.csv:3: found invalid UTF-8"):
        read(of(tmp_path / "c.csv"))
    stats = ReadStats()
    assert len(read(of(tmp_path / "c.csv", invalid_utf8="skip"), stats)) == 1 and stats.left_out == {"invalid UTF-8": 1}


def test_sentences_of_conll_columns(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n# NN O\n\n\n")
    labels = {"target_kind": "token_labels", "labels": ("O", "B-ORG")}
    found = read(of(tmp_path / "a.conll", inputs_field="0", text_field="-1", **labels))
    assert found == [(None, "EU rejects", "B-ORG O"), (None, "#", "O")]
    row = "{}\t{}\t_\t{}\t_\t_\t0\troot\t_\t_\n"
    (tmp_path / "b.conllu").write_text(
        "# id = 1\n" + row.format("1-2", "zum", "_") + row.format(1, "1 000", "NUM") + row.format(2, "m", "NOUN")
    )
    assert read(of(tmp_path / "b.conllu", inputs_field="form", text_field="upos")) == [
        (None, "1\u00a0000 m", "NUM NOUN")
    ]
    (tmp_path / "a.conll").write_text("a b\nc\n")
    with pytest.raises(DataError, match=r"a.conll:2: found 1 columns, expected 2"):
        read(of(tmp_path / "a.conll", text_field="0"))


def test_lists_are_words_of_token_labels_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"tokens": ["EU", "rejects"], "tags": [3, 0]}\n')
    labels = {"target_kind": "token_labels", "labels": ("0", "3")}
    assert read(of(tmp_path / "a.jsonl", inputs_field="tokens", text_field="tags", **labels)) == [
        (None, "EU rejects", "3 0")
    ]
    with pytest.raises(DataError, match="found 'tokens' of type array, expected a string"):
        read(of(tmp_path / "a.jsonl", text_field="tokens"))


def test_records_of_tensorflow_examples(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    texts = [f"text {i}" for i in range(30)]
    with array_record(tmp_path / "a.array_record") as write:
        for text in texts:
            feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))
            write(tf.train.Example(features=tf.train.Features(feature={"text": feature})).SerializeToString())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work_units, "MIN_UNIT_BYTES", 100)
        config = of(tmp_path / "a.array_record")
        assert len(corpus_reader.list_work_units(config)) > 5
        assert [text for _, _, text in read(config)] == texts
    with array_record(tmp_path / "b.array_record") as write:
        write(b"plain text")
    with pytest.raises(DataError, match="row 1: found b'plain text', expected a JSON object or a tf.train.Example"):
        read(of(tmp_path / "b.array_record"))


def test_pointers_of_git_lfs_are_not_documents(tmp_path: Path) -> None:
    for name in ("a.txt", "b.parquet", "c.jsonl.gz"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
        with pytest.raises(DataError, match="found a Git LFS pointer, .* run `git lfs pull`"):
            read(of(tmp_path / name))


def test_damaged_tables_and_compressed_files_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        if path.suffix in (".gz", ".zst", ".parquet", ".arrow"):
            path.write_bytes(path.read_bytes()[:-30])
            with pytest.raises(DataError, match=f"{path.name}: (found a truncated|not a Parquet|unreadable)"):
                read(of(path, text_field="de"))


def test_files_at_urls(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for number in range(2):
        system.pipe(f"/corpus/{number}.jsonl.gz", gzip.compress(b'{"text": "remote %d"}\n' % number))
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"]}), buffer)
    system.pipe("/corpus/2.parquet", buffer.getvalue().to_pybytes())
    found = read(of("memory://corpus/*.gz", "memory://corpus/2.parquet"))
    assert [text for _, _, text in found] == ["remote 0", "remote 1", "row"]
    with pytest.raises(DataError, match="found no file that matches"):
        read(of("memory://corpus/*.txt"))
    with pytest.raises(DataError, match="unreadable"):
        read(of("memory://corpus/3.txt"))
    with pytest.raises(ConfigError, match=r"found 'nowhere://bucket/a.txt', expected a path, or a URL of gs://"):
        read(of("nowhere://bucket/a.txt"))


def test_explicit_files_of_each_split(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(3)))
    train, dev, test = (str(tmp_path / f"{name}.jsonl") for name in ("train", "dev", "test"))
    found = read(CorpusConfig(files=(train,), validation_files=(dev,), test_files=(test,), max_documents=2))
    assert [(split, text) for split, _, text in found] == [
        ("train", "train 0"), ("train", "train 1"), ("validation", "dev 0"), ("validation", "dev 1"),
        ("test", "test 0"), ("test", "test 1"),
    ]  # fmt: skip
    only_test = corpus_reader.read_corpus(
        CorpusConfig(files=(train,), test_files=(test,), validation_fraction=0.4), ReadStats()
    )
    assert sorted(document.split or "" for document in only_test) == ["test"] * 3 + ["train"] * 2 + ["validation"]


@pytest.mark.external
def test_folders_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(5)]})
        for name in ("train", "validation", "test")
    }
    parts["train"].shuffle(seed=1).save_to_disk(tmp_path / "one", num_shards=2)
    assert sorted(text for _, _, text in read(of(tmp_path / "one"))) == [f"train {i}" for i in range(5)]
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "all")
    assert {split for split, _, _ in read(of(tmp_path / "all"))} == {"train", "validation"}
    found = read(
        of(tmp_path / "all", train_split="test", validation_split="train", test_split="validation", max_documents=1)
    )
    assert [(split, text) for split, _, text in found] == [
        ("train", "test 0"), ("validation", "train 0"), ("test", "validation 0")
    ]  # fmt: skip
    with pytest.raises(DataError, match="found the splits test, train, validation, expected 'dev'"):
        read(of(tmp_path / "all", test_split="dev"))


def test_documents_with_one_key_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"text": f"reference {i}", "source": f"s{i % 7}"} for i in range(70)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = of(tmp_path / "a.jsonl", key_field="source", validation_fraction=0.3)
    splits: dict[str, set[str | None]] = {}
    for document in corpus_reader.read_corpus(config, ReadStats()):
        splits.setdefault(document.key or "", set()).add(document.split)
    assert len(splits) == 7 and all(len(splits_of_key) == 1 for splits_of_key in splits.values())
    assert sum(splits_of_key == {"validation"} for splits_of_key in splits.values()) == 2
    one = of(tmp_path / "a.jsonl", key_field="{source} {text}", validation_fraction=0.001)
    held_out = [
        document.text for document in corpus_reader.read_corpus(one, ReadStats()) if document.split == "validation"
    ]
    assert len(held_out) == 1, "documents with keys are never cut"


@pytest.mark.parametrize("has_rejected", [False, True])
def test_dialogues_with_one_key_are_held_out_together(tmp_path: Path, has_rejected: bool) -> None:
    def row(number: int) -> dict[str, Any]:
        question = {"role": "user", "content": f"question {number}"}
        answer = {"role": "assistant", "content": f"answer {number}"}
        if has_rejected:
            return {"messages": [question], "text": answer["content"], "worse": "no", "source": f"s{number % 7}"}
        return {"messages": [question, answer], "source": f"s{number % 7}"}

    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(70)))
    fields = {"rejected_field": "worse"} if has_rejected else {}
    config = of(tmp_path / "a.jsonl", messages_field="messages", key_field="source", validation_fraction=0.3, **fields)
    splits: dict[str, set[str | None]] = {}
    for document in corpus_reader.read_corpus(config, ReadStats()):
        splits.setdefault(document.key or "", set()).add(document.split)
    assert set(splits) == {f"s{number}" for number in range(7)}
    assert all(len(splits_of_key) == 1 for splits_of_key in splits.values())


def test_registered_generator() -> None:
    @register_corpus("counted", splits=("train", "test"))
    def counted(split: str) -> Iterator[str | Mapping[str, Any]]:
        yield f"{split} as text"
        yield {"text": f"{split} as a row", "other": 1}
        if split == "broken":
            raise OSError("lost")

    config = CorpusConfig(generator="counted", test_split="test")
    assert read(config) == [
        (None, None, "train as text"), (None, None, "train as a row"),
        ("test", None, "test as text"), ("test", None, "test as a row"),
    ]  # fmt: skip
    register_corpus("fails", splits=("broken",))(counted)
    with pytest.raises(UserError, match="the corpus 'fails' raised OSError after 2 documents: lost"):
        read(CorpusConfig(generator="fails", train_split="broken"))
    with pytest.raises(DataError, match="unknown corpus 'count'.*perhaps 'counted'"):
        read(CorpusConfig(generator="count"))
    assert len(generators.code_digest(config)) == 64
