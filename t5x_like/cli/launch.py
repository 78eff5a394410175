"""The command `t5x-like launch`: renders the files and commands that start a run elsewhere; `--execute` runs them."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from t5x_like.cli import train
from t5x_like.cli.arguments import (
    Parser,
    add_plugin_options,
    configured_run,
    load_plugins,
    local_path,
    location_text,
    not_negative,
    plugin_arguments,
    positive,
)
from t5x_like.cli.launch_targets import TARGETS, Target, assignment
from t5x_like.config import RunConfig
from t5x_like.errors import EXIT_OK, ConfigError, ConfigProblem
from t5x_like.launching import local
from t5x_like.launching.executor import execute, write
from t5x_like.launching.job import SHARED_MOUNT, Job
from t5x_like.launching.rendering import Step, to_text
from t5x_like.launching.spot_supervisor import supervise
from t5x_like.utils.sanitize import say
from t5x_like.utils.trusted_urls import scheme_of


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "launch",
        help="print the files and commands that start a run on many machines, or execute them",
        description="Render and print the files and commands that start `t5x-like train RECIPE` on a target.",
        epilog="Arguments after -- are passed to `train`: "
        "... launch slurm smoke --nodes 2 -- --training.global-batch-size 64",
    )
    targets = parser.add_subparsers(metavar="TARGET", required=True, parser_class=Parser)
    _add_local(targets)
    for target in TARGETS:
        _add_target(targets, target)


def _add_target(targets: Any, target: Target) -> None:
    description = f"Start a run on {target.description}."
    parser: argparse.ArgumentParser = targets.add_parser(target.name, help=target.description, description=description)
    parser.set_defaults(run=_run, render=target.render, parser=parser, overrides=True)
    parser.add_argument("recipe", metavar="RECIPE", help="recipe, as for `train`; it is also read and validated here")
    parser.add_argument("--execute", action="store_true", help="run the commands; without this nothing is run")
    parser.add_argument("--output", type=local_path, metavar="DIR", help="write the rendered files to DIR")
    add_plugin_options(parser)
    job = parser.add_argument_group("job")
    job.add_argument("--name", help="name of the job (default: the run's)")
    job.add_argument(
        "--workdir",
        type=location_text,
        metavar="DIR",
        help="run directory on the target, or a URL (default: runs/NAME in the bucket, NAME in the shared volume, or "
        "runs/NAME in the current directory)",
    )
    job.add_argument(
        "--env",
        type=assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment variable of every process",
    )
    job.add_argument(
        "--secret", action="append", default=[], metavar="NAME", help="variable whose value is written to no file"
    )
    _add_restart_options(job)
    job.add_argument(
        "--grace-seconds",
        type=positive,
        default=Job.grace_seconds,
        metavar="S",
        help="seconds between the signal to stop and the kill, for a save",
    )
    target.add_options(parser)


def _add_restart_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--max-restarts", type=not_negative, default=Job.max_restarts, metavar="N", help="limit (default: 10)"
    )
    parser.add_argument(
        "--restart-on",
        type=positive,
        nargs="+",
        default=[],
        metavar="CODE",
        help=f"further exit codes after which to restart, besides {', '.join(map(str, Job.restart_codes))}",
    )


def _restart_codes(options: argparse.Namespace) -> tuple[int, ...]:
    return tuple(sorted({*Job.restart_codes, *options.restart_on}))


def _add_local(targets: Any) -> None:
    where = "this machine, in several processes"
    parser: argparse.ArgumentParser = targets.add_parser("local", help=where, description=f"Start a run on {where}.")
    parser.set_defaults(run=_run_local, parser=parser, overrides=True)
    parser.add_argument("recipe", metavar="RECIPE", help="recipe, as for `train`; it is validated once, here")
    parser.add_argument("--execute", action="store_true", help="run the commands; without this nothing is run")
    add_plugin_options(parser)
    parser.add_argument("-n", "--processes", type=positive, required=True, metavar="N", help="number of processes")
    parser.add_argument(
        "--devices-per-process", type=positive, metavar="N", help="GPUs per process, or CPU devices without GPUs"
    )
    parser.add_argument(
        "--workdir", type=location_text, metavar="DIR", help="run directory, or a URL (default: runs/NAME)"
    )
    parser.add_argument(
        "--log-dir", type=local_path, metavar="DIR", help="directory for the output of process N, process.N.txt"
    )
    _add_restart_options(parser)


def _run_local(options: argparse.Namespace, extra: list[str]) -> int:
    extra = [*plugin_arguments(options), *extra]
    run = _checked(options, extra)
    workdir = options.workdir or str(Path("runs") / run.name)
    # -P: nothing is imported from the folder that the processes start in.
    arguments = ["-P", "-m", "t5x_like", "train", options.recipe, "--workdir", workdir, *extra]
    count, devices = options.processes, options.devices_per_process
    if not options.execute:
        say(local.describe(["python", *arguments], count, devices))
        return EXIT_OK
    return local.launch_local(
        [sys.executable, *arguments],
        processes=count,
        devices_per_process=devices,
        log_dir=options.log_dir,
        max_restarts=options.max_restarts,
        restart_codes=_restart_codes(options),
    )


def _run(options: argparse.Namespace, extra: list[str]) -> int:
    extra = [*plugin_arguments(options), *extra]
    run = _checked(options, extra)
    name = options.name or run.name
    stores = _stores_in_bucket(options, run, extra)
    job = Job(
        name=name,
        recipe=options.recipe,
        workdir=options.workdir or f"{_place(options)}/{name}",
        arguments=(*extra, *stores),
        env=dict(options.env),
        secrets=tuple(options.secret),
        max_restarts=options.max_restarts,
        restart_codes=_restart_codes(options),
        grace_seconds=options.grace_seconds,
    )
    rendering = options.render(options, run, job, options.output or Path("runs") / f"{job.resource}.launch")
    if stores:
        data = [*_data_overrides(extra), *stores]
        prepare = Step("prepare the data", ("t5x-like", "prepare", options.recipe, *data), "before")
        rendering = dataclasses.replace(rendering, steps=(prepare, *rendering.steps))
    recreate = getattr(options, "recreate", False)
    if recreate and (rendering.recovery is None or not options.execute):
        found, fix = "without --spot or --execute", "a supervisor runs the commands, and recreates spot slices only"
        raise ConfigError([ConfigProblem("--recreate", found, "both of them", fix)])
    if options.execute:
        supervised = rendering.recovery if recreate else None
        if supervised is not None:
            return supervise(rendering, supervised, _report)
        return execute(rendering, _report)
    print(to_text(rendering), end="")
    if options.output is not None:
        write(rendering)
    return EXIT_OK


def _report(line: str) -> None:
    say(f"t5x-like: {line}", file=sys.stderr)


def _checked(options: argparse.Namespace, arguments: list[str]) -> RunConfig:
    """Return the run that `train` would start with the arguments; what `train` would refuse is refused here."""
    parser = Parser(prog="t5x-like")
    train.register(parser.add_subparsers(parser_class=Parser))
    train_options, overrides = parser.parse_known_args(["train", options.recipe, *arguments])
    if train_options.workdir is not None or train_options.print_config:
        options.parser.error(
            "of the options of train, --workdir must be given before --, and --print-config is not allowed"
        )
    load_plugins(train_options)
    return configured_run(train_options, overrides, options.parser.option_strings)


def _place(options: argparse.Namespace) -> str:
    """Return the directory, or the URL, in which the run directory is by default.

    Raises:
      ConfigError: the machines of the target share no disk, and lose theirs, and no place is named.
    """
    if "bucket" not in options:
        return "runs"
    if options.bucket is not None:
        return f"{options.bucket}/runs"
    if getattr(options, "nfs", None):
        return SHARED_MOUNT
    if getattr(options, "claim", None):
        return str(options.mount).rstrip("/")
    volumes = [f"--{name}" for name in ("nfs", "claim") if name in options]
    fix = f"or --workdir URL{''.join(f', or a shared volume by {name}' for name in volumes)}"
    found = "none, for machines that share no disk and are deleted after the run"
    raise ConfigError([ConfigProblem("--bucket", found, "gs://BUCKET or gs://BUCKET/PATH", fix)])


def _stores_in_bucket(options: argparse.Namespace, run: RunConfig, extra: list[str]) -> tuple[str, ...]:
    """Return the override that puts the token stores into the bucket; none if the recipe or an override names one."""
    is_named = any(word.partition("=")[0] in ("--data.store-dir", "--data.store_dir") for word in extra)
    if getattr(options, "bucket", None) is None or is_named or scheme_of(run.data.store_dir) or run.data.seqio:
        return ()
    return ("--data.store-dir", f"{options.bucket}/stores")


def _data_overrides(words: list[str]) -> list[str]:
    """Return the overrides of data fields, with their values, which `prepare` needs as well."""
    found, is_data = [], False
    for word in words:
        is_data = word.startswith("--data.") if word.startswith("--") else is_data
        found += [word] if is_data else []
    return found
