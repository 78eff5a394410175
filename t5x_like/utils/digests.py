"""Digests of JSON values, which identify what a file, a store or a stream was made from."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value in hexadecimal. It does not depend on the order of keys in objects."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
