"""Import of whole T5X checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from t5x_like.checkpoints import model_dir
from t5x_like.config.model import ModelConfig
from t5x_like.config.optimizers import AdafactorConfig, OptimizerConfig
from t5x_like.config.recipes import load_recipe
from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.interop.huggingface import family_matching
from t5x_like.interop.t5x import state_dict
from t5x_like.interop.t5x.adafactor_state import read_slots
from t5x_like.interop.t5x.checkpoint_reader import Arrays
from t5x_like.interop.t5x.weight_map import Tensor, scan_axis, tensors
from t5x_like.models.factory import abstract_model
from t5x_like.models.presets.by_name import preset
from t5x_like.models.vocab_padding import without_padding
from t5x_like.utils import tree_paths
from t5x_like.utils.sanitize import say
from t5x_like.utils.type_aliases import PyTree

TARGET = "target/"
PRESETS = ("t5_1_0", "t5_1_1", "ul2_20b", "mt5", "umt5")
"""Presets of the models that T5X's networks have."""


@dataclasses.dataclass(frozen=True)
class T5XCheckpoint:
    """Checked T5X checkpoint: its arrays are exactly those of the model."""

    model: ModelConfig
    arrays: Arrays
    tensors: tuple[Tensor, ...]

    def params(self, abstract_params: PyTree) -> PyTree:
        """Return the parameters, float32, each created on the devices of its sharding.

        Args:
          abstract_params: `jax.ShapeDtypeStruct`s, with or without shardings.
        """
        return state_dict.read_params(self.tensors, self.arrays, abstract_params, TARGET)


def model_of(reference: str) -> tuple[ModelConfig, OptimizerConfig]:
    """Return the model of `PRESET:SIZE`, such as t5_1_1:base, or of a recipe, and the recipe's optimizer.

    Raises:
      ConfigError: there is no such preset, size or recipe.
    """
    if reference.partition(":")[0] not in PRESETS:
        run = load_recipe(reference)
        return run.model, run.training.optimizer
    return preset(reference, "--model"), AdafactorConfig()


def open_directory(directory: Path, model: ModelConfig) -> T5XCheckpoint:
    """Open a checkpoint: read the index and the descriptions of the arrays, and compare them with the model's.

    Raises:
      DataError: something is missing, malformed, unknown or of another shape; the message names it.
    """
    shapes = tree_paths.shapes(abstract_model(model).params)
    arrays = Arrays(directory)
    found = {path.removeprefix(TARGET): stored.shape for path, stored in arrays.items()}
    axis = scan_axis(found, {name: stack.num_layers for name, stack in model.stacks.items()})
    try:
        expected = tuple(tensors(shapes, axis))
    except ValueError as error:
        raise DataError(f"T5X's networks do not have these parameters: {error}; the model must be a T5") from None
    state_dict.check(expected, arrays, TARGET, "the model")
    return T5XCheckpoint(model, arrays, expected)


def import_directory(
    directory: Path,
    out: Path,
    *,
    model: str,
    loss_scale: float | None = None,
    report: Callable[[str], None] = say,
) -> None:
    """Import a T5X checkpoint as a model directory.

    Args:
      directory: T5X checkpoint.
      out: Directory to create.
      model: See `model_of`.
      loss_scale: Import Adafactor's moments as well, for `initialize_from.restore_optimizer`, from a T5X whose loss was
        this number times the mean loss per target token. None: the parameters alone.
      report: Called with each line of the report.

    Raises:
      ConfigError: see `model_of`.
      DataError: see `open_directory`.
      SafetyError: `out` exists already.
    """
    config, of_run = model_of(model)
    source = open_directory(directory, without_padding(config))
    spec = abstract_model(source.model)
    state: dict[str, PyTree] = {}
    if loss_scale is not None:
        if not isinstance(of_run, AdafactorConfig):
            raise ConfigError([ConfigProblem("training.optimizer", of_run.kind, "adafactor, whose state T5X has")])
        state["opt_state"] = read_slots(source.tensors, source.arrays, spec, of_run, loss_scale)
        tree_paths.require_finite(state, f"{directory}: Adafactor's moments")
    matching = family_matching.matching_families(source.model)
    with model_dir.made_whole(out) as partial:
        model_dir.save(
            partial, source.model, matching[0] if matching else None, {"params": source.params(spec.params), **state}
        )
    layers = "layers in one array" if any(tensor.axis is not None for tensor in source.tensors) else "layers by name"
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(spec.params))
    also = ", and Adafactor's moments" if loss_scale is not None else ""
    report(f"{out}: {model}, {count:,} parameters from {len(source.tensors)} arrays, {layers}{also}")
