"""The page of all configuration fields, made from the classes of `t5x_like.config`."""

from __future__ import annotations

import ast
import dataclasses
import functools
import html
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from t5x_like.config import RunConfig
from t5x_like.config.bounds import bounds_text
from t5x_like.config.config_registry import ConfigRegistry

INTRODUCTION = """# Configuration

Every field of a run, from `RunConfig` down. A recipe sets the fields in Python; the command line sets them by their
path, as in `--training.schedule.learning-rate 0.01`; `config.json` has the same names. A field without a default must
be set by the recipe. A value out of its bounds is reported before anything is computed, together with all other
problems.

This page is made from the source when the site is built. `t5x-like train RECIPE --help` prints the same fields with the
values of a recipe.
"""

_UNITS = {
    # End of a field's name -> unit of its value.
    r"(^|_)steps$|_every$|_step$|^keep_period$": "steps",
    r"_minutes$": "minutes",
    r"_bytes$": "bytes",
    r"(^|_)length(s|_buckets)?$": "tokens",
    r"_batch_size$": "rows",
}


@dataclasses.dataclass
class Section:
    """A configuration class; `paths` are the dotted paths of the fields that hold it."""

    cls: type[Any]
    paths: list[str]


def page() -> str:
    """Return the page as Markdown."""
    found = sections()
    anchors = {section.cls: section.cls.__name__.lower() for section in found}
    parts = [INTRODUCTION]
    for section in found:
        parts += [f"## {section.cls.__name__}", _where(section), *_about(section.cls), _table(section, anchors)]
    return "\n\n".join(part for part in parts if part) + "\n"


def sections() -> list[Section]:
    """Return the configuration classes of a run, each once, in the order of the fields that hold them."""
    found: dict[type[Any], Section] = {}
    # The key is the class with its path, so that a class that holds itself ends.
    queue: list[tuple[type[Any], str]] = [(RunConfig, "")]
    while queue:
        cls, path = queue.pop(0)
        is_new = cls not in found
        section = found.setdefault(cls, Section(cls, []))
        if path not in section.paths:
            section.paths.append(path)
        if not is_new and len(section.paths) > 8:
            continue
        children = []
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            for child, repeated in _classes(hints[field.name]):
                name = f"{field.name}.N" if repeated else field.name
                children.append((child, f"{path}.{name}" if path else name))
        queue = children + queue
    return list(found.values())


def _classes(hint: Any, repeated: bool = False) -> Iterator[tuple[type[Any], bool]]:
    """Yield the configuration classes that a type can hold, and whether there are several."""
    for argument in getattr(hint, "__metadata__", ()):
        if isinstance(argument, ConfigRegistry):
            for cls in _registered(argument):
                yield cls, repeated
            return
    if dataclasses.is_dataclass(hint):
        yield typing.cast(type[Any], hint), repeated
        return
    for argument in typing.get_args(hint):
        yield from _classes(argument, repeated or typing.get_origin(hint) is tuple)


def _registered(registry: ConfigRegistry) -> list[type[Any]]:
    """Return the registered classes of the package."""
    return [cls for cls in dict.fromkeys(registry.values()) if cls.__module__.startswith("t5x_like.")]


def _where(section: Section) -> str:
    names = [f"`{path}`" for path in section.paths if path]
    return f"Field: {', '.join(names)}" if names else "The configuration of a run."


def _about(cls: type[Any]) -> list[str]:
    """Return the docstring of a class, without the list of attributes and without dataclass's own signature."""
    text = inspect.getdoc(cls) if "__doc__" in vars(cls) else None
    if text is None or text.startswith(f"{cls.__name__}("):
        return []
    text = re.split(r"\n\s*Attributes:\n", text)[0].strip()
    # A line `name: meaning` begins an item.
    blocks = []
    for paragraph in text.split("\n\n"):
        lines: list[str] = []
        for line in paragraph.splitlines():
            if lines and re.match(r"[a-z_0-9]+: ", line):
                lines.append(line)
            else:
                lines[-1:] = [f"{lines[-1]} {line.strip()}" if lines else line]
        is_list = all(re.match(r"[a-z_0-9]+: ", line) for line in lines)
        blocks.append("\n".join(f"- {table_text(line)}" for line in lines) if is_list else table_text(" ".join(lines)))
    return ["\n\n".join(blocks)]


