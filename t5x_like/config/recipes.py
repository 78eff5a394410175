"""Recipes: Python files and JSON files that define the configuration of a run."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from t5x_like import plugins
from t5x_like.config.run import RunConfig
from t5x_like.config.serialization import from_json, to_json
from t5x_like.errors import ConfigError, ConfigProblem, UserError
from t5x_like.utils import name_registry, trusted_urls
from t5x_like.utils.json_reader import parse_json

Result = TypeVar("Result")
DEFAULT_FUNCTION = "recipe"
BASE = "@"
"""Separator of a recipe and the directory of the model that it starts from: `finetune:classify@runs/base`."""
_RECIPES = Path("configs/runs")
_PACKAGE = Path(__file__).parents[1]
_SHIPPED = (_PACKAGE / "_configs/runs", _PACKAGE.parent / _RECIPES)
"""Folders of the shipped recipes: in an installed wheel, and in a source tree."""


def load_recipe(reference: str) -> RunConfig:
    """Return the run that a recipe describes.

    Args:
      reference: `FILE.py[:FUNCTION][@MODEL_DIR]`, a Python file and the function in it that returns the run (`recipe`
        by default), called with the directory of a model that the run starts from, if one is named;
        `FILE.json`, a resolved configuration, which executes nothing but plug-ins that the user trusts; or
        `NAME[:FUNCTION]`, a file of that name in configs/runs, here or among the shipped ones.

    Raises:
      ConfigError: no such file or function, a URL, or values of the wrong type.
      SafetyError: a configuration in JSON names plug-ins that the user does not trust, or that have been changed.
      UserError: the recipe or a plug-in raised an exception.
    """
    # Code, and files beside it, are taken from this machine only.
    trusted_urls.require_local(reference.partition(BASE)[0], "RECIPE")
    if reference.endswith(".json"):
        path = Path(reference)
        if not path.is_file():
            raise ConfigError([_missing_file(path)])
        text = path.read_text(encoding="utf-8", errors="replace")
        plugins.admit(text, path.parent, reference)
        return from_json(text, source=reference)
    name_and_function, _, base = reference.partition(BASE)
    name, _, function = name_and_function.partition(":")
    path = _find(name)
    run = _with_plugins(_call(path, function or DEFAULT_FUNCTION, base), path)
    # Through JSON and back, so that the result of a function has the same types as a configuration read from a file.
    try:
        text = to_json(run)
    except TypeError as error:
        raise ConfigError(
            [ConfigProblem(name, str(error), "numbers, strings, tuples and configuration classes")]
        ) from None
    # The recipe is the user's own code, so the modules and URLs that it names are trusted, too.
    document = parse_json(text)
    plugins.trust(plugins.named_modules(document) | trusted_urls.urls_in(document))
    return from_json(text, source=name)


def _with_plugins(run: RunConfig, path: Path) -> RunConfig:
    """Import the plug-ins of a Python recipe; a recipe that registers extensions itself becomes the last of them."""
    plugins.load_beside([name for name in run.plugins if name != path.name], path.parent)
    if name_registry.has_registered(_module_name(path)):
        plugins.adopt(path.name, path)
        if path.name not in run.plugins:
            run = dataclasses.replace(run, plugins=(*run.plugins, path.name))
    return run


def _module_name(path: Path) -> str:
    return f"t5x_like_recipe_{path.stem}"


def shipped_recipes() -> list[Path]:
    """Return the Python recipes that are shipped with the package."""
    folder = next((folder for folder in _SHIPPED if folder.is_dir()), None)
    return sorted(folder.glob("*.py")) if folder else []


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".py":
        if path.is_file():
            return path
        # A shipped recipe may be named by its path in the source tree, from any working directory.
        shipped = [found for found in shipped_recipes() if _RECIPES / found.name == path]
        if shipped:
            return shipped[0]
        raise ConfigError([_missing_file(path)])
    if path.parent == Path("."):
        candidates = [_RECIPES / f"{name}.py", *(found for found in shipped_recipes() if found.stem == name)]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
    # After the recipes of this name: a folder, such as that of a run, does not hide them.
    if path.is_dir():
        fix = f"its configuration is a recipe: {path / 'config.json'}" if (path / "config.json").is_file() else ""
        raise ConfigError([ConfigProblem(name, "a directory", "a recipe, FILE.py[:FUNCTION] or FILE.json", fix)])
    raise ConfigError([_missing_file(path)])


def _missing_file(path: Path) -> ConfigProblem:
    suffixes = (path.suffix,) if path.suffix in (".py", ".json") else (".py", ".json")
    beside = [found for found in path.parent.glob("*") if found.suffix in suffixes and found.is_file()]
    here = list(_RECIPES.glob("*.py"))
    known = [str(found) for found in (*beside, *sorted(here), *([] if here else shipped_recipes()))]
    by_stem = {Path(found).stem: found for found in reversed(known)}
    near = [by_stem[stem] for stem in difflib.get_close_matches(path.stem, by_stem, n=3, cutoff=0.5)]
    fix = f"perhaps {' or '.join(near)}" if near else f"recipes here: {', '.join(dict.fromkeys(known)) or 'none'}"
    return ConfigProblem(
        str(path),
        "a file of another kind" if path.is_file() else "no such recipe",
        "an existing FILE.py[:FUNCTION], FILE.json or the name of a recipe",
        fix,
    )


def _call(path: Path, function: str, base: str) -> RunConfig:
    """Execute the file and call the function with its base."""

    def call(make: Callable[..., RunConfig]) -> RunConfig:
        _check_base(f"{path}:{function}", make, base)
        return make(Path(base)) if base else make()

    run = call_function(path, function, call, file="recipe", result="a RunConfig")
    if not isinstance(run, RunConfig):
        raise ConfigError(
            [ConfigProblem(f"{path}:{function}", f"a value of type {type(run).__name__}", "a RunConfig as its result")]
        )
    return run


def call_function(
    path: Path, function: str, call: Callable[[Callable[..., Any]], Result], *, file: str, result: str
) -> Result:
    """Execute a file of the user, with its folder on the import path as for a script, and call a function in it.

    Args:
      call: Calls the function.
      file: Kind of the file, for messages.
      result: Result of the function, for messages.

    Raises:
      ConfigError: there is no such function.
      UserError: the file or the function raised an exception.
    """
    spec = importlib.util.spec_from_file_location(_module_name(path), path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As for every imported module: a dataclass in the file looks up its own module here.
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
                [ConfigProblem(str(path), f"no function {function!r}", f"a function that returns {result}", fix)]
            )
        return call(make)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"the {file} {path} raised {_place(error, path)}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))


def _check_base(where: str, make: Callable[..., RunConfig], base: str) -> None:
    """Raise ConfigError if a function that takes the directory of a model gets none, or the reverse."""
    takes_base = bool(inspect.signature(make).parameters)
    if takes_base and not base:
        fix = "name it by --from MODEL_DIR"
        raise ConfigError([ConfigProblem(where, "no model", "the directory of the model that it starts from", fix)])
    if base and not takes_base:
        expected = "a recipe that starts from a model: a function with one parameter"
        raise ConfigError([ConfigProblem(where, f"a function without parameters, with --from {base}", expected)])


def _functions(module: types.ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def _place(error: BaseException, path: Path) -> str:
    """Return the exception as text, with the line of the recipe that raised it."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{kind} at {error.filename}:{error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    location = f" at {path}:{lines[-1]}" if lines else ""
    return f"{kind}{location}: {error}"
