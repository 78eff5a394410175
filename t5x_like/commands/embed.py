"""`t5x-like embed`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5x_like.commands.arguments import (
    add_command,
    add_devices_option,
    add_processes_options,
    positive,
    process_flags,
    simulate_devices,
)


def register(commands: Any) -> None:
    parser = add_command(commands, "embed", _run, "turn the texts of a JSONL file into vectors")
    add_devices_option(parser)
    add_processes_options(parser)
    parser.add_argument("directory", type=Path, metavar="DIR", help="of a run, or what `convert --from` wrote")
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help='JSON lines {"text": ...}')
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help=".npy or .parquet, rows in the order of the texts"
    )
    parser.add_argument("--field", default="text", metavar="NAME", help="that holds the text (default: text)")
    parser.add_argument("--pooling", choices=("cls", "mean", "last"), help="(default: the model's own, or mean)")
    parser.add_argument("--normalize", choices=("yes", "no"), help="to length 1 (default: as the model says, or no)")
    parser.add_argument(
        "--attention", choices=("causal", "bidirectional"), help="of a decoder (default: as it was trained, or causal)"
    )
    parser.add_argument("--max-length", type=positive, metavar="N", help="tokens of a text; longer ones are cut")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    simulate_devices(options.devices)
    from t5x_like.partitioning.distributed import started

    with started(process_flags(options)):
        from t5x_like.embedding.command import embed_command

        return embed_command(
            options.directory,
            options.input,
            options.output,
            field=options.field,
            pooling=options.pooling,
            normalize={None: None, "yes": True, "no": False}[options.normalize],
            bidirectional={None: None, "bidirectional": True, "causal": False}[options.attention],
            max_length=options.max_length,
            step=options.step,
        )
