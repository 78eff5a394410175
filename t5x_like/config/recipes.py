"""Recipes: where a run's configuration comes from, and how the command line changes single fields of it."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from t5x_like.config.errors import ConfigError, Problem, UserError
from t5x_like.config.run import RunConfig
from t5x_like.config.serialization import from_json, to_json

DEFAULT_FUNCTION = "recipe"
_RECIPES = Path("configs/runs")
_PACKAGE = Path(__file__).parents[1]
_SHIPPED = (_PACKAGE / "_configs/runs", _PACKAGE.parent / _RECIPES)
"""The recipes of an installed wheel, and those of a source tree."""


def load_recipe(reference: str) -> RunConfig:
    """Reads the run that a recipe describes.

    Args:
      reference: `FILE.py[:FUNCTION]`, a Python file and the function in it that returns the run (`recipe` by default);
        `FILE.json`, a resolved configuration, which is parsed and executes nothing; or `NAME[:FUNCTION]`, a file of
        that name in configs/runs, here or among the shipped ones.

    Raises:
      ConfigError: no such file or function, or values of the wrong type.
      UserError: the recipe raised an exception.
    """
    if reference.endswith(".json"):
        path = Path(reference)
        if not path.is_file():
            raise ConfigError([_missing_file(path)])
        return from_json(path.read_text(encoding="utf-8", errors="replace"), source=reference)
    name, _, function = reference.partition(":")
    path = _find(name)
    run = _call(path, function or DEFAULT_FUNCTION)
    # Through JSON and back: what a function returns is held to the same types as what is read from a file.
    try:
        text = to_json(run)
    except TypeError as error:
        raise ConfigError([Problem(name, str(error), "numbers, strings, tuples and configuration classes")]) from None
    return from_json(text, source=name)


def shipped_recipes() -> list[Path]:
    """The Python recipes that come with the package."""
    folder = next((folder for folder in _SHIPPED if folder.is_dir()), None)
    return sorted(folder.glob("*.py")) if folder else []


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".py":
        if path.is_file():
            return path
        # A shipped recipe may be named as in the source tree wherever one stands.
        shipped = [found for found in shipped_recipes() if _RECIPES / found.name == path]
        if shipped:
            return shipped[0]
        raise ConfigError([_missing_file(path)])
    if path.is_dir():
        fix = f"its configuration is a recipe: {path / 'config.json'}" if (path / "config.json").is_file() else ""
        raise ConfigError([Problem(name, "a directory", "a recipe, FILE.py[:FUNCTION] or FILE.json", fix)])
    if path.parent == Path("."):
        candidates = [_RECIPES / f"{name}.py", *(found for found in shipped_recipes() if found.stem == name)]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
    raise ConfigError([_missing_file(path)])


def _missing_file(path: Path) -> Problem:
    suffixes = (path.suffix,) if path.suffix in (".py", ".json") else (".py", ".json")
    beside = [found for found in path.parent.glob("*") if found.suffix in suffixes and found.is_file()]
    here = list(_RECIPES.glob("*.py"))
    known = [str(found) for found in (*beside, *sorted(here), *([] if here else shipped_recipes()))]
    by_stem = {Path(found).stem: found for found in reversed(known)}
    near = [by_stem[stem] for stem in difflib.get_close_matches(path.stem, by_stem, n=3, cutoff=0.5)]
    fix = f"perhaps {' or '.join(near)}" if near else f"recipes here: {', '.join(dict.fromkeys(known)) or 'none'}"
    return Problem(
        str(path), "no such recipe", "an existing FILE.py[:FUNCTION], FILE.json or the name of a recipe", fix
    )


def _call(path: Path, function: str) -> RunConfig:
    """Executes the file, with its own folder on the path as Python does for a script, and calls the function."""
    spec = importlib.util.spec_from_file_location(f"t5x_like_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As Python does for every module it imports: a dataclass in the recipe looks itself up there.
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
        make = getattr(module, function, None)
        if not callable(make):
            there = [name for name in _functions(module)]
            near = difflib.get_close_matches(function, there, n=1)
            fix = f"perhaps {path}:{near[0]}" if near else f"functions there: {', '.join(there) or 'none'}"
            raise ConfigError(
                [Problem(str(path), f"no function {function!r}", "a function that returns a RunConfig", fix)]
            )
        run = make()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"the recipe {path} raised {_place(error, path)}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    if not isinstance(run, RunConfig):
        raise ConfigError([Problem(f"{path}:{function}", f"a {type(run).__name__}", "a RunConfig as its result")])
    return run


def _functions(module: types.ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def _place(error: BaseException, path: Path) -> str:
    """The exception with the line of the recipe that it came from."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{kind} at {error.filename}:{error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    place = f" at {path}:{lines[-1]}" if lines else ""
    return f"{kind}{place}: {error}"


