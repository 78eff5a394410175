"""`t5x-like eval`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5x_like.commands.arguments import add_run_command, positive, process_flags, simulate_devices


def register(commands: Any) -> None:
    parser = add_run_command(commands, "eval", _run, "score a run's checkpoints on held-out text")
    parser.add_argument(
        "--step", type=int, nargs="+", default=[], metavar="N", help="checkpoints (default: the newest)"
    )
    parser.add_argument("--num-batches", type=positive, metavar="N", help="batches per objective (default: the run's)")
    parser.add_argument("--output", type=Path, metavar="PATH", help="where to write (default: DIR/evaluation.json)")


def _run(options: argparse.Namespace, _: list[str]) -> int:
    simulate_devices(options.devices)
    from t5x_like.partitioning.distributed import started

    with started(process_flags(options)):
        from t5x_like.evaluation.command import evaluate_run

        return evaluate_run(
            options.run_dir, steps=tuple(options.step), num_batches=options.num_batches, output=options.output
        )
