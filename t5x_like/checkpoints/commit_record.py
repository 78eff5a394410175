"""Commit records of checkpoints in object stores: a line of JSON, and a line with its checksum."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from t5x_like.utils.json_reader import parse_json

Record = dict[str, Any]


def encoded(record: Record) -> bytes:
    """Return the bytes of a record."""
    text = json.dumps(record, sort_keys=True).encode()
    return text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n"


def decoded(data: bytes | None) -> Record | None:
    """Return the record; None if it is missing or damaged."""
    text, _, checksum = (data or b"").partition(b"\n")
    if checksum != hashlib.sha256(text).hexdigest().encode() + b"\n":
        return None
    try:
        record = parse_json(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
