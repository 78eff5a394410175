"""`t5x-like sweep`."""

from __future__ import annotations

import argparse
from typing import Any

from t5x_like.cli.arguments import (
    add_devices_option,
    add_recipe_command,
    configured_run,
    location_text,
    plugin_arguments,
)
from t5x_like.cli.recipe_argument import recipe_run
from t5x_like.errors import EXIT_OK
from t5x_like.utils.sanitize import say


def register(commands: Any) -> None:
    parser = add_recipe_command(
        commands, "sweep", _run, "train a run for each combination of values of fields, and compare them"
    )
    parser.add_argument(
        "--workdir",
        type=location_text,
        metavar="DIR",
        help="directory of the sweep, or a URL: gs:// or s3://, with a run directory for each combination (default: "
        "runs/NAME-sweep)",
    )
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="score by which the runs are ordered, such as loss/S or squad/em (default: bits_per_byte or its bound)",
    )
    parser.add_argument("--plan", action="store_true", help="print the runs and exit")
    add_devices_option(parser)


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    from t5x_like.studies.sweep_arms import sweep_arms

    run = recipe_run(options.recipe)
    arms = sweep_arms(run, overrides, lambda words: configured_run(options, list(words)))
    from t5x_like.storage.locations import location

    workdir = location(options.workdir or f"runs/{run.name}-sweep", "--workdir")
    if options.plan:
        from t5x_like.planning.estimate.flops import training_flops
        from t5x_like.utils import formatting

        for arm in arms:
            steps = arm.run.training.num_train_steps
            say(f"{workdir / arm.name}: {steps:,} steps, {formatting.flops(training_flops(arm.run) * steps)}")
        return EXIT_OK
    from t5x_like.studies.sweep import report, sweep_result, train_arms
    from t5x_like.utils.console import Console

    further = plugin_arguments(options)
    if options.devices is not None:
        further += ["--devices", str(options.devices)]
    code, finished = train_arms(options.recipe, arms, workdir, further)
    if len(finished) > 1:
        say(report(sweep_result(finished, workdir, options.metric), workdir, Console()))
    return code
