"""`t5x-like prepare`."""

from __future__ import annotations

import argparse
import os
import shlex
from typing import Any

from t5x_like.commands.arguments import add_recipe_command, configured_run, positive
from t5x_like.config import EXIT_OK


def register(commands: Any) -> None:
    parser = add_recipe_command(commands, "prepare", _run, "turn the recipe's corpora into stores of tokens")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: as many as cores)")
    parser.add_argument("--beam", action="store_true", help="as an Apache Beam pipeline, in place of --workers")
    parser.add_argument(
        "--beam-options", default="", metavar="OPTIONS", help="of the pipeline, as in '--runner=FlinkRunner'"
    )


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    run = configured_run(options, overrides)
    # TensorFlow, which seqio brings, announces itself on stderr; what it has to say of GPUs is no matter here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from t5x_like.data.prepare import prepare

    make_parts = None
    if options.beam:
        from t5x_like.data.beam import make_parts_by

        make_parts = make_parts_by(shlex.split(options.beam_options))
    prepare(run.data, report=print, workers=options.workers, make_parts=make_parts)
    return EXIT_OK
