"""Whole T5X checkpoints to one of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5x_like.config.errors import ConfigError, DataError, Problem
from t5x_like.config.model import ModelConfig
from t5x_like.config.recipes import load_recipe
from t5x_like.config.training import Adafactor, Optimizer
from t5x_like.interop import imported
from t5x_like.interop.huggingface import families
from t5x_like.interop.t5x import convert
from t5x_like.interop.t5x.arrays import Arrays
from t5x_like.interop.t5x.names import Shape, Tensor, scan_axis, tensors
from t5x_like.interop.t5x.slots import read_slots
from t5x_like.models import presets
from t5x_like.models.build import abstract

Tree = Any
TARGET = "target/"
PRESETS: Mapping[str, Callable[..., ModelConfig]] = {
    "t5_1_0": presets.t5_1_0,
    "t5_1_1": presets.t5_1_1,
    "ul2_20b": presets.ul2_20b,
    "mt5": presets.mt5,
    "umt5": presets.umt5,
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A T5X checkpoint, checked: its arrays are exactly those of the model."""

    model: ModelConfig
    arrays: Arrays
    tensors: tuple[Tensor, ...]

    def params(self, abstract_params: Tree) -> Tree:
        """The parameters, float32, each made where its sharding puts it.

        Args:
          abstract_params: `jax.ShapeDtypeStruct`s, with shardings or without.
        """
        return convert.read_params(self.tensors, self.arrays, abstract_params, TARGET)


def model_of(reference: str) -> tuple[ModelConfig, Optimizer]:
    """The model of `PRESET:SIZE`, as in t5_1_1:base, or that of a recipe, and the recipe's optimizer.

    Raises:
      ConfigError: no such preset, size or recipe.
    """
    name, _, size = reference.partition(":")
    if name not in PRESETS:
        run = load_recipe(reference)
        return run.model, run.training.optimizer
    try:
        return PRESETS[name](*[size] if size else []), Adafactor()
    except (KeyError, TypeError):
        expected = f"{name}:SIZE with a size of the preset, such as small or base" if size else name
        raise ConfigError([Problem("--model", repr(reference), expected)]) from None


def open_directory(directory: Path, model: ModelConfig) -> Source:
    """Reads the index and the descriptions of the arrays, and compares them with the model's.

    Raises:
      DataError: something is missing, malformed, not known or of another shape; the message names it.
    """
    shapes = _shapes(abstract(model).params)
    arrays = Arrays(directory)
    found = {path.removeprefix(TARGET): stored.shape for path, stored in arrays.items()}
    axis = scan_axis(found, {name: stack.num_layers for name, stack in model.stacks.items()})
    try:
        expected = tuple(tensors(shapes, axis))
    except ValueError as error:
        raise DataError(f"T5X's networks have no such parameters: {error}; the model must be a T5's") from None
    convert.check(expected, arrays, TARGET, "the model")
    return Source(model, arrays, expected)


def import_directory(
    directory: Path, out: Path, *, model: str, optimizer: bool = False, report: Callable[[str], None] = print
) -> None:
    """T5X's checkpoint in `directory` to a directory of ours.

    Args:
      model: See `model_of`.
      optimizer: Adafactor's moments as well, for `initialize_from.optimizer`.

    Raises:
      ConfigError, DataError: see `model_of` and `open_directory`.
      RefusedError: `out` is there already.
    """
    config, of_run = model_of(model)
    source = open_directory(directory, config)
    spec = abstract(source.model)
    state: dict[str, Tree] = {}
    if optimizer:
        if not isinstance(of_run, Adafactor):
            raise ConfigError([Problem("training.optimizer", of_run.kind, "adafactor, whose state T5X has")])
        state["opt_state"] = read_slots(source.tensors, source.arrays, spec, of_run)
    kinds = families.kinds_for(source.model)
    with imported.made_whole(out) as partial:
        imported.save(
            partial, source.model, kinds[0] if kinds else None, {"params": source.params(spec.params), **state}
        )
    layers = "layers in one array" if any(tensor.axis is not None for tensor in source.tensors) else "layers by name"
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(spec.params))
    also = ", and Adafactor's moments" if optimizer else ""
    report(f"{out}: {model}, {count:,} parameters from {len(source.tensors)} arrays, {layers}{also}")


def _shapes(params: Tree) -> dict[str, Shape]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
