"""Adafactor's second moments in a T5X checkpoint to those of our Adafactor.

Both keep means over rows and over columns. In T5X, a matrix of one layer is factored by size: `v_row` goes along its
smaller dimension (the first of two equal ones); arrays with a dimension of layers or with three dimensions are factored
by name, as all are here: `v_row` goes along "embed". So what is `v_row` there may be `v_col` here; the product of the
two is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from t5x_like.config import Adafactor
from t5x_like.config.errors import DataError
from t5x_like.interop.t5x.arrays import Arrays
from t5x_like.interop.t5x.names import Shape, Tensor
from t5x_like.models.build import ModelSpec
from t5x_like.training.adafactor import adafactor, split, without

Tree = Any
Array = npt.NDArray[Any]
SLOTS = "state/param_states/"
STEP = "state/step"


def read_slots(tensors: Sequence[Tensor], arrays: Arrays, spec: ModelSpec, config: Adafactor) -> Tree:
    """The state of the run's Adafactor, on the host.

    Raises:
      DataError: there are no slots, or they are not those of this Adafactor; the message names what differs.
    """
    if STEP not in arrays or not any(path.startswith(SLOTS) for path in arrays):
        raise DataError(f"{arrays.directory}: no state of an optimizer ({STEP}, {SLOTS}...) beside the parameters")
    of_path: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        of_path.setdefault(tensor.rule.ours, []).append(tensor)
    wanted = jax.eval_shape(adafactor(config, spec.logical_axes).init, spec.params)

    def moments(path: Any, leaf: Any, axes: tuple[str, ...]) -> dict[str, Array]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        own = wanted["second_moment"]
        for key in name.split("/"):
            own = own[key]
        found = {kind: np.empty(slot.shape, np.float32) for kind, slot in own.items()}
        for tensor in of_path[name]:
            parts = _parts(tensor, arrays, leaf.shape, axes, factored="v_row" in own)
            for kind, part in parts.items():
                _put(found[kind], tensor, part)
        return found

    second = jax.tree_util.tree_map_with_path(moments, spec.params, spec.logical_axes)
    state = {"count": np.asarray(arrays.read(STEP), np.int32).reshape(()), "second_moment": second}
    if config.momentum is not None:
        state["momentum"] = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _momentum(of_path[jax.tree_util.keystr(path, simple=True, separator="/")], arrays, leaf),
            spec.params,
        )
    return state


def _parts(tensor: Tensor, arrays: Arrays, shape: Shape, axes: Sequence[str], *, factored: bool) -> Mapping[str, Array]:
    """The moments of an array, with the layers in front if it has all of them, by their names here."""
    stored = arrays["target/" + tensor.path].shape
    if not factored:
        return {"v": tensor.ours(_read(arrays, tensor, "v", stored), _own_shape(tensor, shape))}
    layers = 1 if tensor.rule.by_layer else 0
    factors = split(tuple(axes))
    assert factors is not None
    # Where the rows are in the array, its layers left out: at one of its ends.
    inner = [dim for dim in range(len(stored)) if dim != tensor.axis]
    first = factors[0][0] == layers and not tensor.rule.transposed
    rows, columns = (inner[:1], inner[1:]) if first else (inner[-1:], inner[:-1])
    names = ("v_row", "v_col")
    if len(stored) == 2 and tensor.axis is None:
        smaller = 0 if stored[0] <= stored[1] else 1
        names = names if rows == [smaller] else names[::-1]
    found = {}
    for name, kind, left_out in zip(names, ("v_row", "v_col"), (columns, rows), strict=True):
        slot = _read(arrays, tensor, name, without(stored, left_out))
        if tensor.axis is not None:
            slot = np.moveaxis(slot, [dim for dim in range(len(stored)) if dim not in left_out].index(tensor.axis), 0)
        found[kind] = slot
    return found


def _put(out: Array, tensor: Tensor, part: Array) -> None:
    place = out if tensor.layer is None else out[tensor.layer]
    place[...] = part.reshape(place.shape)


def _own_shape(tensor: Tensor, shape: Shape) -> Shape:
    return shape if tensor.layer is None else shape[1:]


def _momentum(tensors: Sequence[Tensor], arrays: Arrays, leaf: Any) -> Array:
    out = np.empty(leaf.shape, np.float32)
    for tensor in tensors:
        stored = arrays["target/" + tensor.path].shape
        _put(out, tensor, tensor.ours(_read(arrays, tensor, "m", stored), _own_shape(tensor, leaf.shape)))
    return out


def _read(arrays: Arrays, tensor: Tensor, slot: str, shape: Sequence[int]) -> Array:
    path = f"{SLOTS}{tensor.path}/{slot}"
    if path not in arrays or arrays[path].shape != tuple(shape):
        found = arrays[path].shape if path in arrays else "nothing"
        raise DataError(
            f"{arrays.directory}: {path}: found {found}, expected {tuple(shape)}: this Adafactor factors other arrays "
            "or keeps a momentum; give --model a recipe with T5X's min_dim_size_to_factor (128) and momentum"
        )
    missing = arrays.missing_chunks(path)
    if missing:
        raise DataError(f"{arrays.directory}: parts of arrays are missing: {', '.join(missing[:10])}")
    return arrays.read(path)
