"""Command-line overrides of single configuration fields."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import difflib
import io
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from t5x_like.config.optional_sections import create_sections, field_names, left_out
from t5x_like.config.run import RunConfig
from t5x_like.config.validation import validate
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.utils.sanitize import say

_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", types.NoneType: "None"}


class Field(NamedTuple):
    """Field that can be overridden: the maximum number of words of its value, and its type."""

    max_words: float
    hint: Any


def apply_overrides(run: RunConfig, arguments: Sequence[str], *, options: Sequence[str] = ()) -> RunConfig:
    """Return `run` with single fields replaced, as by `--training.num-train-steps 200 --data.corpus.files a.txt`.

    Values are parsed by the type of their field; hyphens and underscores are the same. Objectives are addressed by
    their index, as in `--data.mixture.0.rate 2`. A section that the recipe leaves out is created by setting its fields,
    and an index one past the end adds an entry (`optional_sections`). `--help` prints all fields and exits.

    Args:
      run: The recipe's run.
      arguments: The overrides.
      options: Other options of the command, which are suggested for a mistyped option.

    Raises:
      ConfigError: unknown fields, each with the most similar known ones, and values that are invalid for the type of
        their field; then also the problems that the configuration has with the other overrides. All are listed.
    """
    arguments = list(arguments)
    if not arguments:
        return run
    if "--help" in arguments:
        try:
            return _parse(run, arguments)
        except SystemExit:
            _print_left_out(run)
            raise
    run, arguments, section_problems = create_sections(run, arguments, _assign)
    fields = dict(_fields(run))
    overrides, problems = _split(run, arguments, fields, options)
    problems = [*section_problems, *problems]
    try:
        changed = _parse(run, [word for override in overrides for word in override], quiet=True)
    except SystemExit:
        valid = [override for override in overrides if _is_valid(run, override)]
        problems += [_wrong_value(override, fields) for override in overrides if override not in valid]
        changed = _parse(run, [word for override in valid for word in override])
    if problems:
        raise ConfigError([*problems, *validate(changed)])
    return changed


def _parse(run: RunConfig, arguments: Sequence[str], *, quiet: bool = False) -> RunConfig:
    """Return `run` with the overrides, or with --help print the fields and exit.

    Raises:
      SystemExit: --help, or an override that is not valid.
    """
    import tyro

    # tyro's own messages name one problem at a time, in a form of their own.
    with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
        # The recipe decides the class of a union (the optimizer, an objective), whose fields can be overridden.
        changed: RunConfig = tyro.cli(
            RunConfig,
            args=arguments,
            default=run,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
            prog="t5x-like COMMAND RECIPE",
            description="Fields of the configuration, with the recipe's values as defaults.",
        )
    return changed


def _assign(path: str, name: str, hint: Any, words: Sequence[str]) -> Any:
    """Return the value of a field of type `hint` that the words state.

    Raises:
      ConfigError: they state none.
    """
    import tyro

    single = dataclasses.make_dataclass("Field", [(name, hint)], frozen=True)
    option = f"--{name.replace('_', '-')}"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parsed: Any = tyro.cli(single, args=[option, *words], config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        found = repr(" ".join(words)) if words else "no value"
        raise ConfigError([ConfigProblem(path, found, _description(_without_annotation(hint)))]) from None
    return getattr(parsed, name)


def _without_annotation(hint: Any) -> Any:
    return typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint


def _print_left_out(run: RunConfig) -> None:
    """Print the sections that this recipe leaves out, with the fields by which they are set."""
    say("sections that this recipe leaves out, set by their fields:")
    for path, classes in left_out(run):
        names = ", ".join(name.replace("_", "-") for name in field_names(classes))
        say(f"  {_option(path)}.FIELD with one of the fields {names}")


def _is_valid(run: RunConfig, override: Sequence[str]) -> bool:
    try:
        _parse(run, override, quiet=True)
    except SystemExit:
        return False
    return True


def _wrong_value(override: Sequence[str], fields: Mapping[str, Field]) -> ConfigProblem:
    word, has_value, value = override[0].partition("=")
    path = word.lstrip("-").replace("-", "_")
    found = " ".join([value] if has_value else override[1:])
    return ConfigProblem(path, repr(found) if found else "no value", _description(fields[path].hint))


def _description(hint: Any) -> str:
    """Return a description of the values of a type, for messages."""
    arguments = typing.get_args(hint)
    match typing.get_origin(hint) or hint:
        case typing.Literal:
            return f"one of {', '.join(map(str, arguments))}"
        case typing.Union | types.UnionType:
            return " or ".join(map(_description, arguments))
        case builtins.tuple:
            kinds = [kind for kind in dict.fromkeys(arguments) if kind is not Ellipsis]
            return f"values separated by spaces, each {' or '.join(map(_description, kinds))}"
        case builtins.dict:
            return "pairs of a name and a value"
        case cls:
            return _KINDS.get(cls, f"a value of type {getattr(cls, '__name__', cls)}")


def _split(
    run: RunConfig, arguments: Sequence[str], fields: Mapping[str, Field], options: Sequence[str]
) -> tuple[list[list[str]], list[ConfigProblem]]:
    """Split arguments into overrides of known fields, each an option with its values, and problems with the others."""
    problems = []
    overrides: list[list[str]] = []
    values_left = 0.0
    is_known = False
    for argument in arguments:
        is_option = argument.startswith("--")
        if not is_option and values_left >= 1:
            values_left -= 1
            if is_known:
                overrides[-1].append(argument)
            continue
        word, has_value, value = argument.partition("=")
        field = word.lstrip("-").replace("-", "_")
        is_known = is_option and field in fields
        if is_known:
            overrides.append([argument])
            values_left = 0 if has_value else fields[field].max_words
            continue
        # The words after an unknown option are assumed to be its value.
        values_left = float("inf") if is_option else 0
        group = [_option(path) for path in fields if path.startswith(f"{field}.")]
        if not is_option and not has_value:
            problems.append(ConfigProblem(argument, "a word that belongs to no option", "overrides as --FIELD VALUE"))
        elif not is_option and field in fields:
            problems.append(ConfigProblem(argument, "no leading --", f"{_option(field)} {value}"))
        elif group:
            problems.append(ConfigProblem(word, "a group of fields", f"one of its fields: {', '.join(group)}"))
        elif unset := _not_settable(run, word, field):
            problems.append(unset)
        else:
            near = _nearest(word, [*options, *(_option(path) for path in fields)])
            problems.append(
                ConfigProblem(word, "no such option", f"a field of the recipe, perhaps {' or '.join(near)}")
            )
    return overrides, problems


def _not_settable(run: RunConfig, word: str, path: str) -> ConfigProblem | None:
    """Return the problem of an entry that a tuple lacks, or of a field that the class of a section lacks."""
    section: Any = run
    *parents, name = path.split(".")
    for depth, parent in enumerate(parents, 1):
        if isinstance(section, tuple) and parent.isdecimal() and int(parent) > len(section):
            where = ".".join(parents[: depth - 1])
            return ConfigProblem(word, f"no entry {parent} of {where}", f"an index up to {len(section)}, the next one")
        if isinstance(section, tuple):
            section = section[int(parent)] if parent.isdecimal() and int(parent) < len(section) else run
        else:
            section = getattr(section, parent, run)
    if not dataclasses.is_dataclass(section) or not hasattr(section, "kind"):
        return None
    names = [field.name for field in dataclasses.fields(section)]
    if difflib.get_close_matches(name, names, n=1):
        return None
    expected = f"a field of {type(section).__name__}, which this recipe has chosen: {', '.join(names)}"
    return ConfigProblem(word, f"no field {name!r}", expected)


def _option(path: str) -> str:
    return f"--{path.replace('_', '-')}"


def _fields(value: Any, path: str = "", hint: Any = None) -> Iterator[tuple[str, Field]]:
    """Yield the dotted path of every field that can be overridden, with its type."""
    hints: dict[str, Any] = {}
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        children = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        # An empty tuple of sections has no fields to override, nor does a section whose value is None.
        children = [
            (name, child) for name, child in children if child not in ((), None) or not _holds_sections(hints[name])
        ]
    elif isinstance(value, tuple) and value and all(dataclasses.is_dataclass(item) for item in value):
        children = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield path, Field(float("inf") if isinstance(value, tuple) else 1, hint)
        return
    for name, child in children:
        yield from _fields(child, f"{path}.{name}" if path else name, hints.get(name))


def _holds_sections(hint: Any) -> bool:
    """Return True if a field's type is a tuple of configurations, or a configuration or None."""
    return any(dataclasses.is_dataclass(kind) or _holds_sections(kind) for kind in typing.get_args(hint))


def _nearest(mistyped: str, options: Sequence[str]) -> list[str]:
    """Return up to three options most similar to a mistyped one: as a whole, in the last part, or in its initials."""
    mistyped = f"--{mistyped.lstrip('-').replace('_', '-')}"

    def likeness(option: str) -> float:
        last, wanted = option.rpartition(".")[2].lstrip("-"), mistyped.rpartition(".")[2].lstrip("-")
        initials = "".join(word[:1] for word in last.split("-"))
        whole = difflib.SequenceMatcher(None, mistyped, option).ratio()
        return whole + max(
            difflib.SequenceMatcher(None, wanted, last).ratio(), len(initials) > 1 and wanted == initials
        )

    scores = {option: likeness(option) for option in options}
    best = max(scores.values())
    return sorted((option for option in scores if scores[option] > 0.8 * best), key=scores.__getitem__, reverse=True)[
        :3
    ]
