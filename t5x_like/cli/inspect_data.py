"""`t5x-like inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5x_like.cli.arguments import add_recipe_command, configured_run, not_negative, output_path, positive
from t5x_like.errors import EXIT_OK
from t5x_like.utils.sanitize import say


def register(commands: Any) -> None:
    parser = add_recipe_command(commands, "inspect", _run, "show training rows as text, with masks in color")
    parser.add_argument("--rows", type=positive, metavar="N", help="rows to show (default: 8)")
    parser.add_argument(
        "--first-row", type=not_negative, default=0, metavar="I", help="index of the first row (default: 0)"
    )
    parser.add_argument(
        "--stats", action="store_true", help="write statistics of a sample of the rows as an HTML page instead"
    )
    parser.add_argument(
        "--sample-rows", type=positive, metavar="N", help="with --stats: rows of the sample (default: 4096)"
    )
    parser.add_argument(
        "--output",
        type=output_path,
        metavar="PATH",
        help="with --stats: file of the page (default: runs/NAME.statistics.html)",
    )


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    if not options.stats and (options.output or options.sample_rows):
        options.parser.error("--output and --sample-rows are options of --stats")
    if options.stats and options.rows:
        options.parser.error("--rows shows rows as text; with --stats use --sample-rows")
    run = configured_run(options, overrides)
    if options.stats:
        from t5x_like.reports.data_report import write_statistics

        output = options.output or Path("runs") / f"{run.name}.statistics.html"
        say(write_statistics(run, output, rows=options.sample_rows or 4096, first_row=options.first_row))
        return EXIT_OK
    from t5x_like.data.inspection.console_view import inspect

    inspect(run, rows=options.rows or 8, first_row=options.first_row)
    return EXIT_OK
