"""Conversion of Adafactor's second moments in a T5X checkpoint to those of `training.optimizers.adafactor`.

Both keep means over rows and over columns. T5X factors a matrix of one layer by size: `v_row` goes along its smaller
dimension (the first of two equal ones). Arrays with a dimension of layers or with three dimensions are factored by
name, as all arrays are here: `v_row` goes along "embed". Therefore `v_row` in T5X may be `v_col` here; the product of
the two is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from t5x_like.config import AdafactorConfig
from t5x_like.errors import DataError
from t5x_like.interop.t5x.checkpoint_reader import Arrays
from t5x_like.interop.t5x.weight_map import Shape, Tensor
from t5x_like.models.factory import ModelSpec
from t5x_like.training.optimizers.adafactor import adafactor, split, without
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

Array = npt.NDArray[Any]
SLOTS = "state/param_states/"
STEP = "state/step"


def read_slots(
    tensors: Sequence[Tensor], arrays: Arrays, spec: ModelSpec, config: AdafactorConfig, loss_scale: float
) -> PyTree:
    """Return the state of the run's Adafactor, on the host.

    Args:
      tensors: Arrays of the parameters.
      arrays: Arrays of the checkpoint.
      spec: Model.
      config: Settings of the run's Adafactor.
      loss_scale: T5X's loss divided by the mean loss per target token. Gradients had this scale, and second moments,
        which are divided by it here, its square. The momentum, of updates, does not depend on it.

    Raises:
      DataError: the checkpoint has no optimizer state, or not that of these settings; the message names the difference.
    """
    if STEP not in arrays or not any(path.startswith(SLOTS) for path in arrays):
        raise DataError(f"{arrays.directory}: no optimizer state ({STEP}, {SLOTS}...) beside the parameters")
    by_path: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        by_path.setdefault(tensor.rule.param, []).append(tensor)
    # The shapes that this run's optimizer expects decide which arrays are factored.
    wanted = jax.eval_shape(adafactor(config, spec.logical_axes).init, spec.params)

    def moments(name: str, leaf: Any, axes: tuple[str, ...]) -> dict[str, Array]:
        own = tree_paths.at(wanted["second_moment"], name)
        found = {kind: np.empty(slot.shape, np.float32) for kind, slot in own.items()}
        for tensor in by_path[name]:
            parts = _parts(tensor, arrays, leaf.shape, axes, factored="v_row" in own)
            for kind, part in parts.items():
                _put(found[kind], tensor, part / np.float32(loss_scale**2))
        return found

    second = tree_paths.map_by_path(moments, spec.params, spec.logical_axes)
    state = {"count": np.asarray(arrays.read(STEP), np.int32).reshape(()), "second_moment": second}
    if config.momentum is not None:
        state["momentum"] = tree_paths.map_by_path(
            lambda path, leaf: _momentum(by_path[path], arrays, leaf), spec.params
        )
    return state


def _parts(tensor: Tensor, arrays: Arrays, shape: Shape, axes: Sequence[str], *, factored: bool) -> Mapping[str, Array]:
    """Return the moments of an array by their names here; arrays of all layers have the layers as first dimension."""
    stored = arrays["target/" + tensor.path].shape
    if not factored:
        return {"v": tensor.to_param(_read(arrays, tensor, "v", stored), _own_shape(tensor, shape))}
    layers = 1 if tensor.rule.by_layer else 0
    factors = split(tuple(axes))
    assert factors is not None
    # The dimension of the rows is the first or the last one of the array, not counting the layers.
    inner = [dim for dim in range(len(stored)) if dim != tensor.axis]
    first = factors[0][0] == layers and not tensor.rule.transposed
    rows, columns = (inner[:1], inner[1:]) if first else (inner[-1:], inner[:-1])
    names = ("v_row", "v_col")
    if len(stored) == 2 and tensor.axis is None:
        # T5X names the factors of an unstacked matrix by size and not by meaning: v_row belongs to the smaller
        # dimension.
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
    target = out if tensor.layer is None else out[tensor.layer]
    target[...] = part.reshape(target.shape)


def _own_shape(tensor: Tensor, shape: Shape) -> Shape:
    return shape if tensor.layer is None else shape[1:]


def _momentum(tensors: Sequence[Tensor], arrays: Arrays, leaf: Any) -> Array:
    out = np.empty(leaf.shape, np.float32)
    for tensor in tensors:
        stored = arrays["target/" + tensor.path].shape
        _put(out, tensor, tensor.to_param(_read(arrays, tensor, "m", stored), _own_shape(tensor, leaf.shape)))
    return out


def _read(arrays: Arrays, tensor: Tensor, slot: str, shape: Sequence[int]) -> Array:
    path = f"{SLOTS}{tensor.path}/{slot}"
    if path not in arrays or arrays[path].shape != tuple(shape):
        found = arrays[path].shape if path in arrays else "nothing"
        raise DataError(
            f"{arrays.directory}: {path}: found {found}, expected {tuple(shape)}: "
            f"the run's Adafactor factors other arrays "
            "or keeps a momentum; give --model a recipe with T5X's min_dim_size_to_factor (128) and momentum"
        )
    missing = arrays.missing_chunks(path)
    if missing:
        raise DataError(f"{arrays.directory}: parts of arrays are missing: {', '.join(missing[:10])}")
    return arrays.read(path)
