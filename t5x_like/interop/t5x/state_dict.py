"""Conversion of a T5X checkpoint's arrays to parameters, one at a time, by the rules of `weight_map`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from t5x_like.errors import DataError
from t5x_like.interop.t5x.checkpoint_reader import Arrays
from t5x_like.interop.t5x.weight_map import Shape, Tensor
from t5x_like.interop.weight_files import refuse_not_finite
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

BLOCK_BYTES = 64 * 2**20
"""Approximate size of the part of an array with all layers that is in memory beside the parameter."""


def check(tensors: Sequence[Tensor], arrays: Arrays, prefix: str, model: str) -> None:
    """Check that the checkpoint holds exactly the arrays of the model.

    Args:
      tensors: Arrays of the model.
      arrays: Arrays of the checkpoint.
      prefix: Beginning of the paths of parameters: "target/".
      model: Name of the model in the message.

    Raises:
      DataError: arrays are missing, unknown or of another shape or type; the message has a table of the differences.
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
            rows.append((path, f"{stored.dtype}", "a floating-point type"))
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


def read_params(tensors: Sequence[Tensor], arrays: Arrays, abstract: PyTree, prefix: str = "target/") -> PyTree:
    """Return the parameters, float32, each created on the devices of its sharding.

    Besides the parameters, one of them at a time is in host memory.

    Args:
      tensors: Arrays of the model.
      arrays: Arrays of the checkpoint.
      abstract: `jax.ShapeDtypeStruct`s, with or without shardings.
      prefix: Beginning of the paths of parameters.

    Raises:
      DataError: arrays hold NaN or infinity.
    """
    by_path: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        by_path.setdefault(tensor.rule.param, []).append(tensor)
    not_finite: list[str] = []
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def make(path: str, leaf: Any) -> jax.Array:
        whole = assemble(by_path[path], arrays, leaf.shape, prefix)
        if not np.isfinite(whole).all():
            not_finite.append(path)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding or default, lambda slices: whole[slices])

    params = tree_paths.map_by_path(make, abstract)
    refuse_not_finite(arrays.directory, not_finite)
    return params


def assemble(tensors: Sequence[Tensor], arrays: Arrays, shape: Shape, prefix: str) -> npt.NDArray[np.float32]:
    """Return a parameter of this shape from its array, or from one array per layer."""
    out = np.empty(shape, np.float32)
    for tensor in tensors:
        path = prefix + tensor.path
        if tensor.axis is None:
            part = out if tensor.layer is None else out[tensor.layer]
            part[...] = tensor.to_param(arrays.read(path), part.shape)
        else:
            _read_stacked(tensor, arrays, path, out)
    return out


def _read_stacked(tensor: Tensor, arrays: Arrays, path: str, out: npt.NDArray[np.float32]) -> None:
    """Read all layers of an array in blocks along its first dimension that does not count layers."""
    stored = arrays[path]
    layers = out.shape[0]
    if tensor.rule.transposed or len(stored.shape) == 1:
        out[...] = tensor.to_param(arrays.read(path), out.shape)
        return
    along = 0 if tensor.axis != 0 else 1
    inner = [size for axis, size in enumerate(stored.shape) if axis != tensor.axis]
    target = out.reshape(layers, *inner)
    chunk = stored.chunks[along] if stored.chunks else 1
    row_bytes = max(1, 4 * layers * int(np.prod(inner[1:])))
    step = max(1, BLOCK_BYTES // (row_bytes * chunk)) * chunk
    for start in range(0, inner[0], step):
        part = slice(start, min(start + step, inner[0]))
        block = arrays.read(path, (part,) if along == 0 else (slice(None), part))
        target[:, part] = np.moveaxis(block, tensor.axis or 0, 0)
