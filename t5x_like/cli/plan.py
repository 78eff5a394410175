"""The command `t5x-like plan`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from t5x_like.cli.arguments import (
    add_devices_option,
    add_recipe_command,
    configured_run,
    output_path,
    positive,
    simulate_devices,
)
from t5x_like.config import RunConfig
from t5x_like.errors import EXIT_OK, ConfigError, ConfigProblem, UserError
from t5x_like.utils.sanitize import say

if TYPE_CHECKING:
    from t5x_like.hardware.topologies import Topology
    from t5x_like.planning.plan import Plan
    from t5x_like.utils.console import Console


def register(commands: Any) -> None:
    parser = add_recipe_command(commands, "plan", _run, "report what a run needs on a machine before it is started")
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="such as v5e:16x16, v5p-128 or h100:8 (default: the recipe's, or the devices of this machine)",
    )
    parser.add_argument(
        "--num-slices", type=positive, metavar="N", help="number of slices of the topology (default: 1)"
    )
    parser.add_argument(
        "--shardings", action="store_true", help="also list the sharding of each parameter and activation"
    )
    parser.add_argument(
        "--save", type=output_path, metavar="FILE", help="write the plan; `train --plan FILE` compares with it"
    )
    parser.add_argument("--json", action="store_true", help="print only the plan, as JSON")
    add_compile_options(parser)
    add_devices_option(parser)


def add_compile_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ahead-of-time compilation."""
    group = parser.add_argument_group("ahead-of-time compilation with XLA's TPU compiler (the tpu extra)")
    group.add_argument("--no-compile", action="store_true", help="report only what needs no compiler")
    group.add_argument(
        "--xla-effort",
        choices=("low", "default"),
        default="low",
        help="effort of the compiler; default, as in a run, takes several times as long (default: low, XLA's O0)",
    )
    group.add_argument("--decode", action="store_true", help="also compile a decoding step")
    group.add_argument(
        "--decode-rows", type=positive, metavar="N", help="rows decoded together (default: training batch)"
    )
    group.add_argument(
        "--decode-length", type=positive, metavar="N", help="tokens of a cache (default: those of a row)"
    )
    group.add_argument(
        "--search-batch-size",
        action="store_true",
        help="search the batch size and remat policy with the highest throughput",
    )
    group.add_argument("--search-trials", type=positive, default=16, metavar="N", help="maximum number (default: 16)")


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    run = configured_run(options, overrides)
    topology = _topology(options, run)
    if topology is None:
        simulate_devices(options.devices)
    else:
        import jax

        # Do not initialize accelerators of this machine: another process may be using them.
        jax.config.update("jax_platforms", "cpu")
    from t5x_like.planning.plan import plan_run
    from t5x_like.planning.plan_file import save_plan
    from t5x_like.planning.plan_report import print_plan, print_shardings
    from t5x_like.utils.console import Console

    console = Console(quiet=options.json)
    plan = plan_run(run, topology)
    print_plan(plan, console)
    document = plan.as_dict()
    if options.shardings:
        from t5x_like.planning.sharding_table import activation_shardings, parameter_shardings

        parameters, activations = parameter_shardings(plan.program), activation_shardings(plan.program)
        print_shardings(parameters, activations, console)
        document["shardings"] = {
            "parameters": [array._asdict() for array in parameters],
            "activations": [array._asdict() for array in activations],
        }
    compiled = compile_steps(run, topology, options, console, plan.memory.peak_bytes)
    if topology is not None:
        document["compiled"] = compiled
    if options.save is not None:
        save_plan(options.save, document)
        console.print(f"saved: {options.save}", markup=False, highlight=False)
    if options.json:
        import json

        json.dump(document, sys.stdout, indent=1)
        say()
    for step in ("train", "decode"):
        if step in compiled and not compiled[step]["fits"]:
            name = "training" if step == "train" else "decoding"
            raise UserError(f"the {name} step does not fit {topology} according to XLA; see the suggestions above")
    if "train" not in compiled and plan.memory.fits is False:
        raise UserError(_refusal(plan, topology))
    return EXIT_OK


