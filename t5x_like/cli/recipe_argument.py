"""The argument RECIPE, with the model that a recipe starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from t5x_like.config import RunConfig
from t5x_like.config.recipes import BASE
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.utils.trusted_urls import scheme_of

CONTINUE = "from:"
"""Prefix of a recipe that continues a published model."""


def recipe_words(arguments: list[str]) -> list[str]:
    """Return the arguments of a command that takes a recipe, with `--from MODEL_DIR` as a part of the recipe.

    Alone it is the recipe `from:MODEL_DIR`; after a recipe it is the model that this starts from, `RECIPE@MODEL_DIR`.
    """
    for position, word in enumerate(arguments):
        name, has_value, value = word.partition("=")
        if name == "--from" and (has_value or position + 1 < len(arguments)):
            rest = arguments[position + (1 if has_value else 2) :]
            directory = value if has_value else arguments[position + 1]
            if not arguments[0].startswith("-"):
                return [f"{arguments[0]}{BASE}{directory}", *arguments[1:position], *rest]
            return [f"{CONTINUE}{directory}", *arguments[:position], *rest]
    return arguments


def starts_from_model(reference: str) -> bool:
    """Return whether a RECIPE names a model that it starts from, so that `train` prepares its data as well."""
    return reference.startswith(CONTINUE) or BASE in reference


def recipe_run(reference: str) -> RunConfig:
    """Return the run of a RECIPE, without overrides and not validated.

    A model in an object store that it starts from is named by its URL.
    """
    is_continued = reference.startswith(CONTINUE)
    recipe, separator, base = ("", CONTINUE, reference[len(CONTINUE) :]) if is_continued else reference.partition(BASE)
    is_url = bool(scheme_of(base))
    if is_url:
        from t5x_like.storage.mirror import local_copy

        base = str(local_copy(base, "--from"))
    if is_continued:
        from t5x_like.interop.huggingface.continued_run import continued_run

        _refuse_own_model(Path(base))
        run = continued_run(Path(base))
    else:
        from t5x_like.config.recipes import load_recipe

        run = load_recipe(f"{recipe}{separator}{base}")
    return _with_urls(run) if is_url else run


def _refuse_own_model(directory: Path) -> None:
    """Raise ConfigError if a directory is that of a run or of an imported model."""
    from t5x_like import run_directory
    from t5x_like.checkpoints import model_dir

    if (directory / model_dir.MODEL).is_file():
        kind = "an imported model"
    elif (directory / run_directory.RECORD).is_file() or (directory / run_directory.CHECKPOINTS).is_dir():
        kind = "a run"
    else:
        return
    fix = f"to start a recipe from its parameters, pass `--initialize-from.directory {directory}`"
    raise ConfigError([ConfigProblem("--from", f"{directory}, {kind}", "a Hugging Face directory", fix)])


def _with_urls(run: RunConfig) -> RunConfig:
    """Return a run that names the URLs of the local copies that it was made from."""
    from t5x_like.config.serialization import from_json, to_json
    from t5x_like.storage.mirror import original
    from t5x_like.utils import trusted_urls
    from t5x_like.utils.json_reader import parse_json

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: renamed(one) for name, one in value.items()}
        if isinstance(value, list):
            return [renamed(one) for one in value]
        return original(value) if isinstance(value, str) and value.startswith("/") else value

    document = renamed(parse_json(to_json(run)))
    trusted_urls.trust(trusted_urls.urls_in(document))
    return from_json(json.dumps(document), source="--from")
