"""`t5x-like export`."""

from __future__ import annotations

import argparse
from typing import Any

from t5x_like.cli.arguments import OUT_HELP, add_command, add_model_argument, output_directory_path, positive


def register(commands: Any) -> None:
    parser = add_command(
        commands, "export", _run, "export a model as StableHLO, with a loader that needs jax but not this package"
    )
    add_model_argument(parser)
    parser.add_argument("out", type=output_directory_path, metavar="OUT", help=OUT_HELP)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="type of matrices and tables (default: float32); its cost in held-out loss is printed",
    )
    parser.add_argument(
        "--prompt-length", type=positive, metavar="N", help="tokens of the longest prompt (default: as in training)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="tokens of the longest answer (default: 128)"
    )
    parser.add_argument(
        "--platforms",
        nargs="+",
        choices=("cpu", "cuda", "tpu"),
        default=["cpu", "cuda", "tpu"],
        help="platforms that the programs run on (default: all three)",
    )
    parser.add_argument(
        "--mode",
        choices=("R", "S", "X"),
        help="mode whose prompt format the manifest describes (default: S if the model was trained with it)",
    )
    parser.add_argument(
        "--num-batches", type=positive, metavar="N", help="held-out batches that measure the cost of --dtype"
    )
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from t5x_like.export.export_model import export_command

    return export_command(
        options.model,
        options.out,
        dtype=options.dtype,
        prompt_length=options.prompt_length,
        max_new_tokens=options.max_new_tokens,
        platforms=options.platforms,
        mode=options.mode,
        num_batches=options.num_batches,
    )