def _topology(options: argparse.Namespace, run: RunConfig) -> Topology | None:
    """Return the requested topology; None for the devices of this machine."""
    from t5x_like.hardware.topologies import parse_topology

    if options.devices is not None and options.topology is not None:
        found = f"together with --topology {options.topology}"
        raise ConfigError([ConfigProblem("--devices", found, "one of them", "remove --devices")])
    name = options.topology or run.sharding.topology
    if name is None or options.devices is not None:
        if options.num_slices is not None:
            found = f"{options.num_slices} without a topology"
            raise ConfigError([ConfigProblem("--num-slices", found, "--topology, such as v5e:16x16")])
        return None
    return parse_topology(name, num_slices=options.num_slices or 1)


def _refusal(plan: Plan, topology: Topology | None) -> str:
    """Return the message for a step that does not fit, with those suggestions that need less memory here."""
    from t5x_like.planning.memory_suggestions import memory_suggestions
    from t5x_like.planning.plan import plan_run
    from t5x_like.planning.plan_report import refusal

    helpful = []
    for suggestion in memory_suggestions(plan.run):
        try:
            memory = None if suggestion.run is None else plan_run(suggestion.run, topology).memory
        except ConfigError:
            # The suggestion is invalid on these devices, for example because they cannot divide the rows.
            continue
        if memory is None or memory.peak_bytes < plan.memory.peak_bytes:
            helpful.append((suggestion, memory))
    return refusal(plan, helpful)


def compile_steps(
    run: RunConfig, topology: Topology | None, options: argparse.Namespace, console: Console, estimated_bytes: int
) -> dict[str, Any]:
    """Compile the steps that the options ask for and print XLA's reports.

    Args:
      run: The run.
      topology: The topology; None for the devices of this machine, for which nothing is compiled ahead of time.
      options: Parsed options.
      console: Console for the reports.
      estimated_bytes: Peak memory as estimated without a compiler, printed beside XLA's; 0 if there is no estimate.

    Returns:
      Step name -> its report; "search" -> the trials. If nothing was compiled the dictionary is empty, and the reason
      is printed.
    """
    from t5x_like.planning.xla import libtpu

    if options.no_compile:
        return {}
    if topology is None:
        if options.decode or options.search_batch_size:
            console.print(
                "Skipping AOT compilation: --decode and --search-batch-size need a --topology of TPUs, as v5e:16x16."
            )
        return {}
    if topology.accelerator.platform != "tpu":
        console.print(f"Skipping AOT compilation: {topology} is not a TPU topology.")
        return {}
    if not libtpu.compiler_is_installed():
        console.print(
            f"Skipping AOT compilation: XLA's TPU compiler is not installed. To install it: {libtpu.INSTALL}",
            markup=False,
        )
        return {}
    from t5x_like.planning.xla.aot_compile import compile_train_step
    from t5x_like.planning.xla.aot_decode import compile_decode_step, require_decoder
    from t5x_like.planning.xla.compile_report import as_dict, print_compiled
    from t5x_like.utils import formatting

    if options.decode:
        # Fail before the training step is compiled, which takes minutes.
        require_decoder(run)
    train = compile_train_step(run, topology, effort=options.xla_effort)
    print_compiled(run, train, console)
    if estimated_bytes and train.fits:
        ratio = estimated_bytes / train.peak_bytes
        console.print(
            f"The estimate without a compiler was {formatting.size(estimated_bytes)}, {ratio:.0%} of XLA's peak."
        )
    reports: dict[str, Any] = {"train": as_dict(train)}
    if options.decode:
        sizes = {"rows": options.decode_rows, "length": options.decode_length}
        decode = compile_decode_step(run, topology, effort=options.xla_effort, **sizes)
        print_compiled(run, decode, console)
        reports["decode"] = as_dict(decode)
    if options.search_batch_size:
        reports["search"] = _search(run, topology, options.search_trials, console)
    return reports


def _search(run: RunConfig, topology: Topology, max_trials: int, console: Console) -> list[dict[str, Any]]:
    from t5x_like.planning.batch_size_search import best, print_best, print_trial, search

    trials = []
    for trial in search(run, topology, max_trials=max_trials):
        print_trial(trial, console)
        trials.append(trial)
    print_best(best(trials), console)
    return [trial.as_dict() for trial in trials]
