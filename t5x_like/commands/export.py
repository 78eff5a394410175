"""`t5x-like export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5x_like.commands.arguments import add_command, positive
from t5x_like.config import EXIT_OK


def register(commands: Any) -> None:
    parser = add_command(commands, "export", _run, "write a trained model for programs without this package")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a run, or what `convert --from` wrote")
    parser.add_argument("out", type=Path, metavar="OUT", help="a directory that is not there yet")
    parser.add_argument(
        "--to",
        choices=("stablehlo", "hf"),
        default="stablehlo",
        help="programs with a loader that needs jax alone (default), or a Hugging Face directory, as `convert --to hf`",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="of matrices and tables (default: float32); what it costs in held-out loss is printed",
    )
    parser.add_argument(
        "--prompt-length", type=positive, metavar="N", help="tokens of the longest prompt (default: as in training)"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="(default: 128)")
    parser.add_argument(
        "--platforms",
        nargs="+",
        choices=("cpu", "cuda", "tpu"),
        default=["cpu", "cuda", "tpu"],
        help="that the programs are for (default: all three)",
    )
    parser.add_argument("--mode", choices=("R", "S", "X"), help="whose prompts are described (default: S if trained)")
    parser.add_argument("--num-batches", type=positive, metavar="N", help="held-out batches for the cost of --dtype")
    parser.add_argument("--family", metavar="NAME", help="with --to hf: its model_type")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    if options.to == "hf":
        if options.dtype == "int8":
            options.parser.error("--to hf has no int8 weights: take --dtype float32 or bfloat16")
        from t5x_like.interop.huggingface.directories import export_directory

        export_directory(options.source, options.out, family=options.family, dtype=options.dtype, step=options.step)
        return EXIT_OK
    from t5x_like.export.command import export_command

    return export_command(
        options.source,
        options.out,
        dtype=options.dtype,
        prompt_length=options.prompt_length,
        max_new_tokens=options.max_new_tokens,
        platforms=options.platforms,
        mode=options.mode,
        step=options.step,
        num_batches=options.num_batches,
    )
