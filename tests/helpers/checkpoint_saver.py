"""Process that saves checkpoints until it is killed: `python -m helpers.checkpoint_saver DIRECTORY MOMENT`.

It prints [step, digest of the state] before each save. MOMENT names a function: the process kills itself when the
function is called during or after the fourth save. With `any` the caller kills the process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from helpers.checkpoint_examples import digest, make_state

from t5x_like.checkpoints import checksums
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(directory: str, moment: str) -> None:
    checkpoints = CheckpointManager(directory, CheckpointConfig(max_to_keep=2))
    first = (checkpoints.latest() or 0) + 1
    for step in range(first, first + 1000):
        state = make_state(step, size=4096)
        print(json.dumps([step, digest(state)]), flush=True)
        if step == first + 3 and moment != "any":
            checkpoints.wait()
            owner, name = moment.split(".")
            setattr({"checksums": checksums, "Path": Path, "os": os}[owner], name, die)
        checkpoints.save(step, state, {})


if __name__ == "__main__":
    main(*sys.argv[1:])
