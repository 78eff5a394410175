"""`t5x-like inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5x_like.commands.arguments import add_recipe_command, configured_run, not_negative, positive
from t5x_like.config import EXIT_OK


def register(commands: Any) -> None:
    parser = add_recipe_command(commands, "inspect", _run, "show training rows as text, masks in colour")
    parser.add_argument("--rows", type=positive, default=8, metavar="N", help="rows to show (default: 8)")
    parser.add_argument(
        "--first-row", type=not_negative, default=0, metavar="I", help="rows of the run before them (default: 0)"
    )
    parser.add_argument(
        "--stats", action="store_true", help="instead, read a sample of the rows and write their statistics as a page"
    )
    parser.add_argument(
        "--sample-rows", type=positive, default=4096, metavar="N", help="rows of the sample (default: 4096)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="the page's file (default: runs/NAME.statistics.html)"
    )


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    run = configured_run(options, overrides)
    if options.stats:
        from t5x_like.inspection.page import write_statistics

        output = options.output or Path("runs") / f"{run.name}.statistics.html"
        print(write_statistics(run, output, rows=options.sample_rows, first_row=options.first_row))
        return EXIT_OK
    from t5x_like.data.describe import inspect

    inspect(run, rows=options.rows, first_row=options.first_row)
    return EXIT_OK
