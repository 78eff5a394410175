"""Reading files of others raises no exceptions but user errors: every kind of file is read after random changes.

`make fuzz` reads many more (`tests/fuzz/fuzz.py`). What it has found stands in `FOUND`.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from helpers.foreign_files import KINDS
from helpers.mutations import changed, files_of, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5x_like.data.tokenizers import sentencepiece_proto
from t5x_like.errors import DataError, UserError

INPUTS = 25


@pytest.mark.parametrize("name", KINDS)
def test_changed_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    kind.make(tmp_path)
    kind.read(tmp_path)
    files = files_of(tmp_path)

    @settings(
        max_examples=INPUTS, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.randoms(use_true_random=True))
    def check(random: Random) -> None:
        file, data = changed(files, random)
        (tmp_path / file).write_bytes(data)
        try:
            read(kind, tmp_path)
        finally:
            (tmp_path / file).write_bytes(files[file])

    check()


@pytest.mark.parametrize("name", KINDS)
def test_missing_files_and_folders_in_their_place_are_refused(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    kind.make(tmp_path)
    for file, content in files_of(tmp_path).items():
        path = tmp_path / file
        path.unlink()
        read(kind, tmp_path)
        path.unlink(missing_ok=True)
        path.mkdir()
        read(kind, tmp_path)
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)


FOUND: dict[str, tuple[str, str, str, str]] = {
    "arity of a list": ("config.json of a run", "config.json", '"sliding_window": null', '"sliding_window": []'),
    "type of a count": ("token store", "s/info.json", '"base_size": 259', '"base_size": "x"'),
    "absent tokenizer": ("token store", "s/info.json", '"tokenizer": {', '"tokenizer": null, "x": {'),
    "size of an array": ("token store", "s/train/tokens/zarr.json", '"shape":[9]', '"shape":[3000000000]'),
    "object in place of a name": ("config.json of a BERT", "config.json", '"hidden_act": "gelu"', '"hidden_act": {}'),
    "answer that is no text": ("dialogues as turns", "t.jsonl", '"content": "yo"', '"content": 0.5'),
    "deep list in a text": ("dialogues", "t.jsonl", '"tools": "[]"', f'"tools": "{"[" * 5000}"'),
    "line that is no object": (
        "log-probabilities of a reference",
        "reference_log_probs.jsonl",
        '{"model": "m", "data": "d"}',
        "5",
    ),
    "text without a fingerprint": ("evaluated checkpoint", "evaluations.jsonl", '"fingerprint": "f"', '"x": "f"'),
    "root of zero": (
        "config.json of a Gemma 3",
        "config.json",
        '"query_pre_attn_scalar": 256',
        '"query_pre_attn_scalar": 0',
    ),
    "huge id": ("vocab.json and merges.txt", "vocab.json", '"ab": 2', '"ab": 2147483648'),
    "huge id of a tokenizer.json": ("tokenizer.json", "tokenizer.json", '"<pad>": 0', '"<pad>": 2147483648'),
    "list of added tokens": (
        "published SentencePiece model",
        "tokenizer_config.json",
        '"added_tokens_decoder": {',
        '"added_tokens_decoder": [], "x": {',
    ),
    "billions of sentinels": (
        "published SentencePiece model",
        "tokenizer_config.json",
        '"extra_ids": 5',
        '"extra_ids": 10000000000',
    ),
    "id that is a text": ("vocab.json and merges.txt", "vocab.json", '"a": 0', '"a": "x"'),
}
"""Name -> kind of files, file, its text and what replaces it: each once raised another exception."""


@pytest.mark.parametrize("found", FOUND.values(), ids=FOUND)
def test_found_inputs_are_refused(tmp_path: Path, found: tuple[str, str, str, str]) -> None:
    name, file, old, new = found
    kind, path = KINDS[name], tmp_path / found[1]
    kind.make(tmp_path)
    text = path.read_text()
    assert old in text, file
    path.write_text(text.replace(old, new, 1))
    kind.forge(tmp_path)
    with pytest.raises(UserError):
        kind.read(tmp_path)


@pytest.mark.parametrize("name", ["starts.json", "exit.json"])
def test_number_that_is_not_finite_is_no_count(tmp_path: Path, name: str) -> None:
    """`int` raises OverflowError for it, which is no ValueError."""
    kind = KINDS["identity, starts and end of a run"]
    kind.make(tmp_path)
    document = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(document | {"code": float("inf"), "count": float("inf")}))
    kind.read(tmp_path)


def test_deeply_nested_json_does_not_reach_the_array_library(tmp_path: Path) -> None:
    """TensorStore's own JSON parser overflows the stack of the process."""
    kind = KINDS["token store"]
    kind.make(tmp_path)
    (tmp_path / "s" / "train" / "offsets" / "zarr.json").write_text("[" * 100_000 + "]" * 100_000)
    kind.forge(tmp_path)
    with pytest.raises(UserError, match="nested more than 100 deep"):
        kind.read(tmp_path)


def test_score_of_a_piece_and_footer_of_a_table(tmp_path: Path) -> None:
    """The formats' own libraries raise struct.error and UnicodeDecodeError here."""
    with pytest.raises(ValueError, match="score of 1 bytes"):
        sentencepiece_proto.pieces(b"\n\x08\n\x03abc\x12\x01x")
    kind = KINDS["Parquet"]
    kind.make(tmp_path)
    path = tmp_path / "t.parquet"
    data = path.read_bytes()
    (tmp_path / "t.parquet").write_bytes(data.replace(b"inputs", b"inpu\xff\xff"))
    with pytest.raises(DataError):
        kind.read(tmp_path)
