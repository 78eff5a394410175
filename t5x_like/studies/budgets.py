"""Budgets: the cost of a step of an arm, and the number of steps that a budget pays for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

from t5x_like.config import RunConfig
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.planning.estimate.flops import executed_flops, training_flops
from t5x_like.planning.estimate.tokens import denoiser_tokens
from t5x_like.studies.study import Arm, Budget, BudgetUnit, Study, StudyRun

TOLERANCE = 0.01
"""Largest relative difference of the cost of a run from its budget."""


def cost_of_step(run: RunConfig, unit: BudgetUnit) -> float:
    """Return what a step costs in the unit of a budget."""
    match unit:
        case "executed_flops":
            return executed_flops(run)
        case "model_flops":
            return training_flops(run)
        case "loss_tokens":
            return sum(one.loss_tokens for one in denoiser_tokens(run))
        case "raw_tokens":
            return sum(one.raw_tokens for one in denoiser_tokens(run))
        case "steps":
            return 1.0
        case unknown:
            assert_never(unknown)


def steps_within(arm: Arm, budget: Budget) -> int:
    """Return the number of steps that a budget pays for.

    Raises:
      ConfigError: the nearest number of steps costs more than `TOLERANCE` more or less than the budget, or the cost of
        a step is unknown.
    """
    cost = cost_of_step(arm.run, budget.unit)
    if arm.run.training.batch_size_ramp and budget.unit != "steps":
        expected = "() with a budget in another unit than steps: all steps of an arm cost the same"
        raise ConfigError([ConfigProblem(f"arm {arm.name}: training.batch_size_ramp", "stages", expected)])
    steps = round(budget.amount / cost) if cost else 0
    if not steps or abs(steps * cost / budget.amount - 1) > TOLERANCE:
        found = f"{steps:,} steps of {cost:.4g} {budget.unit} for a budget of {budget.amount:.4g}"
        expected = f"a number of steps that costs the budget within {TOLERANCE:.0%}"
        fix = "raise the budget, or lower training.global_batch_size of the arm"
        raise ConfigError([ConfigProblem(f"arm {arm.name}", found, expected, fix)])
    return steps


def study_runs(study: Study, seeds: Sequence[int] | None = None, only: Sequence[str] = ()) -> list[StudyRun]:
    """Return the runs of a study, all arms of the first seed first.

    Args:
      study: A valid study.
      seeds: Seeds in place of those of the study.
      only: Names of arms, whose parents are added; empty: all of them.

    Raises:
      ConfigError: an arm does not fit the budget, a seed is named twice, or `only` names an arm that the study does not
        have.
    """
    seeds = study.seeds if seeds is None else seeds
    if len(set(seeds)) < len(seeds):
        raise ConfigError([ConfigProblem("--seeds", " ".join(map(str, seeds)), "different numbers")])
    names = [arm.name for arm in study.arms]
    if unknown := [name for name in only if name not in names]:
        raise ConfigError([ConfigProblem("--only", ", ".join(unknown), f"arms of the study: {', '.join(names)}")])
    wanted = {*only, *(arm.parent for arm in study.arms if arm.name in only)} if only else {*names}
    return [_run_of(study, arm, seed) for seed in seeds or (None,) for arm in study.arms if arm.name in wanted]


def _run_name(arm: str, seed: int | None) -> str:
    return arm if seed is None else f"{arm}.seed-{seed}"


def _run_of(study: Study, arm: Arm, seed: int | None) -> StudyRun:
    run, changes = arm.run, {}
    name = _run_name(arm.name, seed)
    if (budget := arm.budget or study.budget) is not None:
        steps = steps_within(arm, budget)
        run = dataclasses.replace(run, training=dataclasses.replace(run.training, num_train_steps=steps))
        changes["training.num-train-steps"] = steps
    if seed is not None:
        run = dataclasses.replace(
            run,
            data=dataclasses.replace(run.data, seed=seed),
            training=dataclasses.replace(run.training, seed=seed),
        )
        changes |= {"data.seed": seed, "training.seed": seed}
    parent = None if arm.parent is None else _run_name(arm.parent, seed)
    if parent is not None and run.initialize_from is not None:
        start = dataclasses.replace(run.initialize_from, directory=str(Path(run.initialize_from.directory) / parent))
        run = dataclasses.replace(run, initialize_from=start)
    words = [word for field, value in changes.items() for word in (f"--{field}", str(value))]
    recipe = (*arm.recipe, *words, "--name", name) if arm.recipe else ()
    return StudyRun(arm.name, seed, dataclasses.replace(run, name=name), recipe, parent)
