"""Log-probabilities of preference pairs under the model that a run starts from, made once before its first step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config.batch_spec import MAIN
from t5x_like.data.store.token_store import Store
from t5x_like.data.stream import reference_log_probs
from t5x_like.data.stream.reference_log_probs import FILE, Values
from t5x_like.distributed.coordination import compile_on_all, on_process_0
from t5x_like.errors import SafetyError
from t5x_like.program import Program
from t5x_like.training.preference import answer_log_probs
from t5x_like.utils.progress import ProgressDisplay
from t5x_like.utils.resumable_jsonl import ResumableLines
from t5x_like.utils.type_aliases import PyTree

RECORD = "reference"
"""Key of a checkpoint's meta under which it records the log-probabilities."""


def attach_reference(
    program: Program,
    stores: Sequence[Store],
    workdir: Path,
    *,
    params: PyTree | None,
    model: str,
    recorded: Mapping[str, str] | None,
    report: Callable[[str], None],
    alive: Callable[[], None],
) -> dict[str, str]:
    """Give the stores of a run of preference pairs the log-probabilities of the reference. All processes call this.

    They are read from the run directory, where an earlier process has written them. What is missing is made.

    Args:
      program: Program of the run.
      stores: Stores of its data.
      workdir: The run directory.
      params: Whole parameters of the start model; None: they are not here any more.
      model: Fingerprint of these parameters.
      recorded: Record in the checkpoint; None for a run without one.
      report: Receives lines about the progress.
      alive: Called after each batch.

    Returns:
      The record for checkpoints: fingerprints of the model, of the rows and of the log-probabilities.

    Raises:
      SafetyError: the log-probabilities of a run with a checkpoint are missing, or are not those that it was trained
        with.
    """
    data, path = program.run.data, workdir / FILE
    values = reference_log_probs.missing_values(data, stores)
    header = {"model": model, "data": reference_log_probs.data_identity(data, stores)}

    def claim() -> dict[str, int]:
        """Return the number of pairs of each split that the file has, after its first line is checked or written."""
        lines = ResumableLines(path)
        try:
            if lines.lines and reference_log_probs.read_lines(path, values) != header:
                _require_no_checkpoint(path, recorded)
                values.update(reference_log_probs.missing_values(data, stores))
                path.write_bytes(b"")
            if not path.stat().st_size:
                lines.append([reference_log_probs.format_header(header)])
        finally:
            lines.close()
        return {name: int((~np.isnan(array[:, 0])).sum()) for name, array in values.items()}

    done = on_process_0(claim)
    if any(done[name] < len(array) for name, array in values.items()):
        if params is None:
            _require_no_checkpoint(path, recorded)
        assert params is not None
        _make_missing(program, stores, params, path, values, done, report, alive)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # Only process 0 has what an earlier process has written.
        values = multihost_utils.broadcast_one_to_all(values)
    record = {**header, "log_probs": reference_log_probs.digest(values)}
    if recorded is not None and dict(recorded) != record:
        _require_no_checkpoint(path, recorded)
    reference_log_probs.attach(values, data, stores)
    return record


def _require_no_checkpoint(path: Path, recorded: Mapping[str, str] | None) -> None:
    if recorded is not None:
        raise SafetyError(
            f"{path}: found other log-probabilities than those that the checkpoint was trained with, or none; expected "
            f"those of the start model {recorded['model']} with the digest {recorded['log_probs']}. Bring the file "
            "back, or start a new run in another --workdir."
        )


def _make_missing(
    program: Program,
    stores: Sequence[Store],
    params: PyTree,
    path: Path,
    values: Values,
    done: Mapping[str, int],
    report: Callable[[str], None],
    alive: Callable[[], None],
) -> None:
    """Compute the missing log-probabilities, one batch at a time, and append each batch to the file."""
    total, made = sum(map(len, values.values())), sum(done.values())
    rows = program.run.training.global_batch_size
    lines = ResumableLines(path) if jax.process_index() == 0 else None
    report(f"log-probabilities of {total - made:,} preference pairs under the start model, for {path.name}")
    try:
        with ProgressDisplay(total, "reference", report=report, done=made) as display:
            is_first = True
            for name, first, count, features in reference_log_probs.missing_batches(
                program.run.data, stores, rows, done
            ):
                placed = program.shard_global_batch({MAIN: features})[MAIN]
                if is_first:
                    compile_on_all(_log_probs, program, params, placed)
                    is_first = False
                log_probs = np.asarray(jax.device_get(_log_probs(program, params, placed)))[:count]
                if not np.isfinite(log_probs).all():
                    raise SafetyError(
                        f"{name}: the log-probabilities of the pairs from {first:,} on are not finite under the start "
                        "model, expected numbers: its parameters are damaged, or overflow in model.dtype"
                    )
                values[name][first : first + count] = log_probs
                if lines is not None:
                    lines.append([reference_log_probs.format_line(name, first, log_probs)])
                made += count
                display.advance(count, f"reference: {made:,} of {total:,} pairs")
                alive()
    finally:
        if lines is not None:
            lines.close()


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(program: Program, params: PyTree, features: Mapping[str, Any]) -> jax.Array:
    """Return float32 [rows, 2], the log-probabilities of both answers, replicated over the devices."""
    with program.mesh_context():
        _, log_probs, _ = answer_log_probs(
            lambda whole, batch, _: program.model(whole).output(batch), params, features, None
        )
        return jax.lax.with_sharding_constraint(log_probs, NamedSharding(program.mesh, PartitionSpec()))
