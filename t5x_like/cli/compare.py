"""`t5x-like compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5x_like.cli.arguments import add_command, add_models_argument, output_path, positive
from t5x_like.errors import EXIT_OK
from t5x_like.utils.sanitize import say


def register(commands: Any) -> None:
    parser = add_command(commands, "compare", _run, "compare evaluated checkpoints side by side on an HTML page")
    add_models_argument(
        parser,
        nargs="+",
        help="directory of an evaluated run; DIR:STEP or DIR:STEP,STEP for steps (default: the newest evaluated one)",
    )
    parser.add_argument(
        "--output", type=output_path, default=Path("comparison.html"), metavar="PATH", help="file of the HTML page"
    )
    parser.add_argument("--samples", type=positive, default=6, metavar="N", help="samples of each Task (default: 6)")
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from t5x_like.reports.comparison_page import write_comparison

    say(write_comparison(options.models, options.output, samples=options.samples))
    return EXIT_OK
