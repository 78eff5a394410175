"""`t5x-like generate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5x_like.commands.arguments import add_run_command, positive, process_flags, simulate_devices


def register(commands: Any) -> None:
    parser = add_run_command(commands, "generate", _run, "continue or fill in prompts, read from stdin by default")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="a single prompt")
    source.add_argument("--input", type=Path, metavar="FILE", help='JSON lines {"prompt": ...}; answered in JSON lines')
    parser.add_argument(
        "--mode", choices=("R", "S", "X"), help="mode token in front of the prompt (default: S if trained)"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="(default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-k", type=positive, metavar="K", help="sample from the K likeliest tokens only")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens of joint probability P"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")
    parser.add_argument("--num-samples", type=positive, default=1, metavar="N", help="answers per prompt (default: 1)")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")


def _run(options: argparse.Namespace, _: list[str]) -> int:
    simulate_devices(options.devices)
    from t5x_like.partitioning.distributed import started

    with started(process_flags(options)):
        from t5x_like.decoding.command import generate_command

        return generate_command(
            options.run_dir,
            prompt=options.prompt,
            input_path=options.input,
            mode=options.mode,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            num_samples=options.num_samples,
            step=options.step,
        )
