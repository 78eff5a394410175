"""JSON form of a run: written beside every checkpoint, and itself a recipe. Reading it executes nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import pydantic
import pydantic_core

from t5x_like.config.errors import ConfigError, Problem
from t5x_like.config.run import RunConfig

SCHEMA_VERSION = 1


@functools.cache
def _adapter() -> pydantic.TypeAdapter[RunConfig]:
    return pydantic.TypeAdapter(RunConfig)


def to_dict(run: RunConfig) -> dict[str, Any]:
    """Plain JSON values, with the version of the schema in front."""
    return {"schema_version": SCHEMA_VERSION, **json.loads(json.dumps(dataclasses.asdict(run)))}


def to_json(run: RunConfig) -> str:
    return json.dumps(to_dict(run), indent=2) + "\n"


def from_json(text: str, *, source: str) -> RunConfig:
    """Parses `to_json`'s text.

    Args:
      text: The JSON document.
      source: Where it came from, for the message.

    Raises:
      ConfigError: not JSON, another schema version, unknown or missing fields, or values of the wrong type; all of
        them are listed.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError([Problem(source, f"no JSON ({error})", "a config.json written by t5x-like")]) from None
    if not isinstance(document, dict):
        raise ConfigError([Problem(source, f"a JSON {type(document).__name__}", "a JSON object")])
    version = document.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ConfigError([Problem(f"{source}: schema_version", repr(version), str(SCHEMA_VERSION))])
    try:
        return _adapter().validate_json(json.dumps(document))
    except pydantic.ValidationError as error:
        raise ConfigError([_problem(source, document, detail) for detail in error.errors()]) from None


def _problem(source: str, document: Any, detail: pydantic_core.ErrorDetails) -> Problem:
    """pydantic's finding in the words of a `Problem`."""
    path, value = [], document
    for part in detail["loc"]:
        # A location also holds the tags of unions ("adamw"), which are no part of the document.
        inside = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if inside or part == detail["loc"][-1]:
            path.append(str(part))
            value = value[part] if inside else None
    where = f"{source}: {'.'.join(path)}"
    context = detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            return Problem(where, "nothing", "a value: this field has no default")
        case "unexpected_keyword_argument":
            return Problem(where, "an unknown field", f"only fields of schema version {SCHEMA_VERSION}")
        case "union_tag_invalid":
            return Problem(f"{where}.kind", repr(context["tag"]), f"one of {context['expected_tags']}")
        case "union_tag_not_found":
            return Problem(f"{where}.kind", "nothing", "the name of a class, which decides the other fields")
    expected = detail["msg"].removeprefix("Input should be ")
    return Problem(where, repr(detail["input"])[:80], expected[:1].lower() + expected[1:])


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (old value, new value) of every leaf in which two runs differ."""

    def leaves(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, dict) and value:
            items = [(f"{path}.{key}" if path else str(key), child) for key, child in value.items()]
        elif isinstance(value, list) and value:
            items = [(f"{path}.{index}", child) for index, child in enumerate(value)]
        else:
            return {path: value}
        return {leaf: found for name, child in items for leaf, found in leaves(child, name).items()}

    old_leaves, new_leaves = leaves(to_dict(old), ""), leaves(to_dict(new), "")
    return {
        path: (old_leaves.get(path), new_leaves.get(path))
        for path in sorted({*old_leaves, *new_leaves})
        if old_leaves.get(path) != new_leaves.get(path)
    }
