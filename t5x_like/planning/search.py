"""`plan --search`: which batch size and which rematerialisation get most out of a machine, by compiling them.

The walk goes down the staircase of what fits. Keeping everything (remat none) asks for most memory, so it gives way to
dots and that to full; a larger batch asks for more. Under each policy the batch is doubled until XLA refuses it, and
the next policy begins above the largest batch that fitted; if nothing fitted yet, the last policy goes on with halves.
Best is what has most tokens per second by the roofline (its longest part); of equals, what recomputes least. A larger
batch is another optimization: the learning rate is the user's to think of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import get_args

from t5x_like.config import ConfigError, RunConfig
from t5x_like.config.model import Remat
from t5x_like.config.validate import validate
from t5x_like.planning.compile import Compiled, compile_train_step
from t5x_like.planning.roofline import roofline
from t5x_like.planning.tokens import tokens_per_step
from t5x_like.planning.topologies import Topology

POLICIES: tuple[Remat, ...] = get_args(Remat)
"""Those that recompute least come first."""
TRIALS = 12


@dataclasses.dataclass(frozen=True)
class Trial:
    """A batch size and a policy, and what came of them.

    Attributes:
      compiled: None where the configuration is refused before compiling.
      refused: Why it was.
      tokens_per_second: By the roofline; 0 where the step does not fit.
    """

    batch_size: int
    remat: Remat
    compiled: Compiled | None
    refused: str = ""
    tokens_per_second: float = 0.0

    @property
    def fits(self) -> bool:
        return self.compiled is not None and self.compiled.fits


def search(
    run: RunConfig,
    topology: Topology,
    *,
    most: int = TRIALS,
    compile_step: Callable[[RunConfig, Topology], Compiled] = compile_train_step,
) -> Iterator[Trial]:
    """Tries batch sizes and policies, one after the other, `most` at most.

    Args:
      run: Whose batch size is where the walk begins.
      compile_step: What says whether a run fits.
    """
    left = most
    batch, largest = run.training.batch_size, 0
    for policy in POLICIES:
        size = max(batch, 2 * largest)
        while left:
            left -= 1
            trial = _try(run, size, policy, topology, compile_step)
            yield trial
            if not trial.fits:
                break
            largest, size = size, 2 * size
    size = batch // 2
    while left and not largest and size:
        left -= 1
        trial = _try(run, size, POLICIES[-1], topology, compile_step)
        yield trial
        if trial.fits or trial.compiled is None:
            return
        size //= 2


def best(trials: list[Trial]) -> Trial | None:
    """The trial with most tokens per second; of equals the one that recomputes least; None if nothing fits."""
    fitting = [trial for trial in trials if trial.fits]
    return max(fitting, key=lambda t: (t.tokens_per_second, -POLICIES.index(t.remat)), default=None)


def _try(
    run: RunConfig,
    batch_size: int,
    policy: Remat,
    topology: Topology,
    compile_step: Callable[[RunConfig, Topology], Compiled],
) -> Trial:
    changed = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, remat=policy),
        training=dataclasses.replace(run.training, batch_size=batch_size),
    )
    problems = validate(changed)
    if problems:
        return Trial(batch_size, policy, None, str(problems[0]))
    try:
        compiled = compile_step(changed, topology)
    except ConfigError as error:
        return Trial(batch_size, policy, None, str(error.problems[0]))
    if not compiled.fits:
        return Trial(batch_size, policy, compiled)
    seconds = roofline(compiled).least
    return Trial(batch_size, policy, compiled, tokens_per_second=tokens_per_step(changed) / seconds)
