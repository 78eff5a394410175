"""Directory of an imported model, as `t5x-like convert --from` writes it:

model.json          the family and the model's configuration
checkpoints/0/      the parameters, and the optimizer's state if it was imported
huggingface/        config.json and tokenizer files of a Hugging Face model
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic

from t5x_like import run_directory
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config.model import ModelConfig
from t5x_like.config.run import CheckpointConfig
from t5x_like.errors import ConfigError, ConfigProblem, DataError, SafetyError
from t5x_like.utils.atomic_write import new_directory
from t5x_like.utils.json_reader import read_json
from t5x_like.utils.links import require_links_inside

MODEL = "model.json"
HUGGINGFACE_DIR = "huggingface"
"""Folder of an imported model with the files of its tokenizer and of its pooling."""
SCHEMA_VERSION = 2


def save(partial: Path, model: ModelConfig, family: str | None, state: Mapping[str, Any]) -> None:
    """Write model.json and the checkpoint.

    Args:
      family: Hugging Face's `model_type`, as which the model is exported again; None: the plainest that fits.
      state: {"params"}, and {"opt_state"} if an optimizer's state was imported.
    """
    describe(partial, model, family)
    checkpoints = CheckpointManager(partial / run_directory.CHECKPOINTS, CheckpointConfig())
    try:
        checkpoints.save(0, state, {"family": family})
    finally:
        checkpoints.close()


def describe(directory: Path, model: ModelConfig, family: str | None) -> None:
    """Write model.json; see `save`."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "family": family,
        "model": json.loads(json.dumps(dataclasses.asdict(model))),
    }
    (directory / MODEL).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_model(directory: Path) -> tuple[ModelConfig, str | None]:
    """Return the model of a run or of an imported model, and the family that it was imported from.

    Raises:
      ConfigError, DataError: the directory has neither a run nor an imported model, or its file is malformed.
    """
    path = directory / MODEL
    # A foreign directory must not make this program read files elsewhere through links.
    require_links_inside(directory / HUGGINGFACE_DIR)
    if not path.is_file():
        return run_directory.read_config(directory).model, None
    try:
        document = read_json(path)
        if document.get("schema_version") != SCHEMA_VERSION:
            found = document.get("schema_version")
            raise DataError(
                f"{path}: found schema_version {found!r}, expected {SCHEMA_VERSION}; convert the model again"
            )
        model = _adapter().validate_json(json.dumps(document.get("model")))
    except pydantic.ValidationError as error:
        raise DataError(f"{path}: found no model: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}") from None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: expected a JSON object, found {type(error).__name__}: {error}") from None
    kind = document.get("family")
    return model, kind if isinstance(kind, str) else None


@functools.cache
def _adapter() -> pydantic.TypeAdapter[ModelConfig]:
    return pydantic.TypeAdapter(ModelConfig)


def require_free(out: Path) -> None:
    """Raise ConfigError if `out` exists and is not an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = "an existing directory" if out.is_dir() else "an existing file"
        raise ConfigError([ConfigProblem(str(out), found, "a directory that does not exist", "name another one")])


@contextlib.contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """Yield a directory beside `out` that is renamed to `out` on success and removed on an error."""
    require_free(out)
    try:
        with new_directory(out) as partial:
            yield partial
    except OSError as error:
        raise SafetyError(f"cannot write {out}: {error.strerror or error}") from error
