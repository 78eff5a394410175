"""Every path of the command line is a local one, or a URL that is used or refused, and never a folder `gs:`."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.config_examples import changed, example

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.cli import arguments, launch_targets
from t5x_like.cli.main import _parser
from t5x_like.config import InitializeFrom, LoraConfig
from t5x_like.config.validation import validate
from t5x_like.errors import ConfigError
from t5x_like.storage.mirror import mirror_of
from t5x_like.storage.transfers import is_transferred

_PATH_NAMES = re.compile(r"\b(DIR|FILE|PATH|OUT|MODEL|RUN|STORE|URL)\b")
"""Metavariables of options whose values are paths."""
_OTHERS = {
    ("predict", "--input"): "files of rows, which `data.sources` reads: test_file_formats.py",
    ("eval", "--data"): "the same, or a recipe, which load_recipe refuses",
    **{("account", name): "names of models, or recipes, which load_recipe refuses" for name in ("models", "--draft")},
    **{(command, "recipe"): "load_recipe refuses URLs" for command in ("train", "prepare", "inspect", "plan")},
}
"""Path arguments of which the parser keeps the text, and who reads it."""
_LOCAL = (arguments.local_path, arguments.local_text)
_KEPT_TEXTS = (arguments.location_text, launch_targets._bucket)


def _actions(
    parser: argparse.ArgumentParser | None = None, name: str = ""
) -> Iterator[tuple[str, str, argparse.Action]]:
    """Yield the command, the name and the action of each argument of all commands."""
    for action in (parser or _parser())._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, child in action.choices.items():
                yield from _actions(child, f"{name} {command}".strip())
        else:
            yield name, next(iter(action.option_strings), action.dest), action


def _is_path(action: argparse.Action) -> bool:
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    return bool(_PATH_NAMES.search(metavar)) or action.type in (arguments.local_path, arguments.output_path)


_PATHS = [(command, name, action) for command, name, action in _actions() if _is_path(action)]


def test_the_walk_finds_the_paths() -> None:
    found = {(command, name) for command, name, _ in _PATHS}
    expected = {
        *(("train", name) for name in ("--workdir", "--plan", "--plugin")),
        *(("generate", name) for name in ("model", "--input", "--output", "--draft-model")),
        *(("convert", "out"), ("average", "run_dir"), ("eval", "models"), ("eval", "--pairs"), ("doctor", "target")),
        *(("launch local", "--log-dir"), ("launch slurm", "--workdir"), ("launch tpu-vm", "--source")),
    }
    assert expected <= found
    assert _OTHERS.keys() <= {(command, name) for command, name, _ in _actions()}


@pytest.mark.parametrize(("command", "name", "action"), _PATHS, ids=lambda part: part if isinstance(part, str) else "")
def test_url_is_used_or_refused(
    command: str, name: str, action: argparse.Action, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (command, name) in _OTHERS:
        return
    monkeypatch.chdir(tmp_path)
    assert callable(action.type), f"{command} {name} would take a URL for a path"
    with pytest.raises(ConfigError, match="http://host/x"):
        action.type("http://host/x")
    for url in ("gs://bucket/some/x", "s3://bucket/some/x", "memory://some/x"):
        try:
            found: Any = action.type(url)
        except ConfigError as error:
            assert url in str(error) and (action.type in _LOCAL or name == "--bucket")
            continue
        path = found.path if isinstance(found, CheckpointRef) else found
        if action.type in _KEPT_TEXTS:
            assert path == url
        else:
            assert path.is_absolute() and (is_transferred(path) or mirror_of(path) is not None)
    with_file_url = Path("/some/x")
    try:
        found = action.type("file:///some/x")
    except ConfigError:
        assert action.type in _LOCAL or name == "--bucket"
    else:
        path = found.path if isinstance(found, CheckpointRef) else found
        assert path in (with_file_url, "file:///some/x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["initialize_from.directory", "training.lora.base", "data.tokenizer.path"])
def test_configured_path_is_checked(field: str) -> None:
    def with_path(path: str) -> Any:
        match field:
            case "initialize_from.directory":
                return changed(example(), "initialize_from", InitializeFrom(directory=path))
            case "training.lora.base":
                return changed(example(), "training.lora", LoraConfig(base=path))
            case _:
                tokenizer = dataclasses.replace(example().data.tokenizer, kind="sentencepiece", path=path)
                return changed(example(), "data.tokenizer", tokenizer)

    assert not [problem for problem in validate(with_path("gs://bucket/x")) if problem.where == field]
    assert [problem for problem in validate(with_path("http://host/x")) if problem.where == field]
