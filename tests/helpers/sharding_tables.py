"""Golden tables of the sharding of every array of a training step, for each shipped recipe on its topology.

`make golden-shardings` writes the tables again; `git diff` then shows the effect of a change of rules on the runs.
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path

from t5x_like.config import RunConfig
from t5x_like.config.recipes import load_recipe
from t5x_like.hardware.fake_devices import fake_devices
from t5x_like.hardware.topologies import parse_topology
from t5x_like.planning.sharding_table import activation_shardings, tree_table
from t5x_like.program import Program, build_program

FOLDER = Path(__file__).parents[1] / "golden" / "shardings"
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
    assert run.sharding.topology is not None
    return FOLDER / f"{run.name}.{run.sharding.topology.replace(' ', '').replace(':', '_')}.txt"


def program_of(run: RunConfig) -> Program:
    assert run.sharding.topology is not None
    return build_program(run, fake_devices(parse_topology(run.sharding.topology)))


def state_table(program: Program) -> str:
    """Return a line per array of the state: path, shape, mesh axes of each dimension, bytes on a device."""
    axes = " ".join(f"{axis}={degree}" for axis, degree in program.mesh.shape.items())
    arrays = tree_table(program.abstract_state)
    lines = [
        f"{program.run.sharding.topology}: {axes}",
        f"state: {sum(array.bytes_per_device for array in arrays)} bytes per device",
    ]
    for array in sorted(arrays, key=lambda array: array.name):
        lines.append(f"{array.name} {list(array.shape)} {array.spec} {array.bytes_per_device}")
    return "\n".join(lines) + "\n"


def activations_table(program: Program) -> str:
    """Return a line per kind of activation: number, logical axes, shape, mesh axes, bytes of one on a device.

    The method that creates them is left out, so that moving code does not change the tables.
    """
    counted: collections.Counter[str] = collections.Counter()
    for array in activation_shardings(program):
        line = f"({array.axes}) {array.dtype}{list(array.shape)} {array.spec} {array.bytes_per_device}"
        counted[line] += array.copies
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
