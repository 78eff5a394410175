"""`t5x-like train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5x_like.commands.arguments import (
    add_devices_option,
    add_processes_options,
    add_recipe_command,
    configured_run,
    process_flags,
    simulate_devices,
)
from t5x_like.config import EXIT_OK


def register(commands: Any) -> None:
    parser = add_recipe_command(commands, "train", _run, "pre-train or go on training; the same command again resumes")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="the run's directory (default: runs/NAME)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="go on although this training field differs from the run's, as in training.batch_size",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="of `plan --save`: say where what is found differs; kept in the run's directory for the next start",
    )
    add_devices_option(parser)
    add_processes_options(parser)


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    run = configured_run(options, overrides)
    if options.print_config:
        from t5x_like.config.serialization import to_json

        print(to_json(run), end="")
        return EXIT_OK
    simulate_devices(options.devices)
    from t5x_like.partitioning.distributed import started

    with started(process_flags(options), partitioning=run.partitioning):
        from t5x_like.trainer import train

        return train(run, options.workdir or Path("runs") / run.name, options.allow_change, options.plan)
