"""`t5x-like predict`."""

from __future__ import annotations

import argparse
from typing import Any

from t5x_like.cli.arguments import (
    add_command,
    add_devices_option,
    add_model_argument,
    add_processes_options,
    continued_output_path,
    process_flags,
    simulate_devices,
)


def register(commands: Any) -> None:
    parser = add_command(
        commands, "predict", _run, "predict labels, labels of words, or numbers for the texts of a file by a task head"
    )
    add_model_argument(parser)
    add_devices_option(parser)
    add_processes_options(parser)
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help=".jsonl, .json, .csv, .tsv, .conll, .parquet or .arrow; a path, glob or URL",
    )
    parser.add_argument(
        "--output",
        type=continued_output_path,
        required=True,
        metavar="FILE",
        help="JSON lines with the row's fields and the prediction; if the command is killed, the same command "
        "continues the file",
    )
    parser.add_argument(
        "--field", metavar="NAME", help="field, or template of fields, with the text (default: the run's, or text)"
    )
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    simulate_devices(options.devices)
    from t5x_like.distributed.startup import initialize

    with initialize(process_flags(options)):
        from t5x_like.evaluation.predict_files import predict_command

        return predict_command(options.model, options.input, options.output, field=options.field)
