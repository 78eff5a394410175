"""`t5x-like eval`."""

from __future__ import annotations

import argparse
import os
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
from t5x_like.config import EXIT_OK


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "eval",
        _run,
        "score checkpoints on held-out text and by seqio Tasks' metrics, or predictions that lie in a file",
    )
    add_devices_option(parser)
    add_processes_options(parser)
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="a run's directory, DIR:STEP, what `convert --from` wrote, or a Hugging Face directory",
    )
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--step", type=int, nargs="+", default=[], metavar="N", help="of runs (default: the newest)")
    steps.add_argument("--all", action="store_true", help="all steps that are there")
    parser.add_argument("--new", action="store_true", help="only steps that are not evaluated yet")
    parser.add_argument("--num-batches", type=positive, metavar="N", help="batches per objective (default: the run's)")
    parser.add_argument("--output", type=Path, metavar="PATH", help="where to write (default: DIR/evaluation.json)")
    parser.add_argument("--data", metavar="RECIPE", help="whose data scores a model that is no run")
    parser.add_argument("--no-held-out", action="store_true", help="Tasks only")
    parser.add_argument("--no-intervals", action="store_true", help="faster: no bootstrap, nothing kept for `compare`")

    tasks = parser.add_argument_group("seqio Tasks", "beside those of a run's own evaluation.tasks")
    tasks.add_argument("--task", action="append", default=[], metavar="NAME", help="a Task or Mixture; repeatable")
    tasks.add_argument("--module", metavar="MODULE", help="to import, so that it is registered")
    tasks.add_argument("--split", default="validation", metavar="NAME", help="(default: validation)")
    tasks.add_argument("--num-examples", type=positive, metavar="N", help="the first of each Task (default: all)")
    tasks.add_argument("--inputs-length", type=positive, metavar="N", help="tokens (default: as in training)")
    tasks.add_argument("--targets-length", type=positive, metavar="N", help="tokens (default: as in training)")

    follow = parser.add_argument_group("following a run")
    follow.add_argument(
        "--follow", action="store_true", help="evaluate each new checkpoint, until the run has finished"
    )
    follow.add_argument("--timeout", type=float, metavar="SECONDS", help="leave when nothing came for so long")

    files = parser.add_argument_group("predictions from a file, without a model")
    files.add_argument("--predictions", type=Path, metavar="FILE", help="JSON lines with a target and a prediction")
    files.add_argument("--metrics", metavar="NAMES", help="separated by commas, as in squad,bleu")
    files.add_argument("--target-field", metavar="NAME", help="(default: target, targets, answers, reference)")
    files.add_argument("--prediction-field", metavar="NAME", help="(default: prediction, output)")
    parser.set_defaults(overrides=False)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    if options.predictions is not None:
        return _score_predictions(options)
    if not options.checkpoints:
        options.parser.error("found no CHECKPOINT, expected at least one, or --predictions FILE")
    if options.follow and (len(options.checkpoints) > 1 or options.step or options.output):
        options.parser.error("--follow takes one run, all of whose steps it evaluates, and writes into its directory")
    if options.metrics or options.target_field or options.prediction_field:
        options.parser.error("--metrics and the fields are of --predictions FILE")
    if options.timeout is not None and not options.follow:
        options.parser.error("--timeout is of --follow")
    simulate_devices(options.devices)
    # TensorFlow, which a Task brings, announces itself on stderr.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from t5x_like.partitioning.distributed import started

    with started(process_flags(options)):
        return _evaluate(options)


def _evaluate(options: argparse.Namespace) -> int:
    from t5x_like.config.recipes import load_recipe
    from t5x_like.config.seqio import EvaluationTask
    from t5x_like.evaluation.asked import Asked, parse

    tasks = tuple(
        EvaluationTask(
            mixture_or_task=name,
            module=options.module,
            split=options.split,
            num_examples=options.num_examples,
            inputs_length=options.inputs_length,
            targets_length=options.targets_length,
        )
        for name in dict.fromkeys(options.task)
    )
    asked = Asked(
        steps=tuple(options.step),
        num_batches=options.num_batches,
        tasks=tasks,
        held_out=not options.no_held_out,
        intervals=not options.no_intervals,
        only_new=options.new,
        all_steps=options.all,
    )
    if options.follow:
        from t5x_like.evaluation.command import follow_command

        return follow_command(Path(options.checkpoints[0]), asked, timeout=options.timeout)
    from t5x_like.evaluation.command import evaluate_command

    like = None if options.data is None else load_recipe(options.data)
    return evaluate_command([parse(text) for text in options.checkpoints], asked, like=like, output=options.output)


def _score_predictions(options: argparse.Namespace) -> int:
    if options.checkpoints or not options.metrics:
        options.parser.error("--predictions takes --metrics, and no CHECKPOINT")
    from rich.console import Console

    from t5x_like.evaluation.predictions import score_file
    from t5x_like.evaluation.records import write_output
    from t5x_like.evaluation.tables import of_predictions

    found = score_file(
        options.predictions,
        [name.strip() for name in options.metrics.split(",") if name.strip()],
        target_field=options.target_field,
        prediction_field=options.prediction_field,
    )
    Console().print(of_predictions(found))
    if options.output is not None:
        write_output(options.output, found)
    return EXIT_OK
