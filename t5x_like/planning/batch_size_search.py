"""Search for the batch size and remat policy with the highest throughput, by compilation (`plan --search-batch-size`).

The search follows the boundary of what fits. Saving everything (remat none) needs most memory, and each policy of
`policies` after it keeps less and computes more again; a larger batch needs more. Under each policy the batch is
doubled until XLA refuses it, and the next policy begins above the largest batch that fitted. If nothing has fitted
yet, the last policy continues with halved batches. The best trial has most tokens per second by the roofline (its
longest part); among equals, the one that recomputes least. A larger batch is another optimization problem: choosing
its learning rate is left to the user.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from t5x_like.config import RunConfig, batch_spec
from t5x_like.config.remat import Remat
from t5x_like.config.validation import validate
from t5x_like.errors import ConfigError
from t5x_like.hardware.topologies import Topology
from t5x_like.planning.estimate.flops import executed_flops
from t5x_like.planning.estimate.tokens import tokens_per_step
from t5x_like.planning.xla.aot_compile import CompiledStep, compile_train_step
from t5x_like.planning.xla.roofline import roofline
from t5x_like.sharding.saved_activations import saved_activations
from t5x_like.utils import formatting
from t5x_like.utils.console import Console

POLICIES: tuple[Remat, ...] = ("none", "dots", "mlp", "attention", "qkv", "outputs", "full")
"""Remat policies that are compared. The time that "offload" spends on copies is not known."""
MAX_TRIALS = 16
CompileStep = Callable[[RunConfig, Topology], CompiledStep]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A batch size and a remat policy with the result of their compilation.

    Attributes:
      compiled: Compiled step; None if the configuration is refused before compilation.
      refused: Reason of that refusal.
      tokens_per_second: Throughput by the roofline; 0 if the step does not fit.
    """

    batch_size: int
    remat: Remat
    compiled: CompiledStep | None
    refused: str = ""
    tokens_per_second: float = 0.0

    @property
    def fits(self) -> bool:
        return self.compiled is not None and self.compiled.fits

    def as_dict(self) -> dict[str, Any]:
        """Return the trial for a JSON file."""
        return {
            "batch_size": self.batch_size,
            "remat": self.remat,
            "fits": self.fits,
            "peak_bytes": None if self.compiled is None else self.compiled.peak_bytes,
            "refused": self.refused,
            "tokens_per_second": self.tokens_per_second,
        }


def policies(run: RunConfig) -> list[Remat]:
    """Return the policies of a run that can be the best one: those of which no other keeps as little and computes as
    little again. They are in the order of what they compute again, and each keeps less than the one before."""

    def costs(policy: Remat) -> tuple[float, float]:
        changed = _with_policy(run, policy)
        kept = (saved_activations(changed.model, features).values() for features in batch_spec(changed).values())
        arrays = (array for stacks in kept for saved in stacks for array in saved)
        return executed_flops(changed), sum(array.nbytes for array in arrays)

    cost_of = {policy: costs(policy) for policy in POLICIES}
    found: list[Remat] = []
    least = math.inf
    # Reversed, so that "full" stands for the policies that keep nothing more, as "mlp" of a model with experts alone.
    for policy in sorted(reversed(POLICIES), key=cost_of.__getitem__):
        _, kept = cost_of[policy]
        if kept < least:
            found.append(policy)
            least = kept
    return found


def search(
    run: RunConfig,
    topology: Topology,
    *,
    max_trials: int = MAX_TRIALS,
    compile_step: CompileStep = compile_train_step,
) -> Iterator[Trial]:
    """Yield trials of batch sizes and policies, one after the other.

    Args:
      run: The run; the search begins at its batch size.
      topology: The devices to compile for.
      max_trials: Maximum number of trials.
      compile_step: Compiles a run's training step.
    """
    remaining = max_trials
    first, largest = run.training.global_batch_size, 0
    candidates = policies(run)
    for policy in candidates:
        # A policy that recomputes more is tried at larger batches only: at the same size it can only be slower.
        size = max(first, 2 * largest)
        while remaining:
            remaining -= 1
            trial = _try(run, size, policy, topology, compile_step)
            yield trial
            if not trial.fits:
                break
            largest, size = size, 2 * size
    # Not even the first size fits: halve it under the policy that needs least memory.
    size = first // 2
    while remaining and not largest and size:
        remaining -= 1
        trial = _try(run, size, candidates[-1], topology, compile_step)
        yield trial
        if trial.fits or trial.compiled is None:
            return
        size //= 2


def best(trials: list[Trial]) -> Trial | None:
    """Return the fastest trial, among equals the one that recomputes least; None if nothing fits."""

    def rank(trial: Trial) -> tuple[float, float]:
        assert trial.compiled is not None
        return trial.tokens_per_second, -trial.compiled.executed_flops / trial.batch_size

    return max((trial for trial in trials if trial.fits), key=rank, default=None)


def _try(run: RunConfig, batch_size: int, policy: Remat, topology: Topology, compile_step: CompileStep) -> Trial:
    changed = dataclasses.replace(
        _with_policy(run, policy),
        # Without smaller batches before: they need less memory, and must not be larger than this one.
        training=dataclasses.replace(run.training, global_batch_size=batch_size, batch_size_ramp=()),
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
    seconds = roofline(compiled).min_seconds
    return Trial(batch_size, policy, compiled, tokens_per_second=tokens_per_step(changed) / seconds)


def _with_policy(run: RunConfig, policy: Remat) -> RunConfig:
    return dataclasses.replace(run, model=dataclasses.replace(run.model, remat=policy))


def print_trial(trial: Trial, console: Console) -> None:
    """Print one line for a trial."""
    if trial.compiled is None:
        result = f"invalid configuration: {trial.refused}"
    elif not trial.fits:
        result = f"does not fit, {formatting.size(-trial.compiled.free_bytes)} too much"
    else:
        result = (
            f"fits, peak {formatting.size(trial.compiled.peak_bytes)}, roofline {trial.tokens_per_second:,.0f} tokens "
            f"per second (bound by {roofline(trial.compiled).bound})"
        )
    console.print(f"batch {trial.batch_size}, remat {trial.remat}: {result}", markup=False, highlight=False)


def print_best(trial: Trial | None, console: Console) -> None:
    """Print the options of the best trial."""
    if trial is None:
        console.print("Nothing fits: use more devices or shorter rows.", highlight=False)
        return
    console.print(
        f"Best by the roofline: --training.global-batch-size {trial.batch_size} --model.remat {trial.remat}",
        highlight=False,
    )
