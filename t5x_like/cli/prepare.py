"""`t5x-like prepare`."""

from __future__ import annotations

import argparse
import os
import shlex
from typing import Any

from t5x_like.cli.arguments import add_recipe_command, configured_run, positive
from t5x_like.errors import EXIT_OK
from t5x_like.utils.sanitize import say


def register(commands: Any) -> None:
    parser = add_recipe_command(commands, "prepare", _run, "tokenize the recipe's corpora into token stores")
    parser.add_argument("--workers", type=positive, metavar="N", help="number of processes (default: number of cores)")
    parser.add_argument("--beam", action="store_true", help="run an Apache Beam pipeline instead of --workers")
    parser.add_argument(
        "--beam-options", default="", metavar="OPTIONS", help="options of the pipeline, as in '--runner=FlinkRunner'"
    )

    parser.add_argument(
        "--verify", action="store_true", help="read the prepared stores completely and say what is damaged"
    )


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    run = configured_run(options, overrides)
    # TensorFlow, which seqio imports, logs to stderr, and its messages about GPUs do not matter here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if options.verify:
        from t5x_like.data.store.prepare import verify_stores

        verify_stores(run.data, report=say)
        return EXIT_OK
    from t5x_like.data.store.prepare import prepare

    make_shards = None
    if options.beam:
        from t5x_like.data.store.beam_runner import beam_shard_maker

        make_shards = beam_shard_maker(shlex.split(options.beam_options))
    prepare(run.data, report=say, workers=options.workers, make_shards=make_shards)
    return EXIT_OK
