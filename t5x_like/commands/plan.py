"""`t5x-like plan`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5x_like.commands.arguments import (
    add_devices_option,
    add_recipe_command,
    configured_run,
    positive,
    simulate_devices,
)
from t5x_like.commands.compiling import add_compile_options, compile_ahead
from t5x_like.config import EXIT_OK, ConfigError, Problem, RunConfig, UserError

if TYPE_CHECKING:
    from t5x_like.planning.plan import Plan
    from t5x_like.planning.topologies import Topology


def register(commands: Any) -> None:
    parser = add_recipe_command(commands, "plan", _run, "say what a run needs on a machine, before it is paid for")
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="the machine, as in v5e:16x16, v5p-128 or h100:8 (default: the recipe's own, or the devices of this one)",
    )
    parser.add_argument("--num-slices", type=positive, metavar="N", help="slices of that topology (default: 1)")
    parser.add_argument("--shardings", action="store_true", help="also list each parameter and activation, as split")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the plan; `train --plan FILE` compares")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, and nothing else")
    add_compile_options(parser)
    add_devices_option(parser)


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    run = configured_run(options, overrides)
    topology = _topology(options, run)
    if topology is None:
        simulate_devices(options.devices)
    else:
        import jax

        # Accelerators of this machine are not asked for: others may be using them.
        jax.config.update("jax_platforms", "cpu")
    from rich.console import Console

    from t5x_like.planning.plan import plan_run
    from t5x_like.planning.report import print_plan, print_shardings
    from t5x_like.planning.saved import save_plan

    console = Console(quiet=options.json)
    plan = plan_run(run, topology)
    print_plan(plan, console)
    document = plan.as_dict()
    if options.shardings:
        from t5x_like.planning.shardings import activation_rows, parameter_rows

        parameters, activations = parameter_rows(plan.program), activation_rows(plan.program)
        print_shardings(parameters, activations, console)
        document["shardings"] = {
            "parameters": [row._asdict() for row in parameters],
            "activations": [row._asdict() for row in activations],
        }
    compiled = compile_ahead(run, topology, options, console, plan.memory.peak_bytes)
    if topology is not None:
        document["compiled"] = compiled
    if options.save is not None:
        save_plan(options.save, document)
        console.print(f"saved: {options.save}", markup=False, highlight=False)
    if options.json:
        import json

        json.dump(document, sys.stdout, indent=1)
        print()
    for step in ("train", "decode"):
        if step in compiled and not compiled[step]["fits"]:
            name = "step" if step == "train" else "step of generation"
            raise UserError(f"the {name} does not fit {topology}, as XLA says above; there are three knobs to turn")
    if "train" not in compiled and plan.memory.fits is False:
        raise UserError(_refusal(plan, topology))
    return EXIT_OK


def _topology(options: argparse.Namespace, run: RunConfig) -> Topology | None:
    """The machine that is asked for; None for this one."""
    from t5x_like.planning.topologies import parse_topology

    if options.devices is not None and options.topology is not None:
        raise ConfigError(
            [Problem("--devices", f"beside --topology {options.topology}", "one of them", "drop --devices")]
        )
    name = options.topology or run.partitioning.topology
    if name is None or options.devices is not None:
        if options.num_slices is not None:
            found = f"{options.num_slices} without a topology"
            raise ConfigError([Problem("--num-slices", found, "--topology, as in v5e:16x16")])
        return None
    return parse_topology(name, num_slices=options.num_slices or 1)


def _refusal(plan: Plan, topology: Topology | None) -> str:
    """What three knobs would make of a step that does not fit: of those, that is, that make it smaller here."""
    from t5x_like.planning.knobs import knobs
    from t5x_like.planning.plan import plan_run
    from t5x_like.planning.report import refusal

    turned = []
    for knob in knobs(plan.run):
        try:
            memory = None if knob.run is None else plan_run(knob.run, topology).memory
        except ConfigError:
            # It does not fit these devices: rows that they cannot share, say.
            continue
        if memory is None or memory.peak_bytes < plan.memory.peak_bytes:
            turned.append((knob, memory))
    return refusal(plan, turned)
