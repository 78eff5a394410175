"""How every array of a training state is split, for each shipped recipe on the machine that it names.

`make golden-shardings` writes the tables anew; what `git diff` then shows is what a change of rules does to a run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from t5x_like.config import RunConfig
from t5x_like.config.recipes import load_recipe
from t5x_like.partitioning.shardings import report
from t5x_like.planning.devices import described_devices
from t5x_like.planning.topologies import parse_topology
from t5x_like.program import assemble

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


def table(run: RunConfig) -> str:
    """A line per array: its path, its shape, the mesh axes of each dimension, the bytes on each device."""
    assert run.partitioning.topology is not None
    topology = parse_topology(run.partitioning.topology)
    program = assemble(run, described_devices(topology))
    axes = " ".join(f"{axis}={degree}" for axis, degree in program.mesh.shape.items())
    rows = report(program.logical_axes, program.abstract_state, program.mesh, program.rules)
    total = sum(row.bytes_per_device for row in rows)
    lines = [f"{topology}: {axes}", f"bytes per device: {total}", ""]
    for row in sorted(rows, key=lambda row: row.path):
        split = [axis if isinstance(axis, str | None) else "+".join(axis) for axis in row.spec]
        named = [axis or "-" for axis in (*split, *[None] * (len(row.shape) - len(split)))]
        lines.append(f"{row.path} {list(row.shape)} {' '.join(named)} {row.bytes_per_device}".replace("  ", " "))
    return "\n".join(lines) + "\n"


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for name in RECIPES:
        run = load_recipe(name)
        file_of(run).write_text(table(run))
        print(file_of(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
