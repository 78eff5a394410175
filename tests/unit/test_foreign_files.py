"""Reading files of others raises no exceptions but user errors: every kind of file is read after mutations.

`make fuzz INPUTS=N` runs N inputs for each kind. What long runs have found stands in `FOUND`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers.foreign_files import KINDS, Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5x_like.data.tokenizers import sentencepiece_proto
from t5x_like.errors import DataError, UserError

INPUTS = int(os.environ.get("FUZZ_INPUTS", "25"))
DEEP = "deep"
VALUES: list[Any] = [None, True, 0, -1, 1, 2**31, 2**63, 2**70, 10**400, 0.5, -1e308, float("nan"), float("inf")]
VALUES += ["", "x", "0", "../x", "/x", "http://x/", "a\0b", "\x1b[2J", "\ud800", [], [[]], {}, {"": 0}, [1, "a", None]]
VALUES += [DEEP]


def edited(data: bytes, random: Random) -> bytes:
    """Return the content of a file after one edit, of its bytes or of the JSON in it."""
    place = random.randrange(len(data) + 1)
    match random.choice(("replace", "flip", "cut", "json", "json", "json")):
        case "replace":
            return data[:place] + random.randbytes(random.randrange(8)) + data[place + random.randrange(8) :]
        case "flip":
            flipped = bytes(byte ^ 1 << random.randrange(8) for byte in data[place : place + 1])
            return data[:place] + flipped + data[place + 1 :]
        case "cut":
            return data[:place]
    return _json_edited(data, random)


def _json_edited(data: bytes, random: Random) -> bytes:
    if len(data) > 8 and data[8:9] == b"{":  # The header of safetensors.
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = _json_edited(data[8:end], random)
        return struct.pack("<Q", len(header)) + header + data[end:]
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    index = random.randrange(len(lines))
    try:
        document = [json.loads(lines[index])]
    except (ValueError, RecursionError):
        return edited(data, random)
    node, key = random.choice(list(_places(document)))
    match random.choice(("set", "set", "drop", "rename")):
        case "drop" if node is not document:
            del node[key]
        case "rename" if isinstance(node, dict):
            node[random.choice(("", "x", "kind", "0"))] = node.pop(key)
        case _:
            node[key] = random.choice(VALUES)
    depth = random.choice((90, 500, 100_000))
    text = json.dumps(document[0]).replace(f'"{DEEP}"', "[" * depth + "]" * depth)
    return b"\n".join([*lines[:index], text.encode(), *lines[index + 1 :]])


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value in a JSON document."""
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    for key, child in items:
        yield node, key
        yield from _places(child)


def read(kind: Kind, folder: Path) -> None:
    kind.forge(folder)
    try:
        kind.read(folder)
    except UserError as error:
        assert str(error).strip()


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", KINDS)
def test_changed_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    kind.make(tmp_path)
    kind.read(tmp_path)
    files = _files(tmp_path)

    @settings(
        max_examples=INPUTS,
        derandomize=INPUTS <= 25,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True))
    def check(random: Random) -> None:
        file = random.choice(sorted(files))
        data = files[file]
        for _ in range(random.choice((1, 1, 2, 4))):
            data = edited(data, random)
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
    for file, content in _files(tmp_path).items():
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
