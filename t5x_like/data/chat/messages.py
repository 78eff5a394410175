"""Messages of a row, as one text that sources, hold-out rules and digests can treat like any other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from t5x_like.data.chat.template import ASSISTANT, ROLE
from t5x_like.errors import DataError

TOOLS_FIELD = "tools"
"""Field of a row that holds the descriptions of the tools, if there are any."""


class Dialogue(NamedTuple):
    """Messages and tools as JSON values."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None


def dialogue_text(row: Mapping[str, Any], field: str, where: Callable[[], str]) -> str:
    """Return the messages and tools of a row as JSON text.

    Raises:
      DataError: the field is missing, or holds no messages with an answer of the assistant.
    """
    if field not in row:
        names = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{where()}: found the fields {names}, expected {field!r}; set --data.corpus.messages-field")
    messages, tools = row[field], row.get(TOOLS_FIELD)
    if isinstance(messages, str):
        messages = _parsed(messages, field, where)
    if isinstance(tools, str):
        tools = _parsed(tools, TOOLS_FIELD, where)
    expected = f"a list of objects with a text {ROLE!r}"
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get(ROLE), str) for message in messages
    ):
        raise DataError(f"{where()}: found {str(messages)[:80]!r} in {field!r}, expected {expected}")
    if not any(message[ROLE] == ASSISTANT for message in messages):
        roles = ", ".join(message[ROLE] for message in messages) or "none"
        raise DataError(f"{where()}: found messages of the roles {roles}, expected one of {ASSISTANT!r} to learn from")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where()}: found {str(tools)[:80]!r} in {TOOLS_FIELD!r}, expected a list")
    return json.dumps({"messages": messages, "tools": tools}, ensure_ascii=False)


def parse_dialogue(text: str) -> Dialogue:
    """Return what `dialogue_text` has written."""
    fields = json.loads(text)
    return Dialogue(fields["messages"], fields["tools"])


def _parsed(text: str, field: str, where: Callable[[], str]) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where()}: found no JSON in {field!r} ({error}), expected messages") from None
