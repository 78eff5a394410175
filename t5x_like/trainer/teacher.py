"""Teacher of a run with distillation: its frozen parameters, which are read once per process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from t5x_like.adapters.base_weights import fingerprint
from t5x_like.adapters.restore import restore_whole
from t5x_like.checkpoints.opening import open_checkpoints
from t5x_like.config import CheckpointConfig
from t5x_like.data.store.token_store import Store
from t5x_like.errors import SafetyError
from t5x_like.interop.warm_start import require_tokenizer_of
from t5x_like.models.factory import ModelSpec, abstract_model
from t5x_like.program import Program
from t5x_like.sharding.rules import FOREIGN_MAY_STAY_WHOLE
from t5x_like.sharding.shardings import tree_shardings
from t5x_like.storage.mirror import local_copy
from t5x_like.utils.type_aliases import PyTree

TEACHER = "training.distillation.teacher"
"""Name of the field with the directory of the teacher."""
RECORD = "teacher"
"""Key of a checkpoint's meta under which it records the teacher."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Teacher that has been read.

    Attributes:
      params: Parameters with the shardings of the program.
      record: JSON values {"path", "step", "fingerprint"} that checkpoints keep.
    """

    params: PyTree
    record: dict[str, Any]


def open_teacher(program: Program, stores: Sequence[Store], recorded: Mapping[str, Any] | None) -> Teacher | None:
    """Return the teacher that the steps of a run compute; None if there is none, or if it is stored.

    Args:
      program: Program of the run.
      stores: Stores of its data.
      recorded: Record in the checkpoint; None for a new run, which takes the newest step.

    Raises:
      SafetyError: the teacher is missing, damaged, has another tokenizer, or is not the recorded one.
    """
    config = program.run.training.distillation
    if config is None or config.top_k is not None:
        return None
    assert config.model is not None
    return read_teacher(program, abstract_model(config.model), stores, recorded)


def read_teacher(
    program: Program, spec: ModelSpec, stores: Sequence[Store], recorded: Mapping[str, Any] | None
) -> Teacher:
    """Return the teacher of a run, whose model is `spec`; see `open_teacher` for the other arguments and errors."""
    config = program.run.training.distillation
    assert config is not None and config.model is not None
    directory = local_copy(config.teacher, TEACHER)
    require_tokenizer_of(directory, stores)
    checkpoints = open_checkpoints(directory, CheckpointConfig(), read_only=True)
    step = recorded["step"] if recorded is not None and recorded["step"] in checkpoints.steps() else None
    checkpoints.close()
    shardings = tree_shardings(
        program.mesh, program.rules, spec.logical_axes, spec.params, may_stay_whole=FOREIGN_MAY_STAY_WHOLE
    )
    shapes = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), spec.params, shardings
    )
    step, params, _ = restore_whole(directory, config.model, step, shapes)
    record = {"path": config.teacher, "step": step, "fingerprint": fingerprint(params)}
    if recorded is not None and recorded["fingerprint"] != record["fingerprint"]:
        raise SafetyError(
            f"the teacher {config.teacher}, step {step}: found parameters with the fingerprint "
            f"{record['fingerprint']}, expected {recorded['fingerprint']}, from which the run has learned (recorded at "
            f"{recorded['path']}); restore it, or name its directory by --training.distillation.teacher DIR"
        )
    return Teacher(params, record)
