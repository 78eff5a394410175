"""Table of docs/planning-compiled.md: the shipped recipes, compiled for their topologies.

    python benchmarks/compiled_peaks.py [--xla-effort default] [RECIPE ...]

It needs the tpu extra and no TPU. A row is printed as soon as its recipe is compiled, which takes up to two minutes of
a core at low effort; the estimate in the row is that of `plan --no-compile`.
"""

from __future__ import annotations

import argparse
import sys
import time

from t5x_like.config.recipes import load_recipe
from t5x_like.hardware.fake_devices import fake_devices
from t5x_like.hardware.topologies import GIB, parse_topology
from t5x_like.planning.estimate.memory import estimate
from t5x_like.planning.xla.aot_compile import compile_train_step
from t5x_like.planning.xla.roofline import roofline
from t5x_like.program import build_program

RECIPES = (
    "ul2:ul2_20b",
    "t5:xxl",
    "t5gemma",
    "decoders",
    "decoders:llama_8b",
    "decoders:mixtral_8x7b",
    "bert",
)
HEAD = """| recipe | topology | mesh | step | peak | of | estimate | bound by | CPU seconds |
|---|---|---|---|---|---|---|---|---|"""


def row(name: str, effort: str) -> tuple[str, bool]:
    """Return a row of the table, and whether the recipe fits without a warning from XLA."""
    start = time.process_time()
    run = load_recipe(name)
    assert run.sharding.topology is not None, f"{name} has no topology"
    topology = parse_topology(run.sharding.topology)
    estimated = estimate(build_program(run, fake_devices(topology))).peak_bytes
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
        bound + (" (XLA warns)" if compiled.warnings else ""),
        f"{time.process_time() - start:.0f}",
    )
    return f"| {' | '.join(cells)} |", compiled.fits and not compiled.warnings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--xla-effort", choices=("low", "default"), default="low")
    options = parser.parse_args()
    print(HEAD, flush=True)
    all_fit = True
    for name in options.recipes:
        text, fits = row(name, options.xla_effort)
        print(text, flush=True)
        all_fit &= fits
    return 0 if all_fit else 1


if __name__ == "__main__":
    sys.exit(main())
