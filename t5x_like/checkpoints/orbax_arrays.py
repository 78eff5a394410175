"""Arrays of a checkpoint. The only module that imports Orbax; its interface has no types of Orbax."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from t5x_like.checkpoints.fingerprints import Summand, fingerprint_of_part
from t5x_like.faults import fault_of
from t5x_like.storage import locations
from t5x_like.utils import tree_paths

PARAMS = "params"
"""Folder of the parameters, and the first part of their paths."""
TRAINING = "training"
"""Folder of all other arrays."""
_DAMAGE = re.compile(
    r"[^\n]*(DATA_LOSS|CRC-?32C|checksum|corrupt|Error (?:decoding|parsing|reading))[^\n]*", re.IGNORECASE
)


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


def damage(error: BaseException) -> str | None:
    """Return in one line what an error of `load` says about damaged files; None for any other error."""
    found = None if fault_of(str(error)) else _DAMAGE.search(str(error))
    return f"the arrays cannot be read ({found[0].strip()[:200]})" if found else None


def stored_fingerprint(directory: Path, path: str, summand: Summand) -> str | None:
    """Return the fingerprint of an array in `directory`, which is read in parts; None if it cannot be read.

    Args:
      directory: Where `save` has written it.
      path: Path of the array.
      summand: Function by which the fingerprint is computed.
    """
    item = PARAMS if path.startswith(f"{PARAMS}/") else TRAINING
    name = path.removeprefix(f"{PARAMS}/").replace("/", ".")
    base = {"driver": "file", "path": f"{directory / item}/"}
    spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
    try:
        array = locations.wait(directory, tensorstore.open(spec, open=True, read=True))
        parts = (
            fingerprint_of_part(np.asarray(locations.wait(directory, array[index].read())), index, array.shape, summand)
            for index in _parts(array.shape, array.chunk_layout.read_chunk.shape or ())
        )
        return f"{sum(parts) % 2**32:08x}"
    except ValueError:
        return None


def _parts(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yield the places of the chunks of an array."""
    yield from itertools.product(
        *(
            [slice(start, min(start + length, size)) for start in range(0, size, length)]
            for size, length in zip(shape, chunk, strict=True)
        )
    )


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
