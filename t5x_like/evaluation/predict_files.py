"""`t5x-like predict`: the predictions of a task head for the rows of a file, to a resumable file of JSON lines."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.distributed.preemption import SignalStop, stop_on_signals
from t5x_like.errors import EXIT_OK, EXIT_RESUMABLE, ConfigError, ConfigProblem, SafetyError
from t5x_like.evaluation.head_model import HeadModel, open_head, require_head
from t5x_like.evaluation.input_rows import InputRow, InputRows, dumps
from t5x_like.model_loading import LoadedModel, open_model
from t5x_like.utils import resumable_jsonl
from t5x_like.utils.progress import RowProgress
from t5x_like.utils.resumable_jsonl import ResumableLines
from t5x_like.utils.sanitize import say

FORMAT_VERSION = 1
ROWS_PER_CHUNK = 1024
"""Rows that are predicted, and whose lines are written, together."""


def predict_command(model: CheckpointRef, input_path: str, output: Path, *, field: str | None = None) -> int:
    """Write a line for each row of the input: its fields and those of `HeadModel.predict`.

    All input is read and checked before the model is restored. If the command is killed, the same command keeps the
    existing lines and computes the missing ones in the same batches.

    Args:
      model: Directory of the model, with its step if one is named.
      input_path: File of any format that has fields; a glob or a URL.
      output: File of JSON lines.
      field: Field or template of the text; None: the one of the run's data, or `text`.

    Returns:
      The exit code.

    Raises:
      UserError: the model has no head that predicts, the input cannot be read, or the output was made from another
        model or input.
    """
    if jax.process_count() > 1:
        expected = "one process, with any number of devices"
        raise ConfigError([ConfigProblem("predict", f"{jax.process_count()} processes", expected)])
    loaded = open_model(model)
    require_head(loaded)
    rows = InputRows([input_path], field or text_field(loaded) or "text")
    total, digest = rows.check()
    begun = resumable_jsonl.has_lines(output)
    step = loaded.step
    if step is None and begun:
        # A new checkpoint does not continue the lines of another one.
        step = resumable_jsonl.settings_of_lines(output).get("step")
    with stop_on_signals() as stop:
        head = open_head(loaded, step)
        settings = {
            "format": FORMAT_VERSION,
            "step": head.step,
            "checkpoint": loaded.digest(head.step),
            "input": {"rows": total, "sha256": digest, "field": rows.text_field},
        }
        resumable_jsonl.claim(output, settings, begun=begun)
        with contextlib.closing(ResumableLines(output)) as lines:
            if lines.lines > total:
                raise SafetyError(f"{output}: found {lines.lines:,} lines, expected {total:,} at most; remove it")
            return _write(head, rows, lines, total, stop)


def text_field(loaded: LoadedModel) -> str | None:
    """Return the field that held the texts of a run's own data; None if it is not known."""
    data = loaded.trained_on
    return data.sources[0].corpus.inputs_field if data is not None and data.sources else None


def target_field(loaded: LoadedModel) -> str | None:
    """Return the field that held the targets of a run's own data; None if it is not known."""
    data = loaded.trained_on
    is_pairs = data is not None and data.sources and data.sources[0].corpus.inputs_field is not None
    return data.sources[0].corpus.text_field if data is not None and is_pairs else None


def _write(head: HeadModel, rows: InputRows, lines: ResumableLines, total: int, stop: SignalStop) -> int:
    with RowProgress(total, lines.lines, label="predict") as progress:
        for number, chunk in enumerate(_chunks(rows)):
            existing = lines.lines - number * ROWS_PER_CHUNK
            if existing >= len(chunk):
                continue
            if stop.reason is not None:
                say(f"{lines.path}: stopped; run the same command again to resume", file=sys.stderr)
                return EXIT_RESUMABLE
            # A chunk that is partly written is computed again as a whole, so that its batches are the same.
            lines.append(_lines(head, chunk)[existing:])
            progress.advance(len(chunk) - existing)
    say(f"{lines.path}: {total:,} lines", file=sys.stderr)
    return EXIT_OK


def _lines(head: HeadModel, chunk: list[InputRow]) -> list[str]:
    predictions = head.predict([row.text for row in chunk])
    merged: list[dict[str, Any]] = [
        {**row.fields, **prediction} for row, prediction in zip(chunk, predictions, strict=True)
    ]
    return [dumps(line) for line in merged]


def _chunks(rows: InputRows) -> Iterator[list[InputRow]]:
    source = iter(rows)
    while chunk := list(itertools.islice(source, ROWS_PER_CHUNK)):
        yield chunk
