"""Retention of checkpoints: the steps that are removed after a save."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from t5x_like.config.run import CheckpointConfig


def removable(steps: Sequence[int], config: CheckpointConfig, kept: Collection[int | None]) -> list[int]:
    """Return the steps, of all saved ones in ascending order, whose checkpoints are not kept any more.

    The newest ones are kept, those at multiples of `keep_period`, and those in `kept`.
    """
    older = steps[: -max(config.max_to_keep, 1)]
    period = config.keep_period
    return [step for step in older if step not in kept and (period is None or step % period)]
