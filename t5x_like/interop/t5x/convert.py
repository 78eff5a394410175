"""A T5X checkpoint's arrays to parameters, one by one, along the table of `names`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from t5x_like.config.errors import DataError
from t5x_like.interop.t5x.arrays import Arrays
from t5x_like.interop.t5x.names import Shape, Tensor

Tree = Any
BLOCK_BYTES = 64 * 2**20
"""About how much of an array that holds all layers is in memory beside the parameter."""


def check(tensors: Sequence[Tensor], arrays: Arrays, prefix: str, model: str) -> None:
    """Raises DataError, with a table of all that differs, unless the checkpoint holds exactly these arrays.

    Args:
      prefix: Of their paths: "target/".
      model: What the model is called in the message.
    """
    found = {path.removeprefix(prefix): stored for path, stored in arrays.items() if path.startswith(prefix)}
    wanted = {tensor.path: tensor.shapes for tensor in tensors}
    rows: list[tuple[str, str, str]] = []
    for path in sorted({*found, *wanted}):
        stored, shapes = found.get(path), wanted.get(path)
        if stored is None or shapes is None or stored.shape not in shapes:
            expected = " or ".join(map(str, shapes)) if shapes else "nothing"
            rows.append((path, "nothing" if stored is None else str(stored.shape), expected))
        elif stored.dtype.kind not in "fV" and not (arrays.version == 2 and stored.dtype == np.uint16):
            rows.append((path, f"{stored.dtype}", "numbers of a floating type"))
    if rows:
        raise DataError(
            f"{arrays.directory}: the arrays are not those of {model} (a T5X checkpoint does not say what its model "
            f"is; is it this one?):\n{_table([('array', 'found', 'expected'), *rows[:30]])}"
            + (f"\n  and {len(rows) - 30} more" if len(rows) > 30 else "")
        )
    missing = list(itertools.islice((part for path in wanted for part in arrays.missing_chunks(prefix + path)), 10))
    if missing:
        raise DataError(f"{arrays.directory}: parts of arrays are missing: {', '.join(missing)}")


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def read_params(tensors: Sequence[Tensor], arrays: Arrays, abstract: Tree, prefix: str = "target/") -> Tree:
    """The parameters, float32, each made where its sharding puts it. Beside them, one is in memory.

    Args:
      abstract: `jax.ShapeDtypeStruct`s, with shardings or without.
    """
    of_path: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        of_path.setdefault(tensor.rule.ours, []).append(tensor)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def make(path: Any, leaf: Any) -> jax.Array:
        whole = assemble(of_path[jax.tree_util.keystr(path, simple=True, separator="/")], arrays, leaf.shape, prefix)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding or default, lambda cells: whole[cells])

    return jax.tree_util.tree_map_with_path(make, abstract)


def assemble(tensors: Sequence[Tensor], arrays: Arrays, shape: Shape, prefix: str) -> npt.NDArray[np.float32]:
    """A parameter of this shape from the array or, for each layer, arrays that it is in."""
    out = np.empty(shape, np.float32)
    for tensor in tensors:
        path = prefix + tensor.path
        if tensor.axis is None:
            part = out if tensor.layer is None else out[tensor.layer]
            part[...] = tensor.ours(arrays.read(path), part.shape)
        else:
            _read_stacked(tensor, arrays, path, out)
    return out


def _read_stacked(tensor: Tensor, arrays: Arrays, path: str, out: npt.NDArray[np.float32]) -> None:
    """All layers of an array, block by block along its first dimension that is not that of the layers."""
    stored = arrays[path]
    layers = out.shape[0]
    if tensor.rule.transposed or len(stored.shape) == 1:
        out[...] = tensor.ours(arrays.read(path), out.shape)
        return
    along = 0 if tensor.axis != 0 else 1
    inner = [size for axis, size in enumerate(stored.shape) if axis != tensor.axis]
    target = out.reshape(layers, *inner)
    chunk = stored.chunks[along] if stored.chunks else 1
    row_bytes = max(1, 4 * layers * int(np.prod(inner[1:])))
    step = max(1, BLOCK_BYTES // (row_bytes * chunk)) * chunk
    for start in range(0, inner[0], step):
        cells = slice(start, min(start + step, inner[0]))
        block = arrays.read(path, (cells,) if along == 0 else (slice(None), cells))
        target[:, cells] = np.moveaxis(block, tensor.axis or 0, 0)
