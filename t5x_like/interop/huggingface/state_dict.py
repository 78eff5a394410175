"""Conversion of tensors to parameters and back, one at a time, by the rules of `weight_map`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from t5x_like.errors import DataError
from t5x_like.interop.huggingface.weight_map import Rule, Shape, Tensor, stored_shape, tensors
from t5x_like.interop.safetensors_file import Pending
from t5x_like.interop.weight_files import Weights, refuse_not_finite
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

Array = npt.NDArray[Any]


def check(expected: Sequence[Tensor], weights: Weights, names: Mapping[str, str], unused: Sequence[str]) -> None:
    """Check that the files hold exactly the expected tensors.

    Args:
      expected: Tensors of the model.
      weights: Tensors of the files.
      names: Name in the files of each tensor, by its name in the rules.
      unused: Names in the files of tensors that the model does not use.

    Raises:
      DataError: tensors are missing, unknown, or of another shape or type; all problems are listed.
    """
    wanted = {tensor.name: tensor.shape for tensor in expected}
    missing = [f"{name} is missing, expected {shape}" for name, shape in wanted.items() if name not in names]
    extra = [
        f"{file_name} is unknown" for name, file_name in names.items() if name not in wanted and file_name not in unused
    ]
    shaped = [
        f"{names[name]} has shape {weights[names[name]].shape}, expected {shape}"
        for name, shape in wanted.items()
        if name in names and weights[names[name]].shape != shape
    ]
    typed = [
        f"{names[name]} has type {weights[names[name]].dtype}, expected a floating-point type"
        for name in wanted
        if name in names and weights[names[name]].dtype.kind not in "fV"
    ]
    problems = [*missing, *extra, *shaped, *typed]
    if problems:
        shown = "".join(f"\n  - {line}" for line in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DataError(f"{weights.directory}: the tensors do not match its config.json:{shown}{more}")


def read_params(rules: Sequence[Rule], abstract: PyTree, weights: Weights, names: Mapping[str, str]) -> PyTree:
    """Return the parameters, float32, each created on the devices of its sharding.

    Besides the parameters, one tensor at a time is in memory.

    Args:
      rules: Rules of the family.
      abstract: `jax.ShapeDtypeStruct`s, with or without shardings.
      weights: Tensors of the files.
      names: Name in the files of each tensor, by its name in the rules.

    Raises:
      DataError: tensors hold NaN or infinity.
    """
    # Rule and file names of each parameter; the file names by (layer, expert).
    where: dict[str, tuple[Rule, dict[tuple[int, ...], str]]] = {}
    for tensor in tensors(rules, tree_paths.shapes(abstract)):
        for path in tensor.rule.paths:
            where.setdefault(path, (tensor.rule, {}))[1][tensor.index] = names[tensor.name]
    shapes = tree_paths.shapes(abstract)
    not_finite: set[str] = set()
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def make(path: str, leaf: Any) -> jax.Array:
        rule, files = where[path]
        parts = [shapes[part][rule.numbered :] for part in rule.paths]

        def load_shard(slices: tuple[slice, ...] | None) -> Array:
            """Return the slice of the parameter that one device holds."""
            assert slices is not None
            ranges = [range(*part.indices(size)) for part, size in zip(slices, leaf.shape, strict=True)]
            out = np.empty([len(numbers) for numbers in ranges], np.float32)
            # Each (layer, expert) of the slice is one tensor of the files, of which the inner slices are taken.
            for position in np.ndindex(*out.shape[: rule.numbered]):
                index = tuple(numbers[at] for numbers, at in zip(ranges, position, strict=False))
                part = split_tensor(rule, weights.read(files[index]), parts)[rule.paths.index(path)]
                out[position] = part[slices[rule.numbered :]]
                if not np.isfinite(out[position]).all():
                    not_finite.add(files[index])
            return out

        return jax.make_array_from_callback(leaf.shape, leaf.sharding or default, load_shard)

    params = tree_paths.map_by_path(make, abstract)
    refuse_not_finite(weights.directory, not_finite)
    return params


def split_tensor(rule: Rule, stored: Array, parts: Sequence[Shape]) -> list[Array]:
    """Return the parameters in a tensor, of the shapes `parts`, as views of it."""
    if rule.form in ("plain", "row"):
        return [stored.reshape(parts[0])]
    if rule.form == "flat":
        sizes = [math.prod(part) for part in parts]
        return [x.reshape(part) for x, part in zip(_split(stored, sizes, 0), parts, strict=True)]
    if rule.form == "by_head":
        d, heads, width = parts[0]
        by_head = np.moveaxis(stored.reshape(heads, len(parts), width, d), -1, 0)
        query, key, value = (by_head[:, :, part] for part in range(3))
        return [_halves_apart(query), _halves_apart(key), value]
    matrix = stored.T if rule.form == "out_in" else stored
    sizes = [math.prod(part[rule.inputs :]) for part in parts]
    return [x.reshape(part) for x, part in zip(_split(matrix, sizes, 1), parts, strict=True)]


def join_tensor(rule: Rule, parts: Sequence[Array]) -> Array:
    """Return the tensor of these parameters: the inverse of `split_tensor`."""
    if rule.form == "plain":
        return parts[0]
    if rule.form == "row":
        return parts[0][None]
    if rule.form == "flat":
        return np.concatenate([part.reshape(-1) for part in parts])
    if rule.form == "by_head":
        query, key, value = parts
        by_head = np.stack([_halves_together(query), _halves_together(key), value], axis=2)
        return np.moveaxis(by_head, 0, -1).reshape(-1, len(by_head))
    inputs = math.prod(parts[0].shape[: rule.inputs])
    matrix = np.concatenate([part.reshape(inputs, -1) for part in parts], axis=1)
    return matrix.T if rule.form == "out_in" else matrix


def _halves_apart(x: Array) -> Array:
    """Return [..., h] with rotated pairs at (i, i + h / 2) from one with neighbours as pairs."""
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def _halves_together(x: Array) -> Array:
    """Return the inverse of `_halves_apart`."""
    return np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(x.shape)


def _split(x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
    return np.split(x, np.cumsum(sizes)[:-1], axis=axis)


def pending(rules: Sequence[Rule], params: PyTree, dtype: np.dtype[Any]) -> Iterator[Pending]:
    """Yield the tensors to write for these parameters; each is computed when it is written."""
    by_path = tree_paths.by_path(params)

    def maker(tensor: Tensor) -> Callable[[], Array]:
        def make() -> Array:
            parts = [
                np.asarray(by_path[path][tensor.index] if tensor.index else by_path[path]) for path in tensor.rule.paths
            ]
            return join_tensor(tensor.rule, parts).astype(dtype)

        return make

    for tensor in tensors(rules, tree_paths.shapes(params)):
        parts = [tuple(by_path[path].shape[tensor.rule.numbered :]) for path in tensor.rule.paths]
        yield Pending(tensor.name, dtype, stored_shape(tensor.rule, parts), maker(tensor))
