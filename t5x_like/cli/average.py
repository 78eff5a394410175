"""`t5x-like average`."""

from __future__ import annotations

import argparse
from typing import Any

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.cli.arguments import (
    OUT_HELP,
    add_command,
    add_devices_option,
    output_directory_path,
    positive,
    simulate_devices,
)
from t5x_like.errors import EXIT_OK


def register(commands: Any) -> None:
    parser = add_command(commands, "average", _run, "write the mean of the parameters of several checkpoints of a run")
    parser.add_argument(
        "run_dir", type=CheckpointRef.parse, metavar="RUN", help="run directory; DIR:STEP,STEP names the checkpoints"
    )
    parser.add_argument("out", type=output_directory_path, metavar="OUT", help=OUT_HELP)
    parser.add_argument(
        "--last", type=positive, default=5, metavar="N", help="without steps: the N newest checkpoints (default: 5)"
    )
    add_devices_option(parser)
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    simulate_devices(options.devices)
    from t5x_like.adapters.average import average_directory

    average_directory(options.run_dir.path, options.out, steps=options.run_dir.steps, last=options.last)
    return EXIT_OK
