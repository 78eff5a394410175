"""JSON form of a run: written beside every checkpoint, and itself a recipe. Reading it executes nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import pydantic
import pydantic_core

from t5x_like.config.bounds import types_only
from t5x_like.config.objectives.registry import unregistered
from t5x_like.config.run import RunConfig
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.utils import name_registry
from t5x_like.utils.json_reader import parse_json

SCHEMA_VERSION = 2
"""Version of the field names. Documents of another version are refused: there is no conversion."""


@functools.lru_cache(maxsize=1)
def _validator(generation: int) -> pydantic_core.SchemaValidator:
    """Return the schema of a run with the classes that are registered at `generation`."""
    del generation
    return types_only(RunConfig)


def to_dict(run: RunConfig) -> dict[str, Any]:
    """Return plain JSON values, with the version of the schema first.

    Raises:
      ConfigError: an objective whose class is not the registered one of its kind, so that it could not be read back.
    """
    mixtures = {"data.mixture": run.data.mixture}
    mixtures |= {f"data.corpora.{index}.mixture": share.mixture for index, share in enumerate(run.data.corpora)}
    problems = [
        problem
        for where, mixture in mixtures.items()
        for index, objective in enumerate(mixture)
        for problem in unregistered(objective, f"{where}.{index}")
    ]
    if problems:
        raise ConfigError(problems)
    return {"schema_version": SCHEMA_VERSION, **json.loads(json.dumps(dataclasses.asdict(run)))}


def to_json(run: RunConfig) -> str:
    return json.dumps(to_dict(run), indent=2) + "\n"


def from_json(text: str, *, source: str) -> RunConfig:
    """Parse the text that `to_json` returns.

    Args:
      text: The JSON document.
      source: Where it came from, for the message.

    Raises:
      ConfigError: not JSON, another schema version, unknown or missing fields, or values of the wrong type; all of
        them are listed.
    """
    try:
        document = parse_json(text)
    except ValueError as error:
        raise ConfigError([ConfigProblem(source, f"no JSON ({error})", "a config.json written by t5x-like")]) from None
    if not isinstance(document, dict):
        raise ConfigError([ConfigProblem(source, f"a JSON {type(document).__name__}", "a JSON object")])
    version = document.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        earlier = isinstance(version, int) and 0 < version < SCHEMA_VERSION
        fix = (
            "an earlier version of t5x-like wrote it, and this version cannot read it: start from its recipe"
            if earlier
            else "`t5x-like train RECIPE --print-config` writes such a file"
        )
        problem = ConfigProblem(f"{source}: schema_version", repr(version), str(SCHEMA_VERSION), fix)
        raise ConfigError([problem])
    try:
        run: RunConfig = _validator(name_registry.generation()).validate_json(json.dumps(document))
    except pydantic.ValidationError as error:
        raise ConfigError([_problem(source, document, detail) for detail in error.errors()]) from None
    return run


def _problem(source: str, document: Any, detail: pydantic_core.ErrorDetails) -> ConfigProblem:
    """Return an error of pydantic as a `ConfigProblem`."""
    path, value = [], document
    for part in detail["loc"]:
        # A location also holds the tags of unions ("adamw"), which are no part of the document.
        if isinstance(value, dict):
            inside = part in value
        else:
            inside = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if inside or part == detail["loc"][-1]:
            path.append(str(part))
            value = value[part] if inside else None
    where = f"{source}: {'.'.join(path)}"
    context = detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            return ConfigProblem(where, "nothing", "a value: this field has no default")
        case "unexpected_keyword_argument":
            return ConfigProblem(where, "an unknown field", f"only fields of schema version {SCHEMA_VERSION}")
        case "union_tag_invalid":
            fix = "if a plug-in defines this kind, name its file in `plugins`"
            return ConfigProblem(f"{where}.kind", repr(context["tag"]), f"one of {context['expected_tags']}", fix)
        case "union_tag_not_found":
            return ConfigProblem(f"{where}.kind", "nothing", "the name of a class, which decides the other fields")
    expected = detail["msg"].removeprefix("Input should be ")
    return ConfigProblem(where, repr(detail["input"])[:80], expected[:1].lower() + expected[1:])


def diff_configs(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return {dotted path: (old value, new value)} of every leaf in which two runs differ."""

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
