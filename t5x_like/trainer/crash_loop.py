"""Crash loops: a run that starts again and again from one checkpoint is refused, whichever launcher starts it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from t5x_like.distributed.coordination import on_process_0
from t5x_like.distributed.startup import translate_error
from t5x_like.errors import RESTART_CODES, SafetyError, UserError
from t5x_like.utils.atomic_write import write_atomically
from t5x_like.utils.json_reader import read_json

STARTS = "starts.json"
"""File of the run directory: the newest step at the last start, and the number of starts in a row from it."""


@contextlib.contextmanager
def counted_start(run_dir: Path, step: int | None, limit: int | None) -> Iterator[None]:
    """Count this start of the run.

    Starts that end with an error after which no launcher restarts do not count.

    Args:
      run_dir: The run directory.
      step: Step of the newest checkpoint; None without one.
      limit: Number of starts from the same step that are allowed; None for any.

    Raises:
      SafetyError: there were `limit` starts from this step. The next start is allowed again.
    """
    path = run_dir / STARTS
    on_process_0(lambda: _count(path, step, limit))
    try:
        yield
    except BaseException as error:
        found = translate_error(error)
        if not isinstance(found, UserError) or found.exit_code not in RESTART_CODES:
            path.unlink(missing_ok=True)
        raise


def _count(path: Path, step: int | None, limit: int | None) -> None:
    count = 1
    # A file that cannot be read, or is not the one that is written below, counts as no earlier start.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, OverflowError):
        previous = read_json(path)
        count = int(previous["count"]) + 1 if previous["step"] == step else 1
    if limit is not None and count > limit:
        path.unlink(missing_ok=True)
        since = "at all" if step is None else f"after step {step}"
        raise SafetyError(
            f"{path.parent}: the last {limit} starts ended before a checkpoint was saved {since}. Look for the reason "
            "in its logs, then run the same command again; monitoring.max_starts_without_progress sets the limit."
        )
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps({"step": step, "count": count}) + "\n")
