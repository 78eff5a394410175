"""How every array of a training step is split, for each shipped recipe on the machine that it names.

`make golden-shardings` writes the tables anew; what `git diff` then shows is what a change of rules does to a run.
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path

from t5x_like.config import RunConfig
from t5x_like.config.recipes import load_recipe
from t5x_like.partitioning.shardings import report
from t5x_like.planning.outlines import device_outlines
from t5x_like.planning.shardings import activation_rows, spec_text
from t5x_like.planning.topologies import parse_topology
from t5x_like.program import Program, assemble

FOLDER = Path(__file__).parent / "shardings"
RECIPES = (
    "ul2:ul2_20b",
    "t5:xxl",
    "t5gemma",
    "decoders",
    "decoders:llama_8b",
    "decoders:mixtral_8x7b",
    "bert",
)


def file_of(run: RunConfig) -> Path:
    assert run.partitioning.topology is not None
    return FOLDER / f"{run.name}.{run.partitioning.topology.replace(' ', '').replace(':', '_')}.txt"


def program_of(run: RunConfig) -> Program:
    assert run.partitioning.topology is not None
    return assemble(run, device_outlines(parse_topology(run.partitioning.topology)))


def state_table(program: Program) -> str:
    """A line per array of the state: its path, its shape, the mesh axes of each dimension, the bytes on a device."""
    axes = " ".join(f"{axis}={degree}" for axis, degree in program.mesh.shape.items())
    rows = report(program.logical_axes, program.abstract_state, program.mesh, program.rules)
    lines = [
        f"{program.run.partitioning.topology}: {axes}",
        f"state: {sum(row.bytes_per_device for row in rows)} bytes per device",
    ]
    for row in sorted(rows, key=lambda row: row.path):
        lines.append(f"{row.path} {list(row.shape)} {spec_text(row.spec, len(row.shape))} {row.bytes_per_device}")
    return "\n".join(lines) + "\n"


def activations_table(program: Program) -> str:
    """A line for what is alike: how many, logical axes, shape, mesh axes, the bytes of one on a device. Where in the
    code they are made is left out, so that moving it changes no table."""
    counted: collections.Counter[str] = collections.Counter()
    for row in activation_rows(program):
        line = f"({row.axes}) {row.dtype}{list(row.shape)} {row.spec} {row.bytes_per_device}"
        counted[line] += row.copies
    lines = [f"{copies} x {line}" for line, copies in sorted(counted.items())]
    return "\n".join(["activations of a step, layers of a scan once:", *lines]) + "\n"


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for name in RECIPES:
        program = program_of(load_recipe(name))
        path = file_of(program.run)
        path.write_text(f"{state_table(program)}\n{activations_table(program)}")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
