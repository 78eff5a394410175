"""`t5x-like compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5x_like.commands.arguments import add_command, positive
from t5x_like.config import EXIT_OK


def register(commands: Any) -> None:
    parser = add_command(commands, "compare", _run, "put evaluated checkpoints side by side on an HTML page")
    parser.add_argument(
        "checkpoints", nargs="+", metavar="RUN", help="a run's directory, or DIR:STEP (default: the newest evaluated)"
    )
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), metavar="PATH", help="the page's file")
    parser.add_argument("--samples", type=positive, default=6, metavar="N", help="of each Task (default: 6)")
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from t5x_like.evaluation.asked import parse
    from t5x_like.evaluation.comparison_page import write_comparison

    references = [parse(text) for text in options.checkpoints]
    print(write_comparison(references, options.output, samples=options.samples))
    return EXIT_OK
