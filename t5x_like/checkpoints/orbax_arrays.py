"""Arrays of a checkpoint. The only module that imports Orbax; its interface has no types of Orbax."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from t5x_like.utils import tree_paths

PARAMS = "params"
"""Folder of the parameters, and the first part of their paths."""
TRAINING = "training"
"""Folder of all other arrays."""


def _import_orbax() -> Any:
    """Import Orbax without its changes to the logging of the process.

    Orbax logs while it is imported, and absl then adds a handler to the root logger. It also logs the traceback of an
    error in each of its threads before it raises the error, which this module reports once.
    """
    handlers = list(logging.root.handlers)
    from orbax.checkpoint import v1  # type: ignore[import-untyped]

    logging.root.handlers[:] = handlers
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    return v1


ocp = _import_orbax()


def save(directory: Path, leaves: Mapping[str, Any]) -> Callable[[], None]:
    """Start to write the arrays by path to `directory`, and return when they may be donated.

    Returns:
      A function that waits until they are written; it raises the error of a failed write.
    """
    with _context():
        # `save_checkpointables_async` returns when the arrays are copied to the host; `result` waits for the disk.
        committed: Callable[[], None] = ocp.save_checkpointables_async(directory, _by_item(leaves)).result
    return committed


def load(directory: Path, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays in `directory` by path, in the order of `leaves`, their `jax.ShapeDtypeStruct`s with
    shardings."""
    with _context():
        loaded = tree_paths.by_path(ocp.load_checkpointables(directory, _by_item(leaves)))
    # The split into items exists in the files only, not in the tree of the caller.
    by_path = {path.removeprefix(f"{TRAINING}/"): leaf for path, leaf in loaded.items()}
    return {path: by_path[path] for path in leaves}


def _context() -> Any:
    context = ocp.Context()
    # Compression of random mantissas saves 8 percent of the space and takes three times as long.
    context.array.saving.use_compression = False
    return context


def _by_item(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Split the state into items that are stored separately, so that parameters can be read and verified alone."""
    prefix = f"{PARAMS}/"
    params = {path: leaf for path, leaf in leaves.items() if path.startswith(prefix)}
    rest = {f"{TRAINING}/{path}": leaf for path, leaf in leaves.items() if not path.startswith(prefix)}
    return tree_paths.nested({**params, **rest})
