"""Saves checkpoints as fast as it can, until it is killed: `python saver.py DIRECTORY MOMENT`.

Prints [step, digest of the state] before each save. MOMENT names a function at whose next call, from the fourth save
on, the process kills itself; `any` leaves the killing to others.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from test_checkpoint_faults import digest, make_state

from t5x_like.checkpoints import integrity
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(directory: str, moment: str) -> None:
    checkpoints = CheckpointManager(directory, CheckpointConfig(keep_last=2))
    first = (checkpoints.latest() or 0) + 1
    for step in range(first, first + 1000):
        state = make_state(step, size=4096)
        print(json.dumps([step, digest(state)]), flush=True)
        if step == first + 3 and moment != "any":
            checkpoints.wait()
            owner, name = moment.split(".")
            setattr({"integrity": integrity, "Path": Path, "os": os}[owner], name, die)
        checkpoints.save(step, state, {})


if __name__ == "__main__":
    main(*sys.argv[1:])
