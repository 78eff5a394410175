"""Tensors of files to parameters and back, one by one, along the rules of `names`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from t5x_like.config.errors import DataError
from t5x_like.interop.huggingface.names import Rule, Shape, Tensor, stored_shape, tensors
from t5x_like.interop.safetensors import Pending
from t5x_like.interop.weights import Weights

Tree = Any
Array = npt.NDArray[Any]


def flat(tree: Tree) -> dict[str, Any]:
    """Leaves by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def shapes_of(params: Tree) -> dict[str, Shape]:
    return {path: tuple(leaf.shape) for path, leaf in flat(params).items()}


def check(expected: Sequence[Tensor], weights: Weights, names: Mapping[str, str], left_out: Sequence[str]) -> None:
    """Raises DataError, with all that is wrong, unless the files hold exactly these tensors.

    Args:
      names: The name in the files of each tensor by its name in the tables.
      left_out: Names in the files of what the model has no place for.
    """
    wanted = {tensor.name: tensor.shape for tensor in expected}
    missing = [f"{name} is missing, expected {shape}" for name, shape in wanted.items() if name not in names]
    extra = [
        f"{theirs} is not known" for name, theirs in names.items() if name not in wanted and theirs not in left_out
    ]
    shaped = [
        f"{names[name]} has shape {weights[names[name]].shape}, expected {shape}"
        for name, shape in wanted.items()
        if name in names and weights[names[name]].shape != shape
    ]
    numbers = [
        f"{names[name]} has type {weights[names[name]].dtype}, expected numbers of a floating type"
        for name in wanted
        if name in names and weights[names[name]].dtype.kind not in "fV"
    ]
    problems = [*missing, *extra, *shaped, *numbers]
    if problems:
        shown = "".join(f"\n  - {line}" for line in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DataError(f"{weights.directory}: the tensors are not those of its config.json:{shown}{more}")


def read_params(rules: Sequence[Rule], abstract: Tree, weights: Weights, names: Mapping[str, str]) -> Tree:
    """The parameters, each made where its sharding puts it. Beside them, one tensor at a time is in memory.

    Args:
      abstract: `jax.ShapeDtypeStruct`s, with shardings or without.
    """
    where: dict[str, tuple[Rule, dict[tuple[int, ...], str]]] = {}
    for tensor in tensors(rules, shapes_of(abstract)):
        for path in tensor.rule.ours:
            where.setdefault(path, (tensor.rule, {}))[1][tensor.index] = names[tensor.name]
    shapes = shapes_of(abstract)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def make(path: str, leaf: Any) -> jax.Array:
        rule, files = where[path]
        parts = [shapes[part][rule.numbered :] for part in rule.ours]

        def fill(cells: tuple[slice, ...] | None) -> Array:
            assert cells is not None
            ranges = [range(*cell.indices(size)) for cell, size in zip(cells, leaf.shape, strict=True)]
            out = np.empty([len(numbers) for numbers in ranges], np.float32)
            for place in np.ndindex(*out.shape[: rule.numbered]):
                index = tuple(numbers[at] for numbers, at in zip(ranges, place, strict=False))
                part = take_apart(rule, weights.read(files[index]), parts)[rule.ours.index(path)]
                out[place] = part[cells[rule.numbered :]]
            return out

        return jax.make_array_from_callback(leaf.shape, leaf.sharding or default, fill)

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: make(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), abstract
    )


def take_apart(rule: Rule, stored: Array, parts: Sequence[Shape]) -> list[Array]:
    """The parameters in a tensor; views of it."""
    if rule.form == "plain":
        return [stored.reshape(parts[0])]
    if rule.form == "flat":
        sizes = [math.prod(part) for part in parts]
        return [x.reshape(part) for x, part in zip(_split(stored, sizes, 0), parts, strict=True)]
    matrix = stored.T if rule.form == "out_in" else stored
    sizes = [math.prod(part[rule.inputs :]) for part in parts]
    return [x.reshape(part) for x, part in zip(_split(matrix, sizes, 1), parts, strict=True)]


def put_together(rule: Rule, parts: Sequence[Array]) -> Array:
    """The inverse of `take_apart`."""
    if rule.form == "plain":
        return parts[0]
    if rule.form == "flat":
        return np.concatenate([part.reshape(-1) for part in parts])
    inputs = math.prod(parts[0].shape[: rule.inputs])
    matrix = np.concatenate([part.reshape(inputs, -1) for part in parts], axis=1)
    return matrix.T if rule.form == "out_in" else matrix


def _split(x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
    return np.split(x, np.cumsum(sizes)[:-1], axis=axis)


def pending(rules: Sequence[Rule], params: Tree, dtype: np.dtype[Any]) -> Iterator[Pending]:
    """The tensors to be written for these parameters, each made when its turn comes."""
    by_path = flat(params)

    def maker(tensor: Tensor) -> Callable[[], Array]:
        def make() -> Array:
            parts = [
                np.asarray(by_path[path][tensor.index] if tensor.index else by_path[path]) for path in tensor.rule.ours
            ]
            return put_together(tensor.rule, parts).astype(dtype)

        return make

    for tensor in tensors(rules, shapes_of(params)):
        parts = [tuple(by_path[path].shape[tensor.rule.numbered :]) for path in tensor.rule.ours]
        yield Pending(tensor.name, dtype, stored_shape(tensor.rule, parts), maker(tensor))
