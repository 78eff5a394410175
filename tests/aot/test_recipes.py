"""Shipped recipes of large models, compiled for the machines that they name: as many as a tier of minutes has room for.

`benchmarks/compiled_peaks.py` compiles all of them.
"""

from __future__ import annotations

import pytest

from t5x_like.config.recipes import load_recipe
from t5x_like.planning.compile import compile_train_step
from t5x_like.planning.memory import estimate
from t5x_like.planning.outlines import device_outlines
from t5x_like.planning.topologies import parse_topology
from t5x_like.program import assemble

pytest.importorskip("libtpu")
pytestmark = [pytest.mark.aot, pytest.mark.timeout(900)]

# An encoder on one slice, a decoder on two, experts on a mesh of two axes.
RECIPES = ("bert", "decoders:llama_8b", "decoders:mixtral_8x7b")


@pytest.mark.parametrize("name", RECIPES)
def test_a_large_recipe_compiles_for_its_machine_as_estimated(name: str) -> None:
    run = load_recipe(name)
    assert run.partitioning.topology is not None
    topology = parse_topology(run.partitioning.topology)
    compiled = compile_train_step(run, topology)
    assert compiled.fits, compiled.words
    assert not compiled.complaints
    assert {axis for each in compiled.collectives for axis in each.axes} == {
        axis for axis, degree in compiled.mesh.items() if degree > 1
    }
    estimated = estimate(assemble(run, device_outlines(topology))).peak_bytes
    assert estimated == pytest.approx(compiled.peak_bytes, rel=0.15)
