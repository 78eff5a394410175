"""Shared parts of the commands: the parser, common arguments, and the recipe with its overrides."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from t5x_like import plugins
from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.cli.recipe_argument import recipe_run
from t5x_like.config import RunConfig
from t5x_like.distributed.flags import DistributedFlags, Launcher
from t5x_like.errors import EXIT_RESUMABLE, EXIT_USAGE, ConfigError
from t5x_like.utils.sanitize import say, visible
from t5x_like.utils.stall_limit import STALL_SECONDS
from t5x_like.utils.trusted_urls import location_problems, require_local, scheme_of


class Parser(argparse.ArgumentParser):
    """Argument parser without abbreviations, which suggests the nearest option for a mistyped one."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)

    @property
    def option_strings(self) -> list[str]:
        return [option for option in self._option_string_actions if option.startswith("--")]

    def error(self, message: str) -> NoReturn:
        unknown = [word for word in message.split() if word.startswith("--")] if "unrecognized" in message else []
        near = [match for word in unknown for match in difflib.get_close_matches(word, self.option_strings, n=1)]
        hint = f" (perhaps you meant {', '.join(near)})" if near else ""
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, visible(f"t5x-like: {message}{hint}\n"))


class RecipeHelp(argparse.Action):
    """Action of `--help`: show the help of the command and, after a recipe, all fields of the recipe."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        parser.print_help()
        if namespace.recipe:
            from t5x_like.config.overrides import apply_overrides

            plugins.trust(namespace.trust or ())
            say()
            apply_overrides(recipe_run(namespace.recipe), ["--help"])
        parser.exit()


def add_command(
    commands: Any, name: str, run: Callable[..., int], summary: str, **keywords: Any
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", **keywords
    )
    add_plugin_options(parser)
    # `train` has a limit for each stage, and sweeps and studies wait for their runs.
    if name not in ("train", "sweep", "study"):
        parser.add_argument(
            "--stall-timeout",
            type=positive_number,
            default=STALL_SECONDS,
            metavar="SECONDS",
            help=f"end with exit code {EXIT_RESUMABLE} after this time without progress (default: {STALL_SECONDS:g})",
        )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_plugin_options(parser: argparse.ArgumentParser) -> None:
    """Add --trust and --plugin, which name modules to import."""
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="NAME",
        help="import this plug-in or module, or send requests to this URL, if a run's config.json names it; repeatable",
    )
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        type=local_path,
        metavar="FILE",
        help="import this file of yours, which registers a metric, say, or a model family; repeatable (the plug-ins of "
        "a run are named by its recipe)",
    )


def plugin_arguments(options: argparse.Namespace) -> list[str]:
    """Return --plugin and --trust as arguments of another command, which needs them as well."""
    named = [("--plugin", str(path)) for path in options.plugin] + [("--trust", name) for name in options.trust]
    return [word for pair in named for word in pair]


def load_plugins(options: argparse.Namespace) -> None:
    """Import the plug-ins that the options of `add_plugin_options` name."""
    plugins.trust(options.trust)
    for path in options.plugin:
        plugins.load_beside([path.name], path.parent)


def add_recipe_command(commands: Any, name: str, run: Callable[..., int], summary: str) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        name,
        run,
        summary,
        epilog="Any field of the recipe can be set: --training.global-batch-size 64 "
        "--data.corpus.files 'texts/*.jsonl'. "
        f"`t5x-like {name} RECIPE --help` lists them.",
        add_help=False,
    )
    parser.add_argument(
        "-h", "--help", action=RecipeHelp, nargs=0, help="show this message and, of a RECIPE, all fields"
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a Python recipe (FILE.py[:FUNCTION]), a config.json, the name of a shipped one, or from:MODEL_DIR "
        "(--from MODEL_DIR), which continues the model of a Hugging Face directory with its tokenizer; "
        "finetune:classify --from MODEL_DIR, and :text_to_text, :tag and :embed, fine-tune a model on your files",
    )
    parser.set_defaults(overrides=True)
    return parser


MODEL_HELP = (
    "directory of a run (`train --workdir`), of a model written by `convert --from`, or of a Hugging Face model; "
    "DIR:STEP takes the checkpoint of a step instead of the newest"
)


OUT_HELP = "directory or URL (gs:// or s3://) to write, which must not exist"


def add_model_argument(parser: argparse.ArgumentParser, help: str = MODEL_HELP) -> None:
    """Add the positional MODEL; the option `model` is a `CheckpointRef` with at most one step."""
    parser.add_argument("model", type=_one_step, metavar="MODEL", help=help)


def add_models_argument(parser: argparse.ArgumentParser, *, nargs: str, help: str) -> None:
    """Add several positional MODELs; the option `models` is a list of `CheckpointRef`s with any number of steps."""
    parser.add_argument("models", type=CheckpointRef.parse, nargs=nargs, metavar="MODEL", help=help)


def _one_step(text: str) -> CheckpointRef:
    reference = CheckpointRef.parse(text)
    if len(reference.steps) > 1:
        raise argparse.ArgumentTypeError(f"found {len(reference.steps)} steps in {text!r}, expected one")
    return reference


def add_devices_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=positive, metavar="N", help="run on N simulated CPU devices per process")


def add_processes_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that can run in several processes; `process_flags` reads them."""
    group = parser.add_argument_group(
        "several processes",
        "From these flags, or else from the environment: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID, SkyPilot, torchrun's names, Open MPI, SLURM, TPU, Kubernetes. `t5x-like launch` sets them.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address on which process 0 waits for the others")
    group.add_argument("--num-processes", type=positive, metavar="N", help="number of processes")
    group.add_argument("--process-id", type=not_negative, metavar="I", help="index of this process, from 0")
    group.add_argument(
        "--local-device-ids", type=_numbers, metavar="I,J", help="GPUs of this process (default: as launched, or all)"
    )
    group.add_argument(
        "--launcher", choices=get_args(Launcher), default="auto", help="detect only this launcher (default: auto)"
    )
    group.add_argument("--expect-processes", type=positive, metavar="N", help="fail unless there are N processes")
    group.add_argument(
        "--expect-devices",
        type=positive,
        metavar="N",
        help="fail unless all processes have N devices together (default: those of the mesh)",
    )
    group.add_argument(
        "--initialization-timeout",
        type=positive,
        metavar="SECONDS",
        help="time that processes wait for each other (default: timeouts.rendezvous of the recipe, else "
        f"{DistributedFlags.timeout_seconds})",
    )


