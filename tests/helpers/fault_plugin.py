"""Plug-in whose callback makes training fail in the ways that `faults.json` in the current directory lists.

The file holds pairs [step, fault]; each fault happens once, before that step, in process 0. A fault is the message of a
`JaxRuntimeError`, or "hang": the next save never ends.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from t5x_like.trainer.callbacks import Callback, register_callback

FAULTS = Path("faults.json")
HANG = "hang"


@register_callback("faults")
class Faults(Callback):
    """Callback that fails with the faults of the file."""

    def on_start(self, step: int) -> None:
        import jax

        from t5x_like.trainer.session import TrainSession

        train_step = TrainSession.train_step

        def failing_step(session: TrainSession, batch: Any) -> None:
            left = json.loads(FAULTS.read_text())
            if left and left[0][0] == session.step:
                fault = left.pop(0)[1]
                FAULTS.write_text(json.dumps(left))
                if fault != HANG:
                    raise jax.errors.JaxRuntimeError(fault)
                session.checkpoints.save = lambda *arguments: time.sleep(3600)  # type: ignore[method-assign]
            train_step(session, batch)

        TrainSession.train_step = failing_step  # type: ignore[method-assign]
