"""Comparison of the time that saves take with the time that a process has for its last one, after a signal to stop."""

from __future__ import annotations

from t5x_like.checkpoints.interface import Checkpoints
from t5x_like.config.run import RunConfig

SAVE_SECONDS = "save_seconds"
"""Entry of a checkpoint's meta: the time of the save before it, which a resumed run expects of its own saves."""


def too_slow(checkpoints: Checkpoints, run: RunConfig) -> str | None:
    """Return a warning if the last measured save took longer than the grace time; None otherwise."""
    seconds, grace = checkpoints.save_seconds, run.checkpoints.grace_seconds
    if seconds is None or seconds <= grace:
        return None
    return (
        f"a save takes {seconds:.3g} s, expected at most {grace:g} s (checkpoints.grace_seconds), the time between the "
        "signal to stop and the kill: a run that is stopped loses the steps since its last save. Save more often "
        "(checkpoints.save_every_minutes), or raise the grace time of the launcher (launch --grace-seconds)"
    )
