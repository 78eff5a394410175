"""Most likely tokens of the teacher of a run at each target of its rows, made once before the first step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config.batch_spec import TEACHER_IDS
from t5x_like.data.store.store_lock import store_lock
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.data.stream.stored_teacher import Header, StoredTeacher, open_stored_teacher, stored_teacher_path
from t5x_like.distributed.coordination import barrier, compile_on_all, on_process_0
from t5x_like.errors import SafetyError
from t5x_like.models.factory import ModelSpec, abstract_model, bind_params
from t5x_like.program import Program
from t5x_like.trainer.teacher import Teacher, read_teacher
from t5x_like.utils.digests import json_digest
from t5x_like.utils.progress import ProgressDisplay
from t5x_like.utils.type_aliases import PyTree


def attach_stored_teacher(
    program: Program,
    stream: TrainingStream,
    *,
    first_row: int,
    last_row: int,
    recorded: Mapping[str, Any] | None,
    report: Callable[[str], None],
    alive: Callable[[], None],
) -> dict[str, Any]:
    """Give the rows of a run the distributions of its teacher over its most likely tokens. All processes call this.

    They are read from the folder of the stores. What is missing is made; the teacher is read only for that, or to
    identify it for a new run.

    Args:
      program: Program of the run, with `training.distillation.top_k`.
      stream: Rows of the run.
      first_row, last_row: The run reads the rows after its first `first_row` rows, up to `last_row`.
      recorded: Record of the teacher in the checkpoint; None for a new run.
      report: Receives lines about the progress.
      alive: Called after each batch.

    Returns:
      The record of the teacher for checkpoints.

    Raises:
      SafetyError: see `teacher.open_teacher`; or the teacher's numbers are not finite, or the hosts share no folder.
    """
    config = program.run.training.distillation
    assert config is not None and config.model is not None and config.top_k is not None
    spec = abstract_model(config.model)
    teacher: Teacher | None = None
    if recorded is None:
        teacher = read_teacher(program, spec, stream.stores, None)
        recorded = teacher.record
    # The distributions of a teacher do not depend on the padding of its tables.
    fields = {name: x for name, x in dataclasses.asdict(config.model).items() if name != "pad_vocab_to_multiple_of"}
    identity = {
        "teacher": recorded["fingerprint"],
        "model": json_digest(fields)[:32],
        "rows": stream.fingerprint,
        "top_k": config.top_k,
        "temperature": config.temperature,
    }
    shapes = {name: features[TEACHER_IDS].shape for name, features in program.batch_spec.items()}
    steps = (last_row - first_row) // stream.batch_size
    sizes = {name: (rows, length) for name, (rows, length, _) in shapes.items()}
    header = Header.of(identity, config.top_k, config.model.vocab_size, sizes, steps)
    bounds = [{name: stream.first_index(name, row) for name in shapes} for row in (first_row, last_row)]

    def claim() -> list[list[Any]]:
        """Return the chunks that are missing, after the header is checked or written."""
        # Another run with these rows may begin at the same time, with another number of rows in a chunk.
        with store_lock(stored_teacher_path(stream.data, header), report):
            opened = open_stored_teacher(stream.data, header, create=True)
        return [list(chunk) for chunk in opened.missing(*bounds)]

    chunks = [(str(name), int(number)) for name, number in on_process_0(claim)]
    stored = open_stored_teacher(stream.data, header, create=False)
    if chunks:
        teacher = teacher or read_teacher(program, spec, stream.stores, recorded)
        _make(program, spec, teacher.params, stream, stored, chunks, report, alive)
        # Another process reads what process 0 has written.
        barrier()
        if missing := stored.missing(*bounds):
            raise SafetyError(
                f"{stored.path}: found {len(missing):,} chunks less than process 0 has written; set --data.store-dir "
                "to a folder or bucket that all hosts share"
            )
    stream.stored_teacher = stored
    return dict(recorded)


def _make(
    program: Program,
    spec: ModelSpec,
    params: PyTree,
    stream: TrainingStream,
    stored: StoredTeacher,
    chunks: Sequence[tuple[str, int]],
    report: Callable[[str], None],
    alive: Callable[[], None],
) -> None:
    """Compute the chunks, one batch at a time, and write each one as a whole."""
    total = sum(len(stored.rows(*chunk)) for chunk in chunks)
    report(
        f"the teacher's {stored.header.top_k} most likely tokens at each target of {total:,} rows, for {stored.path}"
    )
    compiled, made = set[str](), 0
    with ProgressDisplay(total, "teacher", report=report) as display:
        for name, number in chunks:
            rows = stored.rows(name, number)
            parts: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]] = []
            size = program.batch_spec[name][TEACHER_IDS].shape[0]
            for first in range(rows.start, rows.stop, size):
                # Rows after those of the chunk complete the last batch.
                features = stream.get_rows(np.arange(first, first + size), name)
                placed = program.shard_global_batch({name: features})[name]
                if name not in compiled:
                    compile_on_all(_top_k, program, spec.graphdef, params, placed)
                    compiled.add(name)
                ids, log_probs = jax.device_get(_top_k(program, spec.graphdef, params, placed))
                kept = min(size, rows.stop - first)
                if not np.isfinite(log_probs[:kept]).all():
                    raise SafetyError(
                        f"{name}: the teacher's log-probabilities of the rows from {first:,} on are not finite, "
                        "expected numbers: its parameters are damaged, overflow in its model.dtype, or exclude tokens"
                    )
                parts.append((ids[:kept], log_probs[:kept]))
                made += kept
                display.advance(kept, f"teacher: {made:,} of {total:,} rows")
                alive()
            if jax.process_index() == 0:
                stored.write(name, number, *(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _top_k(
    program: Program, graphdef: nnx.GraphDef[Any], params: PyTree, features: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """Return ids int32 and log-probabilities float32 [rows, length, k], replicated over the devices."""
    config = program.run.training.distillation
    assert config is not None and config.top_k is not None
    with program.mesh_context():
        logits = bind_params(graphdef, params)(features)
        log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(logits / config.temperature), config.top_k)
        whole = NamedSharding(program.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint((ids, log_probs), (whole, whole))
