"""`t5x-like embed`."""

from __future__ import annotations

import argparse
from typing import Any

from t5x_like.cli.arguments import (
    add_command,
    add_devices_option,
    add_model_argument,
    add_processes_options,
    input_path,
    output_path,
    positive,
    process_flags,
    simulate_devices,
)


def register(commands: Any) -> None:
    parser = add_command(commands, "embed", _run, "embed the texts of a JSONL file as vectors")
    add_model_argument(parser)
    add_devices_option(parser)
    add_processes_options(parser)
    parser.add_argument(
        "--input", type=input_path, required=True, metavar="FILE", help='file of JSON lines {"text": ...}'
    )
    parser.add_argument(
        "--output",
        type=output_path,
        required=True,
        metavar="FILE",
        help="file to write, .npy or .parquet, with rows in the order of the texts",
    )
    parser.add_argument("--field", default="text", metavar="NAME", help="field that holds the text (default: text)")
    parser.add_argument(
        "--pooling",
        choices=("cls", "mean", "last"),
        help="first state, mean of the states or last state (default: the model's own; otherwise mean, or last for "
        "causal attention)",
    )
    parser.add_argument(
        "--normalize", choices=("yes", "no"), help="scale vectors to length 1 (default: the model's own, or no)"
    )
    parser.add_argument(
        "--attention",
        choices=("causal", "bidirectional"),
        help="attention of a decoder (default: as in training, or causal)",
    )
    parser.add_argument(
        "--max-length", type=positive, metavar="N", help="truncate texts to N tokens (default: as in training)"
    )
    parser.add_argument(
        "--dimensions",
        type=positive,
        metavar="N",
        help="keep the first N dimensions, and normalize them if vectors are normalized (default: all)",
    )
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    simulate_devices(options.devices)
    from t5x_like.distributed.startup import initialize

    with initialize(process_flags(options)):
        from t5x_like.embedding.embed_files import embed_command

        return embed_command(
            options.model,
            options.input,
            options.output,
            field=options.field,
            pooling=options.pooling,
            normalize={None: None, "yes": True, "no": False}[options.normalize],
            bidirectional={None: None, "bidirectional": True, "causal": False}[options.attention],
            max_length=options.max_length,
            dimensions=options.dimensions,
        )
