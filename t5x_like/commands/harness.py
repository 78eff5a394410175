"""`t5x-like harness`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5x_like.commands.arguments import add_command, add_devices_option, not_negative, positive, simulate_devices


def register(commands: Any) -> None:
    parser = add_command(commands, "harness", _run, "evaluate tasks of lm-evaluation-harness")
    add_devices_option(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="as of `eval`")
    parser.add_argument("--tasks", default="", metavar="NAMES", help="separated by commas")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="of more task files")
    parser.add_argument(
        "--docs-choice", action="store_true", help="make a multiple-choice task from the run's held-out text"
    )
    parser.add_argument("--num-fewshot", type=not_negative, metavar="N", help="examples in front (default: the task's)")
    parser.add_argument("--limit", type=positive, metavar="N", help="examples of each task (default: all)")
    parser.add_argument("--mode", choices=("R", "S", "X"), help="of the prompts (default: S if trained)")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    parser.add_argument("--output", type=Path, metavar="PATH", help="write the results as JSON")
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    simulate_devices(options.devices)
    from t5x_like.evaluation.harness_command import harness_command

    return harness_command(
        options.checkpoint,
        [name.strip() for name in options.tasks.split(",") if name.strip()],
        include_path=options.include_path,
        docs_choice=options.docs_choice,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        mode=options.mode,
        output=options.output,
        step=options.step,
    )