def apply_overrides(run: RunConfig, arguments: Sequence[str], *, options: Sequence[str] = ()) -> RunConfig:
    """`run` with single fields replaced, as by `--training.num-train-steps 200 --data.corpus.files a.txt b.txt`.

    Values are parsed by the type of their field; hyphens and underscores are the same. Objectives are addressed by
    their index, as in `--data.mixture.0.rate 2`. `--help` prints all fields and exits.

    Args:
      run: The recipe's run.
      arguments: The overrides.
      options: Other options of the command, which a mistyped one may have meant.

    Raises:
      ConfigError: unknown fields, all of them listed, each with the nearest known ones.
      SystemExit: a value that its field's type does not take; the code is 2 and the message is on stderr.
    """
    arguments = list(arguments)
    if not arguments:
        return run
    if "--help" not in arguments:
        problems = _unknown_keys(run, arguments, options)
        if problems:
            raise ConfigError(problems)
    import tyro

    # The recipe decides which class stands in a union (the optimizer, an objective); its fields can be overridden.
    changed: RunConfig = tyro.cli(
        RunConfig,
        args=arguments,
        default=run,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        prog="t5x-like COMMAND RECIPE",
        description="Fields of the configuration, with the recipe's values as defaults.",
    )
    return changed


def _unknown_keys(run: RunConfig, arguments: Sequence[str], options: Sequence[str]) -> list[Problem]:
    fields = dict(_fields(run))
    problems = []
    values_left = 0.0
    for argument in arguments:
        is_option = argument.startswith("--")
        if not is_option and values_left >= 1:
            values_left -= 1
            continue
        word, has_value, value = argument.partition("=")
        field = word.lstrip("-").replace("-", "_")
        if is_option and field in fields:
            values_left = 0 if has_value else fields[field]
            continue
        # The words after an unknown option are taken to be its value.
        values_left = float("inf") if is_option else 0
        group = [_option(path) for path in fields if path.startswith(f"{field}.")]
        if not is_option and not has_value:
            problems.append(Problem(argument, "a word that belongs to no option", "overrides as --FIELD VALUE"))
        elif not is_option and field in fields:
            problems.append(Problem(argument, "no leading --", f"{_option(field)} {value}"))
        elif group:
            problems.append(Problem(word, "a group of fields", f"one of its fields: {', '.join(group)}"))
        else:
            near = _nearest(word, [*options, *(_option(path) for path in fields)])
            problems.append(Problem(word, "no such option", f"a field of the recipe, perhaps {' or '.join(near)}"))
    return problems


def _option(path: str) -> str:
    return f"--{path.replace('_', '-')}"


def _fields(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Dotted path of every field that can be overridden, and how many words its value may have."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        children = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        # An empty tuple of sections and a section that is not there have no fields to override.
        children = [
            (name, child) for name, child in children if child not in ((), None) or not _holds_sections(hints[name])
        ]
    elif isinstance(value, tuple) and value and all(dataclasses.is_dataclass(item) for item in value):
        children = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield path, float("inf") if isinstance(value, tuple) else 1
        return
    for name, child in children:
        yield from _fields(child, f"{path}.{name}" if path else name)


def _holds_sections(hint: Any) -> bool:
    """Whether a field's type is a tuple of configurations, or a configuration or None."""
    return any(dataclasses.is_dataclass(kind) or _holds_sections(kind) for kind in typing.get_args(hint))


def _nearest(mistyped: str, options: Sequence[str]) -> list[str]:
    """Up to three options most like a mistyped one: by spelling of the whole, or of the last part or its initials."""
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
