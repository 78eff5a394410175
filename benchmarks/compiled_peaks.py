"""The table of docs/planning-compiled.md: the shipped recipes, compiled for the machines that they name.

    python benchmarks/compiled_peaks.py [--effort default] [RECIPE ...]

Needs the tpu extra and no TPU. A row is printed as soon as its recipe is compiled, which takes up to two minutes of a
core each at low effort; the estimate beside it is that of `plan --no-compile`.
"""

from __future__ import annotations

import argparse
import sys
import time

from t5x_like.config.recipes import load_recipe
from t5x_like.planning.compile import compile_train_step
from t5x_like.planning.memory import estimate
from t5x_like.planning.outlines import device_outlines
from t5x_like.planning.roofline import roofline
from t5x_like.planning.topologies import GIB, parse_topology
from t5x_like.program import assemble

RECIPES = (
    "ul2:ul2_20b",
    "t5:xxl",
    "t5gemma",
    "decoders",
    "decoders:llama_8b",
    "decoders:mixtral_8x7b",
    "bert",
)
HEAD = """| recipe | machine | mesh | step | peak | of | estimate | bound by | CPU seconds |
|---|---|---|---|---|---|---|---|---|"""


def row(name: str, effort: str) -> tuple[str, bool]:
    """A row of the table, and whether the recipe fits without a complaint of XLA."""
    start = time.process_time()
    run = load_recipe(name)
    assert run.partitioning.topology is not None, f"{name} names no machine"
    topology = parse_topology(run.partitioning.topology)
    estimated = estimate(assemble(run, device_outlines(topology))).peak_bytes
    compiled = compile_train_step(run, topology, effort="default" if effort == "default" else "low")
    mesh = " ".join(f"{axis}={degree}" for axis, degree in compiled.mesh.items() if degree > 1)
    bound = roofline(compiled).bound if compiled.fits else "does not fit"
    cells = (
        f"`{name}`",
        str(topology),
        mesh,
        compiled.work,
        f"{compiled.peak_bytes / GIB:.2f} GiB",
        f"{compiled.limit_bytes / GIB:.2f}",
        f"{estimated / GIB:.2f} ({estimated / compiled.peak_bytes:.0%})",
        bound + (" (XLA complains)" if compiled.complaints else ""),
        f"{time.process_time() - start:.0f}",
    )
    return f"| {' | '.join(cells)} |", compiled.fits and not compiled.complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--effort", choices=("low", "default"), default="low")
    options = parser.parse_args()
    print(HEAD, flush=True)
    all_fit = True
    for name in options.recipes:
        text, fits = row(name, options.effort)
        print(text, flush=True)
        all_fit &= fits
    return 0 if all_fit else 1


if __name__ == "__main__":
    sys.exit(main())
