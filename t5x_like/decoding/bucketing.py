"""Bucketing: rows of unequal length as arrays of few different shapes, placed on the mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import numpy.typing as npt

from t5x_like.config import ModelConfig
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.program import Program
from t5x_like.sharding.shardings import batch_shardings
from t5x_like.utils.stall_limit import progress

MIN_BUCKET_SIZE = 16


def bucket(length: int, minimum: int = MIN_BUCKET_SIZE) -> int:
    """Return the smallest power of two that is at least `length`, or `minimum` if that is larger."""
    # Each shape compiles a program; powers of two bound their number by the logarithm of the longest row.
    return max(minimum, 1 << max(length - 1, 0).bit_length())


def check_positions(config: ModelConfig, prompt: int, new: int) -> None:
    """Check that a prompt and its continuation fit tables of learned positions.

    Args:
      prompt: Number of tokens that are read, including a decoder's start token.
      new: Number of new tokens.

    Raises:
      ConfigError: a table of learned positions has too few rows.
    """
    needed = {"encoder": prompt, "decoder": new + (prompt if config.encoder is None else 0)}
    require_positions(config, "prompt and new tokens", needed)


def require_positions(config: ModelConfig, subject: str, needed: Mapping[str, int]) -> None:
    """Raise ConfigError if `subject` needs more positions in a stack than its table of learned positions has."""
    problems = [
        ConfigProblem(
            f"{subject}, {name}",
            f"{needed[name]} positions",
            f"at most {stack.max_positions}, the number of learned positions of the model",
        )
        for name, stack in config.stacks.items()
        if stack.positions == "learned" and needed[name] > stack.max_positions
    ]
    if problems:
        raise ConfigError(problems)


def num_row_shards(program: Program) -> int:
    """Return the degree to which the mesh splits rows. The number of rows of a batch is a multiple of it."""
    return math.prod(program.mesh.shape[axis] for axis in program.rules.activations["batch"])


def pad_rows(rows: Sequence[Sequence[int]], count: int, width: int) -> npt.NDArray[np.int32]:
    """Return the rows as an array [count, width], padded with 0 on the right and with empty rows at the end."""
    array = np.zeros((count, width), np.int32)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array


def put_on_mesh(program: Program, batch: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, jax.Array]:
    """Return arrays [rows] or [rows, length] on the mesh. Every process passes the whole arrays."""
    progress()
    shardings = batch_shardings(program.mesh, program.rules, {"rows": batch})["rows"]
    return {
        # Each process passes only the parts that its devices hold, so that no data is sent between hosts.
        name: jax.make_array_from_callback(array.shape, shardings[name], array.__getitem__)
        for name, array in batch.items()
    }
