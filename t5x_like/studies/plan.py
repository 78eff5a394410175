"""Plan of a study: what its runs differ in and cost, before anything is spent."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from t5x_like.config import RunConfig, batch_sizes
from t5x_like.config.serialization import diff_configs
from t5x_like.hardware.topologies import parse_topology
from t5x_like.planning.estimate.flops import executed_flops, training_flops
from t5x_like.planning.estimate.parameters import model_parts
from t5x_like.planning.estimate.tokens import denoiser_tokens
from t5x_like.studies.study import StudyRun, Tier
from t5x_like.utils import formatting
from t5x_like.utils.console import Console
from t5x_like.utils.sanitize import say

GPU = "h100:1"
"""Machine that the tier "gpu" is for."""
_SIZE, _REPEATS = 1024, 3


@dataclasses.dataclass(frozen=True)
class ArmCost:
    """Cost of one run of an arm.

    Attributes:
      parameters: Number of the model's parameters.
      executed, model: FLOPs that devices execute, and that the model needs.
      raw_tokens, loss_tokens: Tokens of text, and scored targets.
    """

    parameters: int
    steps: int
    executed: float
    model: float
    raw_tokens: float
    loss_tokens: float


def arm_cost(run: RunConfig) -> ArmCost:
    """Return the cost of a run."""
    tokens = denoiser_tokens(run)
    steps = batch_sizes(run.training).in_full_batches(run.training.num_train_steps)
    return ArmCost(
        parameters=sum(part.count for part in model_parts(run.model).values()),
        steps=run.training.num_train_steps,
        executed=steps * executed_flops(run),
        model=steps * training_flops(run),
        raw_tokens=steps * sum(one.raw_tokens for one in tokens),
        loss_tokens=steps * sum(one.loss_tokens for one in tokens),
    )


def arm_differences(runs: Sequence[StudyRun]) -> dict[str, list[str]]:
    """Return for each arm the fields in which it differs from the first arm, with their values, without seeds.

    A mixture is one field, and so are a stack and an initialization that only one of the two has.
    """
    first_of: dict[str, RunConfig] = {}
    for each in runs:
        first_of.setdefault(each.arm, each.run)
    base = next(iter(first_of.values()))
    return {arm: _differences(base, run) for arm, run in first_of.items()}


def _differences(base: RunConfig, run: RunConfig) -> list[str]:
    found, hidden = [], ["name", "data.seed", "training.seed", "training.num_train_steps"]
    if base.data.mixture != run.data.mixture:
        hidden.append("data.mixture.")
        found.append(f"data.mixture {', '.join(objective.name for objective in run.data.mixture)}")
    for name in ("encoder", "decoder"):
        before, now = getattr(base.model, name), getattr(run.model, name)
        if (before is None) != (now is None):
            hidden.append(f"model.{name}")
            layers = "none" if now is None else f"{now.num_layers} layers of width {now.d_model}"
            found.append(f"model.{name} {layers}")
    if base.initialize_from is None and run.initialize_from is not None:
        hidden.append("initialize_from")
        found.append(f"initialize_from {Path(run.initialize_from.directory).name}")
    fields = diff_configs(base, run)
    others = [f"{field} {value}" for field, (_, value) in fields.items() if not field.startswith(tuple(hidden))]
    return [*others, *found]


def print_plan(runs: Sequence[StudyRun], workdir: object, tier: Tier, console: Console) -> None:
    """Print the arms with what they differ in, their costs, and the least time of all runs."""
    first_of = {run.arm: run for run in reversed(runs)}
    arms = [first_of[name] for name in dict.fromkeys(run.arm for run in runs)]
    costs = {run.arm: arm_cost(run.run) for run in arms}
    title = f"{len(runs)} runs of {len(arms)} arms in {workdir}, each with"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("arm", overflow="fold")
    for name in ("parameters", "steps", "executed", "model's\nown", "raw\ntokens", "loss\ntokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in arms:
        cost = costs[run.arm]
        table.add_row(
            run.arm,
            formatting.count(cost.parameters),
            f"{cost.steps:,}",
            formatting.flops(cost.executed),
            formatting.flops(cost.model),
            formatting.count(cost.raw_tokens),
            formatting.count(cost.loss_tokens),
        )
    console.print(table)
    for arm, fields in arm_differences(runs).items():
        if fields:
            say(f"{arm} differs in {'; '.join(fields)}")
    total = sum(costs[run.arm].executed for run in runs)
    rate, machine = _least_rate(tier)
    least = formatting.duration(total / rate)
    say(f"{formatting.flops(total)} in all; at least {least} at {formatting.flops(rate)}/s, {machine}")


def _least_rate(tier: Tier) -> tuple[float, str]:
    """Return FLOP/s that no run exceeds, and of what they are the rate."""
    if tier == "gpu":
        return parse_topology(GPU).accelerator.flops_per_second, f"the peak of {GPU}"
    matrix, seconds = np.ones((_SIZE, _SIZE), np.float32), []
    for _ in range(_REPEATS):
        # Time of the processor, so that other work on the machine does not count.
        begun = time.process_time()
        matrix @ matrix
        seconds.append(max(time.process_time() - begun, 1e-6))
    cores = os.cpu_count() or 1
    return cores * 2.0 * _SIZE**3 / min(seconds), f"the rate of matrix products on {cores} cores that was measured here"