def _table(section: Section, anchors: dict[type[Any], str]) -> str:
    cls = section.cls
    hints = typing.get_type_hints(cls, include_extras=True)
    meanings = field_docstrings(cls)
    lines = ["| field | type | default | bounds, unit | meaning |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        unit = "seconds" if cls.__name__ == "TimeoutsConfig" and field.name != "measured_factor" else _unit(field.name)
        is_number = bool({int, float} & set(_leaves(hint)))
        bounds = "; ".join(part for part in (bounds_text(hint), unit if is_number else "") if part)
        meaning = table_text(meanings.get(field.name, ""))
        cells = (f"`{field.name}`", _type(hint, anchors), _default(field), table_text(bounds), meaning)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _unit(name: str) -> str:
    return next((unit for pattern, unit in _UNITS.items() if re.search(pattern, name)), "")


def _leaves(hint: Any) -> Iterator[Any]:
    arguments = [argument for argument in typing.get_args(hint) if not hasattr(argument, "metadata")]
    if not arguments or typing.get_origin(hint) is typing.Literal:
        yield hint
    for argument in arguments if typing.get_origin(hint) is not typing.Literal else ():
        yield from _leaves(argument)


def _type(hint: Any, anchors: dict[type[Any], str]) -> str:
    """Return a type in words, with links to the sections of configuration classes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hasattr(hint, "__metadata__"):
        registries = [argument for argument in hint.__metadata__ if isinstance(argument, ConfigRegistry)]
        if registries:
            return " or ".join(_type(cls, anchors) for cls in _registered(registries[0]))
        return _type(arguments[0], anchors)
    if origin is typing.Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(argument, anchors) for argument in arguments)
    if origin is tuple:
        kinds = [_type(argument, anchors) for argument in arguments if argument is not Ellipsis]
        return f"any number of: {kinds[0]}" if Ellipsis in arguments else f"({', '.join(kinds)})"
    if origin is dict:
        return "names and values"
    if hint is types.NoneType:
        return "`None`"
    if hint in anchors:
        return f"[{hint.__name__}](#{anchors[hint]})"
    names = {int: "whole number", float: "number", bool: "`True` or `False`", str: "text"}
    return names.get(hint, f"`{getattr(hint, '__name__', hint)}`")


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "must be set"
    if dataclasses.is_dataclass(value):
        return f"`{type(value).__name__}` with its defaults"
    if value in ((), {}):
        return "none"
    if isinstance(value, tuple) and all(dataclasses.is_dataclass(item) for item in value):
        return f"{len(value)} entries"
    return f"`{value!r}`".replace("|", "\\|")


def table_text(text: str) -> str:
    """Return text for a cell of a table: outside of code, characters that Markdown would interpret are escaped."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()) if not text.startswith("- ") else text)
    escaped = [part if part.startswith("`") else _escaped(part) for part in parts]
    return "".join(escaped).replace("|", "\\|")


def _escaped(text: str) -> str:
    return re.sub(r"([*_\[\]])", r"\\\1", html.escape(text, quote=False))


@functools.cache
def field_docstrings(cls: type[Any]) -> dict[str, str]:
    """Return the strings below the fields of a class and of its base classes, by field."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base) or base.__module__ == "builtins":
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                meanings[statement.target.id] = " ".join(str(following.value.value).split())
        # Objectives describe their common fields in the docstring of their base class.
        attributes = re.split(r"\n\s*Attributes:\n", inspect.getdoc(base) or "")[1:]
        for match in re.finditer(r"^ +(\w+): (.*(?:\n {4,}.*)*)", "\n".join(attributes), re.M):
            meanings.setdefault(match[1], " ".join(match[2].split()))
    return meanings
