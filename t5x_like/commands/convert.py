"""`t5x-like convert`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5x_like.commands.arguments import add_command, add_devices_option, simulate_devices
from t5x_like.config import EXIT_OK


def register(commands: Any) -> None:
    parser = add_command(
        commands, "convert", _run, "turn a Hugging Face or T5X model into a checkpoint, or one into that"
    )
    add_devices_option(parser)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--from", dest="from_format", choices=("hf", "t5x"), help="SOURCE is a Hugging Face directory or T5X checkpoint"
    )
    direction.add_argument("--to", dest="to_format", choices=("hf",), help="OUT becomes a Hugging Face directory")
    direction.add_argument("--merge", action="store_true", help="OUT becomes the run SOURCE without its adapters apart")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="with --to: a run, or what --from wrote")
    parser.add_argument("out", type=Path, metavar="OUT", help="a directory that is not there yet")
    parser.add_argument(
        "--model", metavar="MODEL", help="with --from t5x: a preset, as in t5_1_1:base, or a recipe that has the model"
    )
    parser.add_argument(
        "--optimizer",
        action="store_true",
        help="with --from t5x: Adafactor's moments too",
    )
    parser.add_argument(
        "--family", metavar="NAME", help="with --to: its model_type (default: the imported or plainest)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="with --to: of the tensors (default: float32)",
    )
    parser.add_argument("--step", type=int, metavar="N", help="with --to, --merge: checkpoint (default: the newest)")
    parser.add_argument(
        "--scale-logits",
        choices=("yes", "no"),
        help="with --from: whether T5's logits are scaled (default: as config.json says; umT5: no)",
    )
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    simulate_devices(options.devices)
    from t5x_like.interop.huggingface import directories

    if options.from_format == "t5x":
        from t5x_like.interop.t5x.directories import import_directory

        if not options.model:
            options.parser.error("--from t5x needs --model: a T5X checkpoint does not say what its model is")
        import_directory(options.source, options.out, model=options.model, optimizer=options.optimizer)
    elif options.from_format:
        scale = {None: None, "yes": True, "no": False}[options.scale_logits]
        directories.import_directory(options.source, options.out, scale_logits=scale)
    elif options.merge:
        from t5x_like.interop.merging import merge_directory

        merge_directory(options.source, options.out, step=options.step)
    else:
        directories.export_directory(
            options.source, options.out, family=options.family, dtype=options.dtype, step=options.step
        )
    return EXIT_OK
