"""Kills processes at random moments of saves to an object store: `python bucket_kills.py URL KILLS SEED`.

Each round forks two processes, which is faster than to start them: one saves steps until it is killed, and one verifies
what it has left. After the last round the store has the data of the listed checkpoints and nothing else.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from t5x_like.checkpoints.bucket import BucketCheckpoints
from t5x_like.config import CheckpointConfig
from t5x_like.storage import locations
from t5x_like.storage.locations import Url, location

KEPT = 3


def state_of(step: int) -> dict[str, Any]:
    """Return the state of a step, whose arrays are functions of the step."""
    import jax.numpy as jnp

    rng = np.random.default_rng(step)
    params = {f"w{number}": jnp.asarray(rng.standard_normal((64, 32), np.float32)) for number in range(6)}
    return {"params": params, "step": jnp.int32(step)}


def opened(url: Url) -> BucketCheckpoints:
    return BucketCheckpoints(url, CheckpointConfig(max_to_keep=KEPT), directory=Path("checkpoints"))


def save_until_killed(url: Url, saves: float) -> None:
    """Save steps until this process is killed, after the time of a number of saves."""
    checkpoints = opened(url)
    step = checkpoints.latest() or 0

    def save() -> None:
        nonlocal step
        step += 1
        checkpoints.save(step, state_of(step), {"step": step}, {"host": b"%d" % step})

    for _ in range(2):  # The first save compiles, and the second one is timed.
        begun = time.monotonic()
        save()
        checkpoints.wait()
    delay = saves * (time.monotonic() - begun)
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        save()


def verify(url: Url) -> None:
    """Check that every listed step restores bit for bit and that nothing else is stored."""
    import jax

    checkpoints = opened(url)
    steps = checkpoints.steps()
    for step in steps:
        expected = state_of(step)
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), expected)
        found, restored, meta = checkpoints.restore(wanted, step)
        assert found == step and meta == {"step": step} and checkpoints.read_files(step) == {"host": b"%d" % step}
        jax.tree.map(np.testing.assert_array_equal, restored, expected)
    # One more than is kept: the removal of the oldest one may have been killed.
    assert len(steps) <= KEPT + 1, steps
    stored = [int(name.partition(".")[0]) for name in locations.children(url / "data")]
    assert sorted(stored) == steps, (stored, steps)
    print(f"steps {steps}", flush=True)


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a fork of this process and return its exit status, negative for a signal."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    url, kills, rng = location(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    assert isinstance(url, Url)
    longest = 3.0
    for _ in range(kills):
        start = time.monotonic()
        # Drawn here, because a child would draw the same number in each round.
        code = in_child(functools.partial(save_until_killed, url, rng.uniform(0.0, longest)))
        assert code == -signal.SIGKILL, code
        assert time.monotonic() - start < 600
        assert in_child(lambda: verify(url)) == 0


if __name__ == "__main__":
    main()