def process_flags(
    options: argparse.Namespace, rendezvous_seconds: int = DistributedFlags.timeout_seconds
) -> DistributedFlags:
    """Return the options of `add_processes_options`; `rendezvous_seconds` if --initialization-timeout is not given."""
    return DistributedFlags(
        coordinator=options.coordinator,
        num_processes=options.num_processes,
        process_id=options.process_id,
        local_device_ids=options.local_device_ids,
        launcher=options.launcher,
        expect_processes=options.expect_processes,
        expect_devices=options.expect_devices,
        timeout_seconds=options.initialization_timeout or rendezvous_seconds,
    )


def simulate_devices(number: int | None) -> None:
    """Simulate CPU devices in this process; must be called before jax initializes its devices."""
    if number is not None:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", number)


def configured_run(options: argparse.Namespace, overrides: list[str], further: Sequence[str] = ()) -> RunConfig:
    """Return the recipe with its overrides, validated.

    Args:
      further: Options of other commands that are suggested for a mistyped one.

    Raises:
      UserError: no such recipe, a wrong override, or a configuration with problems, all of which are listed.
    """
    from t5x_like.config.overrides import apply_overrides
    from t5x_like.config.validation import validate

    run = recipe_run(options.recipe)
    # A module on the command line was named by the user, even if config.json names it as well.
    plugins.trust(part for word in overrides for part in (word, word.partition("=")[2]) if part)
    run = apply_overrides(run, overrides, options=[*further, *options.parser.option_strings])
    if run.model.task_head is not None and not run.model.task_head.labels:
        from t5x_like.data.sources.corpus_labels import with_labels

        run = with_labels(run)
    if run.training.distillation is not None and run.training.distillation.model is None:
        from t5x_like.finetuning.base_model import with_teacher_model

        run = with_teacher_model(run)
    problems = validate(run)
    if problems:
        raise ConfigError(problems)
    return run


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(not_negative(part) for part in text.split(","))


def local_path(text: str) -> Path:
    """Return the path of an argument that must not be a URL, which would become a folder of that name."""
    require_local(text, "a path argument")
    return Path(text)


def input_path(text: str) -> Path:
    """Return the path of a file to read; of a URL, the local path that it is downloaded to."""
    if not scheme_of(text):
        return Path(text)
    # TensorStore takes a second to import.
    from t5x_like.storage.transfers import input_file

    return input_file(text, "a file to read")


def output_path(text: str) -> Path:
    """Return the path of a file to write; of a URL, the local path that is uploaded when the command has ended."""
    if not scheme_of(text):
        return Path(text)
    from t5x_like.storage.transfers import output_file

    return output_file(text, "a file to write")


def continued_output_path(text: str) -> Path:
    """Return the path of a file to write, as `output_path` does, which the same command continues."""
    if not scheme_of(text):
        return Path(text)
    from t5x_like.storage.transfers import output_file

    return output_file(text, "a file to write", is_continued=True)


def output_directory_path(text: str) -> Path:
    """Return the path of a directory to create; of a URL, the local path that is uploaded at the end."""
    if not scheme_of(text):
        return Path(text)
    from t5x_like.storage.transfers import output_directory

    return output_directory(text, "a directory to write")


def location_text(text: str) -> str:
    """Return the text of a path or URL that is opened later, or elsewhere, after a check of its scheme."""
    if problems := location_problems(text, "a path argument"):
        raise ConfigError(problems)
    return text


def local_text(text: str) -> str:
    """Return the text of a path on another machine, which must not be a URL."""
    require_local(text, "a path argument")
    return text


def run_directory_path(text: str) -> Path:
    """Return the path of a run directory; for a URL, that of the local directory that stands for it."""
    if not scheme_of(text):
        return Path(text)
    # TensorStore takes a second to import.
    from t5x_like.storage.locations import Url, location
    from t5x_like.storage.mirror import open_mirror

    found = location(text, "--workdir")
    return open_mirror(found).path if isinstance(found, Url) else found


def positive(text: str) -> int:
    return _at_least(1, text, "a number above 0")


def positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
    return value


def not_negative(text: str) -> int:
    return _at_least(0, text, "a number of 0 or more")


def _at_least(least: int, text: str, expected: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}")
    return value
