"""Random changes of files, of their bytes or of the JSON in them, and the reading of what results."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from helpers.foreign_kind import Kind

from t5x_like.errors import UserError

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


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of the files below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def changed(files: Mapping[str, bytes], random: Random) -> tuple[str, bytes]:
    """Return one of the files, and its content after one, two or four changes."""
    file = random.choice(sorted(files))
    data = files[file]
    for _ in range(random.choice((1, 1, 2, 4))):
        data = edited(data, random)
    return file, data


def read(kind: Kind, folder: Path) -> None:
    """Read the files as the program does. An error of the user must have a message; other exceptions are raised."""
    kind.forge(folder)
    try:
        kind.read(folder)
    except UserError as error:
        assert str(error).strip()
