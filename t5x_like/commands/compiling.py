"""What `plan` does with XLA's TPU compiler: its options, and the part of the report that needs a compilation."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from t5x_like.commands.arguments import positive
from t5x_like.config import RunConfig

if TYPE_CHECKING:
    from rich.console import Console

    from t5x_like.planning.topologies import Topology


def add_compile_options(parser: argparse.ArgumentParser) -> None:
    """--no-compile, --effort, --decode with its sizes, --search with its bound."""
    group = parser.add_argument_group("compiling ahead of time, with XLA's TPU compiler (the tpu extra)")
    group.add_argument("--no-compile", action="store_true", help="stop before, with what needs no compiler")
    group.add_argument(
        "--effort",
        choices=("low", "default"),
        default="low",
        help="of the compiler; default is what a run gets and takes several times as long (default: low, XLA's O0)",
    )
    group.add_argument("--decode", action="store_true", help="compile the step of generation, too")
    group.add_argument("--decode-rows", type=positive, metavar="N", help="rows at once (default: the training batch)")
    group.add_argument("--decode-length", type=positive, metavar="N", help="tokens of a cache (default: of a row)")
    group.add_argument("--search", action="store_true", help="try batch sizes and remat policies, for the best")
    group.add_argument("--search-trials", type=positive, default=12, metavar="N", help="at most (default: 12)")


def compile_ahead(
    run: RunConfig, topology: Topology | None, options: argparse.Namespace, console: Console, estimated_bytes: int = 0
) -> dict[str, Any]:
    """Compiles what the options ask for, prints what XLA says of it, and returns that for a saved plan.

    Args:
      topology: None: the devices of this machine, for which training compiles by itself.
      estimated_bytes: The peak as it was estimated without a compiler, to be set beside XLA's; 0: none was.

    Returns:
      Step name -> its report; "search" -> the trials. Empty where nothing was compiled, which is then said.
    """
    from t5x_like.planning import compiler

    if options.no_compile:
        return {}
    if topology is None:
        if options.decode or options.search:
            console.print("Not compiled: --decode and --search are for a --topology of TPUs, as in v5e:16x16.")
        return {}
    if topology.accelerator.platform != "tpu":
        console.print(f"Not compiled: ahead of time XLA compiles for TPUs only, and {topology} is none.")
        return {}
    if not compiler.compiler_is_installed():
        console.print(
            f"Not compiled: XLA's compiler for TPUs is not installed. To have it: {compiler.INSTALL}", markup=False
        )
        return {}
    from t5x_like.planning.compile import compile_train_step
    from t5x_like.planning.compile_decode import compile_decode_step, require_decoder
    from t5x_like.planning.compiled_report import as_dict, print_compiled, readable

    if options.decode:
        # Before the minutes that the training step takes.
        require_decoder(run)
    train = compile_train_step(run, topology, effort=options.effort)
    print_compiled(run, train, console)
    if estimated_bytes and train.fits:
        ratio = estimated_bytes / train.peak_bytes
        console.print(f"The estimate without a compiler was {readable(estimated_bytes)}, {ratio:.0%} of XLA's peak.")
    found: dict[str, Any] = {"train": as_dict(train)}
    if options.decode:
        sizes = {"rows": options.decode_rows, "length": options.decode_length}
        decode = compile_decode_step(run, topology, effort=options.effort, **sizes)
        print_compiled(run, decode, console)
        found["decode"] = as_dict(decode)
    if options.search:
        found["search"] = _search(run, topology, options.search_trials, console)
    return found


def _search(run: RunConfig, topology: Topology, most: int, console: Console) -> list[dict[str, Any]]:
    from t5x_like.planning.search import best, search
    from t5x_like.planning.search_report import described, print_trial, print_winner

    trials = []
    for trial in search(run, topology, most=most):
        print_trial(trial, console)
        trials.append(trial)
    print_winner(best(trials), console)
    return [described(trial) for trial in trials]
