"""Messages of a row, as one text that sources, hold-out rules and digests can treat like any other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from t5x_like.config.corpus import CorpusConfig
from t5x_like.errors import DataError
from t5x_like.utils.json_reader import parse_json

ROLE, ASSISTANT = "role", "assistant"
"""Field of a message with its author, and the author whose messages are learned."""
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
      UnicodeError: a text is not valid Unicode.
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
    return _text({"messages": messages, "tools": tools}, field, where)


class AnsweredDialogue(NamedTuple):
    """Dialogue with two answers as JSON values; the messages are those before the answers."""

    dialogue: Dialogue
    chosen: dict[str, Any]
    rejected: dict[str, Any]


def preference_text(row: Mapping[str, Any], config: CorpusConfig, where: Callable[[], str]) -> tuple[str, str]:
    """Return the messages of a row with two answers as JSON text, and the messages alone.

    Raises:
      DataError: a field is missing or of another type, an answer is empty, or the answers are equal.
      UnicodeError: a text is not valid Unicode.
    """
    fields = {
        "messages-field": str(config.messages_field),
        "text-field": config.text_field,
        "rejected-field": str(config.rejected_field),
    }
    values: list[Any] = []
    for option, field in fields.items():
        if field not in row:
            names = ", ".join(map(repr, row)) or "none"
            raise DataError(f"{where()}: found the fields {names}, expected {field!r}; set --data.corpus.{option}")
        values.append(row[field])
    prompt, *answers = values
    if isinstance(prompt, str) and prompt.lstrip().startswith("["):
        prompt = _parsed(prompt, fields["messages-field"], where)
    if isinstance(prompt, str):
        prompt = [{ROLE: "user", "content": prompt}]
    prompt = _messages(prompt, fields["messages-field"], where)
    chosen = _answer(answers[0], prompt, fields["text-field"], where)
    rejected = _answer(answers[1], prompt, fields["rejected-field"], where)
    if chosen == rejected:
        raise DataError(equal_answers(chosen["content"], config, where))
    tools = row.get(TOOLS_FIELD)
    tools = _parsed(tools, TOOLS_FIELD, where) if isinstance(tools, str) else tools
    document = {"messages": prompt, "tools": tools, "chosen": chosen, "rejected": rejected}
    return _text(document, fields["messages-field"], where), _text(prompt, fields["messages-field"], where)


def _text(document: Any, field: str, where: Callable[[], str]) -> str:
    try:
        text = json.dumps(document, ensure_ascii=False)
    except TypeError as error:  # Bytes or dates of a table.
        raise DataError(f"{where()}: found no JSON values in {field!r} ({error}), expected messages") from None
    text.encode()  # A lone surrogate, which JSON can express as an escape, raises UnicodeEncodeError.
    return text


def equal_answers(answer: str, config: CorpusConfig, where: Callable[[], str]) -> str:
    """Return the message that refuses a preference pair of equal answers."""
    return (
        f"{where()}: found the same answer {answer[:80]!r} in {config.text_field!r} and {config.rejected_field!r}, "
        "expected two different ones; leave the pair out, or up to N such rows by --data.corpus.max-bad-records N"
    )


def parse_preference(text: str) -> AnsweredDialogue:
    """Return what `preference_text` has written."""
    fields = json.loads(text)
    return AnsweredDialogue(Dialogue(fields["messages"], fields["tools"]), fields["chosen"], fields["rejected"])


def _answer(value: Any, prompt: list[dict[str, Any]], field: str, where: Callable[[], str]) -> dict[str, Any]:
    """Return the message of an answer: a text, or the last of messages, which may begin with those of the prompt."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = _parsed(value, field, where)
    if isinstance(value, str):
        value = [{ROLE: ASSISTANT, "content": value}]
    messages = _messages(value, field, where)
    last = messages[-1]
    content = last.get("content")
    if messages[:-1] not in ([], prompt) or last[ROLE] != ASSISTANT or not isinstance(content, str):
        expected = f"a text, or the messages of the prompt followed by one of the {ASSISTANT}"
        raise DataError(f"{where()}: found {str(value)[:80]!r} in {field!r}, expected {expected}")
    if not content.strip():
        raise DataError(f"{where()}: found no text in {field!r}, expected a prompt and two answers")
    return last


def _messages(value: Any, field: str, where: Callable[[], str]) -> list[dict[str, Any]]:
    is_list = isinstance(value, list) and value
    if not is_list or not all(isinstance(item, dict) and isinstance(item.get(ROLE), str) for item in value):
        expected = f"a list of objects with a text {ROLE!r}"
        raise DataError(f"{where()}: found {str(value)[:80]!r} in {field!r}, expected {expected}")
    return list(value)


def parse_dialogue(text: str) -> Dialogue:
    """Return what `dialogue_text` has written."""
    fields = json.loads(text)
    return Dialogue(fields["messages"], fields["tools"])


def _parsed(text: str, field: str, where: Callable[[], str]) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{where()}: found no JSON in {field!r} ({error}), expected messages") from None
