"""`t5x-like lm-eval`."""

from __future__ import annotations

import argparse
from typing import Any

from t5x_like.cli.arguments import (
    add_command,
    add_devices_option,
    add_model_argument,
    local_path,
    not_negative,
    output_path,
    positive,
    simulate_devices,
)


def register(commands: Any) -> None:
    parser = add_command(commands, "lm-eval", _run, "evaluate tasks of lm-evaluation-harness")
    add_model_argument(parser)
    add_devices_option(parser)
    parser.add_argument("--tasks", default="", metavar="NAMES", help="names of tasks, separated by commas")
    parser.add_argument("--include-path", type=local_path, metavar="DIR", help="folder of further task files")
    parser.add_argument(
        "--heldout-multiple-choice",
        action="store_true",
        help="evaluate a multiple-choice task that is made from the run's held-out text",
    )
    parser.add_argument(
        "--num-fewshot", type=not_negative, metavar="N", help="examples in front of a question (default: the task's)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="examples of each task (default: all)")
    parser.add_argument(
        "--mode",
        choices=("R", "S", "X"),
        help="mode token in front of each prompt (default: S if the model was trained with it)",
    )
    parser.add_argument(
        "--scoring",
        choices=("pseudo_likelihood", "diffusion_bound"),
        help="score of a text by a model that predicts masked tokens only (default: diffusion_bound if it was trained "
        "by masked diffusion, else pseudo_likelihood)",
    )
    parser.add_argument("--output", type=output_path, metavar="PATH", help="write the results to this file as JSON")
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    simulate_devices(options.devices)
    from t5x_like.evaluation.lm_eval_runner import run_lm_eval

    return run_lm_eval(
        options.model,
        [name.strip() for name in options.tasks.split(",") if name.strip()],
        include_path=options.include_path,
        heldout_multiple_choice=options.heldout_multiple_choice,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        mode=options.mode,
        scoring=options.scoring,
        output=options.output,
    )
