"""What the commands share: parsers that answer in full sentences, common options, the recipe with its overrides."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from t5x_like.config import EXIT_USAGE, ConfigError, RunConfig
from t5x_like.config.processes import Launcher, ProcessFlags


class Parser(argparse.ArgumentParser):
    """Spells options in full, and answers a mistyped one with the nearest."""

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
        self.exit(EXIT_USAGE, f"t5x-like: {message}{hint}\n")


class RecipeHelp(argparse.Action):
    """`--help`: of the command; after a recipe also of all its fields."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        parser.print_help()
        if namespace.recipe:
            from t5x_like.config.recipes import apply_overrides, load_recipe

            print()
            apply_overrides(load_recipe(namespace.recipe), ["--help"])
        parser.exit()


def add_command(
    commands: Any, name: str, run: Callable[..., int], summary: str, **keywords: Any
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", **keywords
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_recipe_command(commands: Any, name: str, run: Callable[..., int], summary: str) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        name,
        run,
        summary,
        epilog="Any field of the recipe can be set: --training.batch-size 64 --data.corpus.files 'texts/*.jsonl'. "
        f"`t5x-like {name} RECIPE --help` lists them.",
        add_help=False,
    )
    parser.add_argument(
        "-h", "--help", action=RecipeHelp, nargs=0, help="show this message and, of a RECIPE, all fields"
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a Python recipe (FILE.py[:FUNCTION]), a config.json, or the name of a shipped one",
    )
    parser.set_defaults(overrides=True)
    return parser


def add_run_command(commands: Any, name: str, run: Callable[..., int], summary: str) -> argparse.ArgumentParser:
    parser = add_command(commands, name, run, summary)
    add_devices_option(parser)
    add_processes_options(parser)
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="directory of a run, as given to `train --workdir`"
    )
    parser.set_defaults(overrides=False)
    return parser


def add_devices_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=positive, metavar="N", help="run on N simulated CPU devices per process")


def add_processes_options(parser: argparse.ArgumentParser) -> None:
    """Flags of a command that can run in several processes; `process_flags` reads them."""
    group = parser.add_argument_group(
        "several processes",
        "From these flags, or else from the environment: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID, SkyPilot, torchrun's names, Open MPI, SLURM, TPU, Kubernetes. `t5x-like launch` sets them.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 waits for the others")
    group.add_argument("--num-processes", type=positive, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=not_negative, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--local-device-ids", type=_numbers, metavar="I,J", help="this process's GPUs (default: as launched, or all)"
    )
    group.add_argument("--launcher", choices=get_args(Launcher), default="auto", help="look for this one only")
    group.add_argument("--expect-processes", type=positive, metavar="N", help="start only if there are so many")
    group.add_argument(
        "--expect-devices",
        type=positive,
        metavar="N",
        help="start only if there are so many over all processes (default: what the mesh says)",
    )
    group.add_argument(
        "--initialization-timeout",
        type=positive,
        default=ProcessFlags.timeout_seconds,
        metavar="SECONDS",
        help=f"for which processes wait for each other (default: {ProcessFlags.timeout_seconds})",
    )


def process_flags(options: argparse.Namespace) -> ProcessFlags:
    return ProcessFlags(
        coordinator=options.coordinator,
        num_processes=options.num_processes,
        process_id=options.process_id,
        local_device_ids=options.local_device_ids,
        launcher=options.launcher,
        expect_processes=options.expect_processes,
        expect_devices=options.expect_devices,
        timeout_seconds=options.initialization_timeout,
    )


def simulate_devices(number: int | None) -> None:
    """A mesh of CPU devices in this process, which must be asked for before jax looks for devices."""
    if number is not None:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", number)


def configured_run(options: argparse.Namespace, overrides: list[str], further: Sequence[str] = ()) -> RunConfig:
    """The recipe with its overrides, checked.

    Args:
      further: Options besides the command's own that a mistyped one may have meant.

    Raises:
      UserError: no such recipe, a wrong override, or a configuration with problems, all of which are listed.
    """
    from t5x_like.config.recipes import apply_overrides, load_recipe
    from t5x_like.config.validate import validate

    run = apply_overrides(load_recipe(options.recipe), overrides, options=[*further, *options.parser.option_strings])
    problems = validate(run)
    if problems:
        raise ConfigError(problems)
    return run


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(not_negative(part) for part in text.split(","))


def positive(text: str) -> int:
    return _at_least(1, text, "a number above 0")


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
