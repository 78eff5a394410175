"""Rows of unequal length as arrays of few shapes, on the mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import numpy.typing as npt

from t5x_like.config import ConfigError, ModelConfig, Problem
from t5x_like.partitioning.shardings import batch_shardings
from t5x_like.program import Program

SMALLEST_BUCKET = 16


def bucket(length: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The least power of two that is at least `length` and `smallest`."""
    return max(smallest, 1 << max(length - 1, 0).bit_length())


def require_positions(config: ModelConfig, prompt: int, new: int) -> None:
    """
    Args:
      prompt: Tokens that are read, a stream's start token among them.
      new: Tokens that are made.

    Raises:
      ConfigError: they are more than a table of learned positions has rows.
    """
    needed = {"encoder": prompt, "decoder": new + (prompt if config.encoder is None else 0)}
    problems = [
        Problem(
            f"prompt and new tokens, {name}",
            f"{needed[name]} positions",
            f"at most {stack.max_positions}, the rows of the model's table of positions",
        )
        for name, stack in config.stacks.items()
        if stack.positions == "learned" and needed[name] > stack.max_positions
    ]
    if problems:
        raise ConfigError(problems)


def row_shares(program: Program) -> int:
    """Rows that are computed at once are a multiple of it: the degree to which the mesh splits them."""
    return math.prod(program.mesh.shape[axis] for axis in program.rules.activations["batch"])


def padded(rows: Sequence[Sequence[int]], count: int, width: int) -> npt.NDArray[np.int32]:
    """[count, width] of the rows, with 0 behind each and below them."""
    array = np.zeros((count, width), np.int32)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array


def on_mesh(program: Program, batch: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, jax.Array]:
    """Arrays [rows] or [rows, length], which every process has in whole, placed on the mesh."""
    shardings = batch_shardings(program.mesh, program.rules, {"rows": batch})["rows"]
    return {
        name: jax.make_array_from_callback(array.shape, shardings[name], array.__getitem__)
        for name, array in batch.items()
    }
