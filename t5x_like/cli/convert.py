"""`t5x-like convert`."""

from __future__ import annotations

import argparse
from typing import Any

from t5x_like.cli.arguments import (
    MODEL_HELP,
    OUT_HELP,
    add_command,
    add_devices_option,
    add_model_argument,
    output_directory_path,
    positive_number,
    simulate_devices,
)
from t5x_like.errors import EXIT_OK


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "convert",
        _run,
        "import a Hugging Face or T5X checkpoint, or write a Hugging Face directory",
    )
    add_devices_option(parser)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--from",
        dest="from_format",
        choices=("hf", "t5x"),
        help="import MODEL, a Hugging Face or T5X checkpoint",
    )
    direction.add_argument("--to", dest="to_format", choices=("hf",), help="write MODEL as a Hugging Face directory")
    direction.add_argument("--merge", action="store_true", help="merge the adapters of the run MODEL into its base")
    add_model_argument(parser, help=f"{MODEL_HELP}; with --from, the directory to import")
    parser.add_argument("out", type=output_directory_path, metavar="OUT", help=OUT_HELP)
    parser.add_argument(
        "--model",
        dest="architecture",
        metavar="PRESET",
        help="with --from t5x: architecture of the model, a preset like t5_1_1:base or a recipe with the model",
    )
    parser.add_argument(
        "--optimizer",
        action="store_true",
        help="with --from t5x: import Adafactor's state as well; needs --loss-scale",
    )
    parser.add_argument(
        "--loss-scale",
        type=positive_number,
        metavar="FACTOR",
        help="with --optimizer: T5X's loss divided by the mean loss per target token: the number of target tokens in a "
        "batch with LOSS_NORMALIZING_FACTOR = None (T5X's default), 1 with NUM_REAL_TARGET_TOKENS",
    )
    parser.add_argument(
        "--family",
        metavar="NAME",
        help="with --to: model_type to write (default: the imported, or the plainest)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="with --to: type of the tensors (default: float32)",
    )
    parser.add_argument(
        "--license",
        metavar="ID",
        help="with --to: licence of the weights for the model card, as the hub names it (default: unknown)",
    )
    parser.add_argument(
        "--scale-logits",
        choices=("yes", "no"),
        help="with --from: whether T5's logits are scaled (default: as in config.json; umT5: no)",
    )
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    simulate_devices(options.devices)

    # A checkpoint to import has no steps of ours: its path is taken as it was written.
    source = options.model.path
    if options.from_format and options.model.step is not None:
        options.parser.error(f"found {source}:{options.model.step}, expected a path without a step with --from")
    if options.from_format == "t5x":
        from t5x_like.interop.t5x.checkpoint import import_directory

        if not options.architecture:
            options.parser.error("--from t5x needs --model: a T5X checkpoint does not describe its model")
        if options.optimizer != (options.loss_scale is not None):
            options.parser.error(
                "found only one of --optimizer and --loss-scale, expected both or neither: T5X sums the loss over the "
                "tokens of a batch by default, this package averages it, and the moments must be scaled accordingly"
            )
        import_directory(source, options.out, model=options.architecture, loss_scale=options.loss_scale)
    elif options.from_format:
        scale = {None: None, "yes": True, "no": False}[options.scale_logits]
        from t5x_like.interop.huggingface.checkpoint import import_directory as import_huggingface

        import_huggingface(source, options.out, scale_logits=scale)
    elif options.merge:
        from t5x_like.adapters.merge import merge_directory

        merge_directory(options.model.path, options.out, step=options.model.step)
    else:
        from t5x_like.export.huggingface_directory import export_directory

        export_directory(
            options.model, options.out, family=options.family, dtype=options.dtype, license_id=options.license
        )
    return EXIT_OK
