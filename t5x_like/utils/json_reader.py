"""Reading of JSON that others may have written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_DEPTH = 100
"""Deepest nesting that is read; far above that of any file of this program, and below what recursive functions bear."""

MAX_DIGITS = 300
"""Most digits of a whole number, so that each can become a float."""


def parse_json(text: str | bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the value of a JSON document.

    Args:
      text: The document; bytes in UTF-8.
      object_pairs_hook: See `json.loads`.

    Raises:
      ValueError: the text is not JSON, it is nested more deeply than `MAX_DEPTH`, or a number has more digits than
        `MAX_DIGITS`.
    """
    try:
        value = json.loads(text, object_pairs_hook=object_pairs_hook, parse_int=_integer)
    except RecursionError:
        raise _too_deep() from None
    opening = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else text.count("[") + text.count("{")
    if opening > MAX_DEPTH:
        level, depth = [value], 0
        while level := [child for node in level for child in _children(node)]:
            depth += 1
            if depth > MAX_DEPTH:
                raise _too_deep()
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _children(node: Any) -> list[Any]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [child for child in children if isinstance(child, dict | list)]


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {MAX_DEPTH} deep")


def read_json(path: Path) -> Any:
    """Return the value of a JSON file in UTF-8.

    Raises:
      OSError: the file cannot be read.
      ValueError: see `parse_json`.
    """
    return parse_json(path.read_text(encoding="utf-8"))
