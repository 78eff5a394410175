"""`t5x-like train`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from t5x_like.cli.arguments import (
    add_devices_option,
    add_processes_options,
    add_recipe_command,
    configured_run,
    input_path,
    process_flags,
    run_directory_path,
    simulate_devices,
)
from t5x_like.cli.recipe_argument import starts_from_model
from t5x_like.errors import EXIT_OK
from t5x_like.utils.sanitize import say


def register(commands: Any) -> None:
    parser = add_recipe_command(commands, "train", _run, "train a run; the same command again resumes it")
    parser.add_argument(
        "--workdir",
        type=run_directory_path,
        metavar="DIR",
        help="directory of the run, or a URL: gs:// or s3:// (default: runs/NAME)",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="continue although this training field, or the content of `plugins`, differs from the run's, as in "
        "training.global_batch_size",
    )
    parser.add_argument(
        "--allow-start-over",
        action="store_true",
        help="train from step 0 if the run directory has records of a run whose checkpoints are gone; the records are "
        "moved to a folder in it",
    )
    parser.add_argument(
        "--plan",
        type=input_path,
        metavar="FILE",
        help="file of `plan --save`: report differences from it; it is kept in the run's directory for the next start",
    )
    parser.add_argument(
        "--profile-steps",
        type=_steps,
        metavar="A:B",
        help="profile steps A to B - 1, as in 100:105; TensorBoard and xprof open the profile",
    )
    add_devices_option(parser)
    add_processes_options(parser)


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    run = configured_run(options, overrides)
    if options.profile_steps is not None:
        monitoring = dataclasses.replace(run.monitoring, profile_steps=options.profile_steps)
        run = dataclasses.replace(run, monitoring=monitoring)
    if options.print_config:
        from t5x_like.config.serialization import to_json

        print(to_json(run), end="")
        return EXIT_OK
    if run.cpu_allocator:
        _keep_freed_memory(options)
    from t5x_like.trainer.run_exit import recorded_exit

    workdir = options.workdir or Path("runs") / run.name
    with recorded_exit(workdir) as run_exit:
        run_exit.limit.set("start", run.timeouts.start)
        if run.xla_flags and options.devices is None:
            _apply_flags()
        simulate_devices(options.devices)
        from t5x_like.distributed.startup import initialize

        flags = process_flags(options, run.timeouts.rendezvous)
        with initialize(flags, sharding=run.sharding, on_exit=run_exit.record):
            from t5x_like.trainer.train import train

            if starts_from_model(options.recipe):
                # One command; other recipes are prepared by another, on a machine that may have no accelerator.
                from t5x_like.data.store.prepare import prepare
                from t5x_like.distributed.coordination import on_process_0

                # It may take hours, and shows its progress.
                run_exit.limit.set("start", None)
                on_process_0(lambda: len(prepare(run.data)))
                run_exit.limit.set("start", run.timeouts.start)
            return train(
                run,
                workdir,
                options.allow_change,
                options.plan,
                start_over=options.allow_start_over,
                run_exit=run_exit,
            )


def _keep_freed_memory(options: argparse.Namespace) -> None:
    """Set the allocator if the run is on CPUs; this must precede the first thread."""
    from t5x_like.hardware.cpu_allocator import keep_freed_memory
    from t5x_like.hardware.xla_flags import detect_platform

    if options.devices is not None or detect_platform(os.environ)[0] == "cpu":
        keep_freed_memory()


def _apply_flags() -> None:
    from t5x_like.hardware.xla_flags import apply_flags, detect_platform

    platform, generation = detect_platform(os.environ)
    applied = list(apply_flags(os.environ, platform, generation))
    if applied:
        say(f"flags for {platform} {generation}".rstrip() + f": {' '.join(applied)}", file=sys.stderr)


def _steps(text: str) -> tuple[int, int]:
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected A:B with A < B, as in 100:105")
    return int(first), int(stop)
