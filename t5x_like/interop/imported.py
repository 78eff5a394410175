"""What `t5x-like convert --from` writes: a checkpoint of ours and what its model is.

model.json          the family and the model's configuration
checkpoints/0/      the parameters, and an optimizer's state where one was asked for
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic

from t5x_like import run_directory
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config.errors import DataError, RefusedError
from t5x_like.config.model import ModelConfig
from t5x_like.config.run import CheckpointConfig

MODEL = "model.json"
SCHEMA_VERSION = 1


def save(partial: Path, model: ModelConfig, family: str | None, state: Mapping[str, Any]) -> None:
    """Writes model.json and the checkpoint.

    Args:
      family: The `model_type` of Hugging Face's that it is written back as; None: the plainest that fits.
      state: {"params"} and perhaps {"opt_state"}.
    """
    describe(partial, model, family)
    checkpoints = CheckpointManager(partial / run_directory.CHECKPOINTS, CheckpointConfig())
    try:
        checkpoints.save(0, state, {"family": family})
    finally:
        checkpoints.close()


def describe(directory: Path, model: ModelConfig, family: str | None) -> None:
    """Writes model.json; see `save`."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "family": family,
        "model": json.loads(json.dumps(dataclasses.asdict(model))),
    }
    (directory / MODEL).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_model(directory: Path) -> tuple[ModelConfig, str | None]:
    """The model of a run's directory or of an imported one, and the family that it was imported from.

    Raises:
      ConfigError, DataError: there is neither a run nor an import, or its file is malformed.
    """
    path = directory / MODEL
    if not path.is_file():
        return run_directory.read_config(directory).model, None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("schema_version") != SCHEMA_VERSION:
            found = document.get("schema_version")
            raise DataError(f"{path}: schema_version {found!r}, expected {SCHEMA_VERSION}")
        model = pydantic.TypeAdapter(ModelConfig).validate_json(json.dumps(document.get("model")))
    except pydantic.ValidationError as error:
        raise DataError(f"{path}: no model: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON object, found {type(error).__name__}: {error}") from None
    kind = document.get("family")
    return model, kind if isinstance(kind, str) else None


def require_free(out: Path) -> None:
    """Raises RefusedError where there is something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RefusedError(f"{out} is there already; name another place")


@contextlib.contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` if all goes well, and else is removed."""
    require_free(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out)
    except OSError as error:
        raise RefusedError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
