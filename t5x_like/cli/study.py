"""`t5x-like study`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from t5x_like.cli.arguments import add_command, add_devices_option, local_path, not_negative, plugin_arguments, positive
from t5x_like.errors import EXIT_OK
from t5x_like.utils.sanitize import say


def register(commands: Any) -> None:
    parser = add_command(
        commands, "study", _run, "train the runs of a study, judge its predictions, and write a page about it"
    )
    parser.add_argument(
        "study", metavar="STUDY", help="a Python file with a function study(tier, folder), or the name of a shipped one"
    )
    parser.add_argument("--plan", action="store_true", help="print the arms, what they differ in and cost, and exit")
    parser.add_argument("--tier", choices=("cpu", "gpu"), default="cpu", help="size of the study (default: cpu)")
    parser.add_argument(
        "--seeds", type=not_negative, nargs="+", metavar="N", help="seeds of the runs (default: those of the study)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ARM", help="train these arms only; the page has all that have results"
    )
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="runs that train at the same time (default: 1)"
    )
    parser.add_argument(
        "--workdir",
        type=local_path,
        metavar="DIR",
        help="directory of the study, with a run directory for each arm and seed (default: runs/NAME-study)",
    )
    parser.add_argument("--report", action="store_true", help="write the page from the runs that are there, and exit")
    add_devices_option(parser)
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from t5x_like.studies.budgets import study_runs
    from t5x_like.studies.study_file import find_study, load_study, study_folder
    from t5x_like.utils.console import Console

    path = find_study(options.study)
    workdir = study_folder(options.workdir or Path(f"runs/{path.stem}-study"))
    study = load_study(path, options.tier, workdir)
    runs = study_runs(study, options.seeds, options.only)
    if options.plan:
        from t5x_like.studies.plan import print_plan

        print_plan(runs, workdir, options.tier, Console())
        return EXIT_OK
    from t5x_like.studies.run_study import prepare_data, report, results_of, train, write_page
    from t5x_like.studies.runs import require_unchanged

    # With --only, the arms that were trained before are on the page as well.
    everyone = study_runs(study, options.seeds)
    require_unchanged(everyone, workdir)
    code = EXIT_OK
    if not options.report:
        prepare_data(study, runs, workdir)
        further = plugin_arguments(options)
        if options.devices is not None:
            further += ["--devices", str(options.devices)]
        code, finished = train(runs, workdir, jobs=options.jobs, further=further)
        if not finished:
            return code
    results = results_of(study, everyone, workdir)
    report(study, results, Console())
    say(write_page(path.stem, study, everyone, results, workdir, _command(options)))
    return code


def _command(options: argparse.Namespace) -> str:
    """Return the command that makes the page, without the place of the files."""
    words = ["t5x-like", "study", options.study, *(["--tier", options.tier] if options.tier != "cpu" else [])]
    return shlex.join([*words, *(["--seeds", *map(str, options.seeds)] if options.seeds else [])])
