"""`t5x-like sweep`."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from t5x_like.cli.arguments import (
    add_devices_option,
    add_recipe_command,
    configured_run,
    location_text,
    not_negative,
    plugin_arguments,
    positive,
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
    parser.add_argument(
        "--seeds",
        type=not_negative,
        nargs="+",
        default=[],
        metavar="N",
        help="train each combination with each of these seeds, of the data and of the parameters",
    )
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="runs that train at the same time (default: 1)"
    )
    parser.add_argument("--plan", action="store_true", help="print the runs and exit")
    add_devices_option(parser)


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    from t5x_like.storage.locations import location
    from t5x_like.studies.budgets import study_runs
    from t5x_like.studies.study import require_valid
    from t5x_like.studies.sweep import best_first, sweep_report, sweep_study
    from t5x_like.studies.sweep_arms import sweep_arms
    from t5x_like.utils.console import Console

    run = recipe_run(options.recipe)
    arms = sweep_arms(run, options.recipe, overrides, lambda words: configured_run(options, list(words)))
    study = sweep_study(arms, options.seeds, options.metric)
    require_valid(study)
    runs = study_runs(study)
    workdir = location(options.workdir or f"runs/{run.name}-sweep", "--workdir")
    if options.plan:
        from t5x_like.studies.plan import print_plan

        print_plan(runs, workdir, "cpu", Console())
        return EXIT_OK
    from t5x_like.studies.run_study import results_of, train, write_page

    further = plugin_arguments(options)
    if options.devices is not None:
        further += ["--devices", str(options.devices)]
    code, finished = train(runs, workdir, jobs=options.jobs, further=further)
    if len({run.arm for run in finished}) > 1:
        results = results_of(study, finished, workdir)
        sweep_report(results, Console())
        title, command = f"{run.name}: a sweep", _command(options, overrides)
        say(write_page(title, best_first(study, results), runs, results, workdir, command))
    return code


def _command(options: argparse.Namespace, overrides: list[str]) -> str:
    """Return the command that makes the page, without the place of the runs."""
    seeds = ["--seeds", *map(str, options.seeds)] if options.seeds else []
    metric = ["--metric", options.metric] if options.metric else []
    return shlex.join(["t5x-like", "sweep", options.recipe, *overrides, *seeds, *metric])
