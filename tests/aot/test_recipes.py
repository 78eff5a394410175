"""Shipped recipes of large models, compiled for their topologies: a selection that takes only minutes.

`benchmarks/compiled_peaks.py` compiles all of them.
"""

from __future__ import annotations

import pytest

from t5x_like.config.recipes import load_recipe
from t5x_like.hardware.fake_devices import fake_devices
from t5x_like.hardware.topologies import parse_topology
from t5x_like.planning.estimate.memory import estimate
from t5x_like.planning.xla.aot_compile import compile_train_step
from t5x_like.program import build_program

pytest.importorskip("libtpu")
pytestmark = [pytest.mark.aot, pytest.mark.timeout(900)]

# An encoder on one slice, a decoder on two, experts on a mesh of two axes.
RECIPES = ("bert", "decoders:llama_8b", "decoders:mixtral_8x7b")


@pytest.mark.parametrize("name", RECIPES)
def test_large_recipe_compiles_for_its_topology_with_the_estimated_peak(name: str) -> None:
    run = load_recipe(name)
    assert run.sharding.topology is not None
    topology = parse_topology(run.sharding.topology)
    compiled = compile_train_step(run, topology)
    assert compiled.fits, compiled.error
    assert not compiled.warnings
    assert {axis for each in compiled.collectives for axis in each.axes} == {
        axis for axis, degree in compiled.mesh.items() if degree > 1
    }
    # Tokens travel to the devices of their experts and back.
    assert (compiled.mesh["expert"] > 1) == any(
        each.kind == "all-to-all" and each.axes == ("expert",) for each in compiled.collectives
    )
    estimated = estimate(build_program(run, fake_devices(topology))).peak_bytes
    assert estimated == pytest.approx(compiled.peak_bytes, rel=0.2)
