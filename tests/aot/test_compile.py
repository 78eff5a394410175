"""Programs compiled for TPUs that are not there: what fits, what is refused, and what is said of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from t5x_like.config import ConfigError, RunConfig
from t5x_like.config.recipes import apply_overrides, load_recipe
from t5x_like.planning.cache import cache_bytes
from t5x_like.planning.compile import Compiled, compile_lowered, compile_train_step
from t5x_like.planning.compile_decode import compile_decode_step
from t5x_like.planning.compiled_report import print_compiled
from t5x_like.planning.compiler import compiler_devices
from t5x_like.planning.roofline import roofline
from t5x_like.planning.topologies import Topology, parse_topology
from t5x_like.program import assemble

pytest.importorskip("libtpu")
pytestmark = [pytest.mark.aot, pytest.mark.timeout(900)]


def recipe(name: str, *overrides: str) -> RunConfig:
    return apply_overrides(load_recipe(name), overrides)


def topology_of(run: RunConfig) -> Topology:
    assert run.partitioning.topology is not None
    return parse_topology(run.partitioning.topology)


def assert_sound(compiled: Compiled) -> None:
    """Accepted by XLA, and without an array that is gathered whole for want of a better way."""
    assert compiled.fits, compiled.words
    assert not compiled.complaints
    assert 0 < compiled.argument_bytes < compiled.peak_bytes <= compiled.limit_bytes
    assert compiled.buffers
    assert sum(buffer.bytes for buffer in compiled.buffers) <= 1.05 * compiled.peak_bytes


@pytest.mark.parametrize("name", ["smoke", "smoke:prefix_lm", "smoke:electra"])
def test_small_runs_of_each_kind_compile(name: str) -> None:
    run = recipe(name, "--partitioning.tensor", "2")
    compiled = compile_train_step(run, parse_topology("v5e:2x2"))
    assert_sound(compiled)
    assert compiled.mesh == {"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert {axis for each in compiled.collectives for axis in each.axes} == {"fsdp", "tensor"}
    assert all(each.slices == 1 for each in compiled.collectives)


def test_gathers_of_parameters_are_counted_in_every_layer() -> None:
    """Each parameter is gathered once in the forward pass and once in the backward pass: the bytes of both are those of
    all of them, twice, to what XLA keeps or gathers once more (tables, the head)."""
    run = recipe("smoke:decoder", "--model.remat", "full")
    compiled = compile_train_step(run, parse_topology("v5e:2x2"))
    program = assemble(run, compiler_devices(compiled.topology))
    layers = sum(x.size * 4 for x in jax.tree.leaves(program.abstract_params["decoder"]["layers"]))
    gathered = sum(each.bytes for each in compiled.collectives if each.kind in ("all-gather", "collective-permute"))
    everything = sum(x.size * 4 for x in jax.tree.leaves(program.abstract_params))
    assert 2 * layers <= gathered <= 3 * everything


def test_two_slices_sum_gradients_over_the_network() -> None:
    run = recipe("smoke:decoder", "--training.batch-size", "16")
    compiled = compile_train_step(run, parse_topology("v5e:2x2", num_slices=2))
    assert_sound(compiled)
    assert compiled.mesh["data"] == 2
    between = [each for each in compiled.collectives if each.slices == 2]
    assert {each.axes for each in between} == {("data",)}
    # Each device sends its share of the float32 gradient, a quarter of it, to the other slice; of small arrays XLA
    # sends more, rather than to split them first.
    program = assemble(run, compiler_devices(compiled.topology))
    share = sum(x.size * 4 for x in jax.tree.leaves(program.abstract_params)) / 4
    assert share <= sum(each.sent_between_slices for each in between) < 3 * share
    assert roofline(compiled).network > 0


def test_the_decode_step_holds_parameters_and_caches() -> None:
    run = recipe("smoke", "--partitioning.tensor", "2")
    topology = parse_topology("v5e:2x2")
    compiled = compile_decode_step(run, topology, rows=64, length=512)
    assert_sound(compiled)
    program = assemble(run, compiler_devices(topology))
    # Rows are split over fsdp and heads over tensor; tiles come on top.
    params = sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in jax.tree.leaves(program.abstract_params))
    caches = cache_bytes(run.model, rows=64, length=512, encoder_length=run.data.inputs_length) // 4
    assert params + caches <= compiled.argument_bytes <= 1.6 * (params + caches)
    assert roofline(compiled).compute > 0
    with pytest.raises(ConfigError, match="decoder"):
        compile_decode_step(recipe("smoke:encoder"), topology)


def test_an_oversized_run_is_refused_in_the_compilers_words(capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe("smoke:decoder", "--training.batch-size", "65536", "--model.remat", "none")
    compiled = compile_train_step(run, parse_topology("v5e:2x2"))
    assert not compiled.fits
    assert "Ran out of memory" in compiled.words
    assert compiled.room_bytes < 0
    assert compiled.buffers, "what takes the memory is told all the same"
    print_compiled(run, compiled, Console(width=200))
    said = capsys.readouterr().out
    assert "does not fit" in said and compiled.words.splitlines()[0][:60] in said
    knobs = said.partition("Three knobs to turn:")[2].strip().splitlines()
    assert len(knobs) == 3
    assert all(knob.strip().startswith("--") for knob in knobs)


def test_a_program_whose_shardings_cannot_be_reached_is_complained_of() -> None:
    """What the other tests assert to be absent is seen where it is."""
    run = recipe("smoke:decoder", "--training.batch-size", "8", "--partitioning.tensor", "2")
    topology = parse_topology("v5e:2x4")
    program = assemble(run, compiler_devices(topology))

    def place(x: Any, *axes: Any) -> Any:
        return jax.lax.with_sharding_constraint(x, NamedSharding(program.mesh, PartitionSpec(*axes)))

    def step(x: Any) -> Any:
        y = jnp.sin(place(2 * x, ("tensor", "fsdp"), None, None))
        return jnp.cos(place(y.reshape(8, 6, 16), None, "tensor", "fsdp"))

    lowered = jax.jit(step).lower(jax.ShapeDtypeStruct((16, 16, 3), jnp.float32))
    compiled = compile_lowered("train", lowered, program, topology, effort="low")
    assert compiled.complaints


def test_what_is_compiled_is_what_training_calls() -> None:
    """Two compilations of one run say the same, and a change of the run is seen."""
    run = recipe("smoke:decoder")
    topology = parse_topology("v5e:2x2")
    first, again = compile_train_step(run, topology), compile_train_step(run, topology)
    assert dataclasses.replace(first, seconds=0.0) == dataclasses.replace(again, seconds=0.0)
    half = dataclasses.replace(run, training=dataclasses.replace(run.training, gradient_accumulation_steps=2))
    assert compile_train_step(half, topology).peak_bytes < first.peak_bytes
