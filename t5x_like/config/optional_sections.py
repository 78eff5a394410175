"""Sections of a configuration that overrides create: optional ones, further entries of tuples, and other kinds.

A recipe may leave a section out (`model.task_head` is None), and it decides the class of a section whose classes
differ by `kind` (`training.optimizer`). Overrides can set both: `--model.task-head.kind regression`,
`--training.optimizer.kind adamw`. The section is created from its `kind` and its required fields; all its other fields
are then overridden in the same way as in a section that the recipe has set.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from t5x_like.config.config_registry import ConfigRegistry
from t5x_like.errors import ConfigError, ConfigProblem

Assign = Callable[[str, str, Any, Sequence[str]], Any]
"""(path, field, type of the field, words) -> value of the field; raises ConfigError if the words are not a value."""


class Classes(NamedTuple):
    """Classes of a section.

    Attributes:
      by_kind: The classes by the value of their `kind`; a single class has the key None.
      is_optional: None is a value of the field as well.
    """

    by_kind: Mapping[str | None, type[Any]]
    is_optional: bool


class _Override(NamedTuple):
    path: tuple[str, ...]
    words: list[str]


def create_sections(
    config: Any, arguments: Sequence[str], assign: Assign
) -> tuple[Any, list[str], list[ConfigProblem]]:
    """Return the configuration with the sections that the arguments ask for, and what is left of the arguments.

    `--PATH None` removes an optional section.

    Returns:
      The configuration; the arguments without those that have been used; and the problems of the sections that could
      not be created, all of whose arguments are removed.
    """
    overrides, rest = _grouped(arguments)
    problems: list[ConfigProblem] = []
    while (found := _next_section(config, overrides)) is not None:
        path, classes, entries = found
        prefix = ".".join(path)
        own = [override for override in overrides if override.path[: len(path)] == path]
        used: list[_Override] = []
        if entries == "remove":
            config, used = _replaced(config, path, None), own
        else:
            try:
                value, used = _created(prefix, classes, [(o.path[len(path) :], o) for o in own], assign)
                config = _replaced(config, path, value)
            except ConfigError as error:
                problems += error.problems
                used = own
        overrides = [override for override in overrides if not any(override is item for item in used)]
    return config, [*rest, *(word for override in overrides for word in override.words)], problems


def section_classes(hint: Any) -> Classes | None:
    """Return the classes of a field that holds a section; None if it holds something else."""
    hint, is_optional = _without_none(hint)
    for item in getattr(hint, "__metadata__", ()):
        if isinstance(item, ConfigRegistry):
            return Classes(dict(item.items()), is_optional)
    if dataclasses.is_dataclass(hint):
        return Classes({None: typing.cast(type[Any], hint)}, is_optional)
    return None


def left_out(config: Any, path: str = "") -> Iterator[tuple[str, Classes]]:
    """Yield the path and the classes of each optional section that is not set."""
    if isinstance(config, tuple):
        for index, item in enumerate(config):
            yield from left_out(item, f"{path}.{index}")
    elif dataclasses.is_dataclass(config):
        hints = typing.get_type_hints(type(config), include_extras=True)
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            where = f"{path}.{field.name}" if path else field.name
            classes = section_classes(hints[field.name])
            if value is None and classes is not None:
                yield where, classes
            yield from left_out(value, where)


def field_names(classes: Classes) -> list[str]:
    """Return the fields of all classes of a section, each once."""
    return list(dict.fromkeys(field.name for cls in classes.by_kind.values() for field in dataclasses.fields(cls)))


def _grouped(arguments: Sequence[str]) -> tuple[list[_Override], list[str]]:
    """Return the options, each with the words up to the next one, and the words before the first option."""
    overrides: list[_Override] = []
    stray: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            name = argument.partition("=")[0].lstrip("-").replace("-", "_")
            overrides.append(_Override(tuple(name.split(".")), [argument]))
        elif overrides:
            overrides[-1].words.append(argument)
        else:
            stray.append(argument)
    return overrides, stray


def _next_section(
    config: Any, overrides: Sequence[_Override]
) -> tuple[tuple[str, ...], Classes, typing.Literal["create", "remove"]] | None:
    """Return the outermost section that an override creates or removes."""
    for override in sorted(overrides, key=lambda override: len(override.path)):
        value: Any = config
        for depth, name in enumerate(override.path):
            child, hint = _child(value, name)
            classes = None if hint is None else section_classes(hint)
            here, is_last = override.path[: depth + 1], depth + 1 == len(override.path)
            if classes is not None:
                if is_last and child is not None and classes.is_optional and _value(override) == "None":
                    return here, classes, "remove"
                if child is None and not is_last:
                    return here, classes, "create"
                names_kind = override.path[depth + 1 :] == ("kind",) and None not in classes.by_kind
                if names_kind and _value(override) != getattr(child, "kind", None):
                    return here, classes, "create"
            if child is None:
                break
            value = child
    return None


def _child(value: Any, name: str) -> tuple[Any, Any]:
    """Return a field of a section, or an entry of a tuple of sections, and its type; (None, None) if there is none.

    The entry after the last one is None, with the type of the entries.
    """
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value), include_extras=True)
        if name not in {field.name for field in dataclasses.fields(value)}:
            return None, None
        child, hint = getattr(value, name), hints[name]
        plain = _without_none(hint)[0]
        if typing.get_origin(plain) is tuple and section_classes(typing.get_args(plain)[0]) is not None:
            return _Entries(child, typing.get_args(plain)[0]), None
        return child, hint
    if isinstance(value, _Entries) and name.isdecimal() and int(name) <= len(value.items):
        return (value.items[int(name)] if int(name) < len(value.items) else None), value.hint
    return None, None


class _Entries(NamedTuple):
    items: tuple[Any, ...]
    hint: Any


def _created(
    prefix: str, classes: Classes, own: Sequence[tuple[tuple[str, ...], _Override]], assign: Assign
) -> tuple[Any, list[_Override]]:
    """Return a section made from its kind and its required fields, and the overrides that stated them.

    Raises:
      ConfigError: the kind or a required field is missing or wrong, or a field does not exist.
    """
    used = [override for path, override in own if path == ("kind",) and None not in classes.by_kind]
    if None in classes.by_kind:
        cls = classes.by_kind[None]
    else:
        kind = _value(used[-1]) if used else None
        if kind not in classes.by_kind:
            where = f"--{_option(prefix)}.kind"
            expected = f"one of {', '.join(str(name) for name in classes.by_kind)}"
            raise ConfigError([ConfigProblem(where, "nothing" if kind is None else repr(kind), expected)])
        cls = classes.by_kind[kind]
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems = [
        ConfigProblem(
            f"--{_option(prefix)}.{_option('.'.join(path))}",
            "no such field",
            f"a field of {cls.__name__}: {', '.join(map(_option, fields))}",
        )
        for path, override in own
        if path[0] not in fields
    ]
    values: dict[str, Any] = {}
    for name, field in fields.items():
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if not is_required:
            continue
        given = [override for path, override in own if path == (name,)]
        if not given:
            where = f"--{_option(prefix)}.{_option(name)}"
            try:
                assign(where, name, hints[name], [])
                expected = "a value"
            except ConfigError as error:
                expected = error.problems[0].expected
            problems.append(ConfigProblem(where, "nothing", f"{expected}; {cls.__name__} has no default for it"))
            continue
        used += given
        words = given[-1].words
        value = [words[0].partition("=")[2], *words[1:]] if "=" in words[0] else words[1:]
        try:
            values[name] = assign(f"{prefix}.{name}", name, hints[name], value)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return cls(**values), used


def _value(override: _Override) -> str:
    """Return the single value of an override; several words are joined."""
    _, has_value, value = override.words[0].partition("=")
    return " ".join([value, *override.words[1:]] if has_value else override.words[1:])


def _replaced(config: Any, path: Sequence[str], value: Any) -> Any:
    """Return the configuration with the value at a path; an index one past the end of a tuple appends."""
    if not path:
        return value
    name, *rest = path
    if isinstance(config, tuple):
        index = int(name)
        old = config[index] if index < len(config) else None
        return (*config[:index], _replaced(old, rest, value), *config[index + 1 :])
    return dataclasses.replace(config, **{name: _replaced(getattr(config, name), rest, value)})


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Return a type without None, and whether None was one of its values."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        if len(kinds) == 1:
            return kinds[0], len(kinds) < len(typing.get_args(hint))
    return hint, False


def _option(name: str) -> str:
    return name.replace("_", "-")
