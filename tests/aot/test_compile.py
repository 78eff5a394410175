"""Programs compiled for TPUs without TPUs: what fits, what is refused, and the reports."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from t5x_like.config import AdamWConfig, MoEConfig, RunConfig
from t5x_like.config.overrides import apply_overrides
from t5x_like.config.recipes import load_recipe
from t5x_like.errors import ConfigError
from t5x_like.hardware.topologies import Topology, parse_topology
from t5x_like.planning.estimate.kv_cache_bytes import cache_bytes
from t5x_like.planning.estimate.memory import estimate
from t5x_like.planning.xla.aot_compile import CompiledStep, compile_lowered, compile_train_step
from t5x_like.planning.xla.aot_decode import compile_decode_step
from t5x_like.planning.xla.compile_report import print_compiled
from t5x_like.planning.xla.libtpu import compiler_devices
from t5x_like.planning.xla.roofline import roofline
from t5x_like.program import build_program

pytest.importorskip("libtpu")
pytestmark = [pytest.mark.aot, pytest.mark.timeout(900)]


def recipe(name: str, *overrides: str) -> RunConfig:
    return apply_overrides(load_recipe(name), overrides)


def topology_of(run: RunConfig) -> Topology:
    assert run.sharding.topology is not None
    return parse_topology(run.sharding.topology)


def with_adamw(run: RunConfig) -> RunConfig:
    """Return the run with AdamW: Muon exchanges layers for its products, and has one moment of a kernel."""
    return dataclasses.replace(run, training=dataclasses.replace(run.training, optimizer=AdamWConfig()))


def assert_compiles_cleanly(compiled: CompiledStep) -> None:
    """Assert that XLA accepts the program and does not warn of an array that is gathered as a whole."""
    assert compiled.fits, compiled.error
    assert not compiled.warnings
    assert 0 < compiled.argument_bytes < compiled.peak_bytes <= compiled.limit_bytes
    assert compiled.buffers
    assert sum(buffer.bytes for buffer in compiled.buffers) <= 1.05 * compiled.peak_bytes


@pytest.mark.parametrize("name", ["smoke", "smoke:prefix_lm", "smoke:electra"])
def test_small_runs_of_each_kind_compile(name: str) -> None:
    run = recipe(name, "--sharding.tensor", "2")
    compiled = compile_train_step(run, parse_topology("v5e:2x2"))
    assert_compiles_cleanly(compiled)
    assert compiled.mesh == {"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert {axis for each in compiled.collectives for axis in each.axes} == {"fsdp", "tensor"}
    assert all(each.slices == 1 for each in compiled.collectives)


def test_parameter_gathers_are_counted_in_every_layer() -> None:
    """Each parameter is gathered in the forward and in the backward pass, so the bytes are twice those of all
    parameters.

    XLA keeps or gathers again a few of them (tables, the head).
    """
    run = with_adamw(recipe("smoke:decoder", "--model.remat", "full"))
    compiled = compile_train_step(run, parse_topology("v5e:2x2"))
    program = build_program(run, compiler_devices(compiled.topology))
    layers = sum(x.size * 4 for x in jax.tree.leaves(program.abstract_params["decoder"]["layers"]))
    gathered = sum(each.bytes for each in compiled.collectives if each.kind in ("all-gather", "collective-permute"))
    everything = sum(x.size * 4 for x in jax.tree.leaves(program.abstract_params))
    assert 2 * layers <= gathered <= 3 * everything


def test_two_slices_sum_gradients_over_the_network() -> None:
    run = recipe("smoke:decoder", "--training.global-batch-size", "16", "--model.attention", "reference")
    compiled = compile_train_step(run, parse_topology("v5e:2x2", num_slices=2))
    assert_compiles_cleanly(compiled)
    assert compiled.mesh["data"] == 2
    between = [each for each in compiled.collectives if each.slices == 2]
    assert {each.axes for each in between} == {("data",)}
    # Each device sends its quarter of the float32 gradient to the other slice; small arrays XLA sends without
    # splitting them first.
    program = build_program(run, compiler_devices(compiled.topology))
    share = sum(x.size * 4 for x in jax.tree.leaves(program.abstract_params)) / 4
    assert share <= sum(each.sent_between_slices for each in between) < 3 * share
    assert roofline(compiled).network > 0


def test_experts_are_split_and_their_tokens_exchanged_by_all_to_all() -> None:
    """Each device holds a quarter of the experts. Only tokens and their results move, and only over that axis."""
    decoder = with_adamw(recipe("smoke:decoder", "--training.global-batch-size", "64", "--model.remat", "full"))
    assert decoder.model.decoder is not None
    stack = dataclasses.replace(decoder.model.decoder, experts=MoEConfig(num_experts=8))
    run = dataclasses.replace(decoder, model=dataclasses.replace(decoder.model, decoder=stack))
    topology = parse_topology("v5e:2x2")
    split, copied = (
        compile_train_step(
            apply_overrides(run, ["--sharding.expert", str(parts), "--sharding.data", str(4 // parts)]), topology
        )
        for parts in (4, 1)
    )
    for compiled in (split, copied):
        assert_compiles_cleanly(compiled)
    # Parameters and two moments of three quarters of the experts are on other devices.
    program = build_program(run, compiler_devices(topology))
    kernels = program.abstract_params["decoder"]["layers"]["mlp"]
    elsewhere = (
        sum(x.size * 4 * 3 for x in jax.tree.leaves({k: v for k, v in kernels.items() if k != "router"})) * 3 / 4
    )
    assert copied.argument_bytes - split.argument_bytes == pytest.approx(elsewhere, rel=0.05)
    assert split.peak_bytes < copied.peak_bytes
    exchanges = [each for each in split.collectives if each.kind == "all-to-all"]
    assert {each.axes for each in exchanges} == {("expert",)}
    assert not [each for each in copied.collectives if each.kind == "all-to-all"]
    # The states of the chosen tokens travel there and back in the forward pass, when it is computed again, and as
    # gradients. The buffers hold a quarter more than even routing needs.
    rows, length = program.batch_spec["main"]["decoder_input_tokens"].shape
    states = rows // 4 * length * 2 * stack.d_model * 4
    assert sum(each.bytes for each in exchanges) >= stack.num_layers * 6 * 1.25 * states
    # Experts are not gathered.
    gathered = sum(each.bytes for each in split.collectives if each.kind == "all-gather")
    assert gathered < elsewhere / 3


def test_decode_step_holds_parameters_and_caches() -> None:
    run = recipe("smoke", "--sharding.tensor", "2")
    topology = parse_topology("v5e:2x2")
    compiled = compile_decode_step(run, topology, rows=64, length=512)
    assert_compiles_cleanly(compiled)
    program = build_program(run, compiler_devices(topology))
    # Rows are split over fsdp and heads over tensor; the padding of tiles is added.
    params = sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in jax.tree.leaves(program.abstract_params))
    caches = cache_bytes(run.model, rows=64, length=512, encoder_length=run.data.inputs_length) // 4
    assert params + caches <= compiled.argument_bytes <= 1.6 * (params + caches)
    assert roofline(compiled).compute > 0
    with pytest.raises(ConfigError, match="decoder"):
        compile_decode_step(recipe("smoke:encoder"), topology)


def test_state_and_layer_inputs_move_to_the_host() -> None:
    """Arrays in host memory are not among the arguments on the devices, and are counted apart. With 8 layers Muon
    changes the shape of its state after it has been fetched."""
    topology = parse_topology("v5e:2x2")
    rows = ("--model.decoder.num-layers", "8", "--training.global-batch-size", "64", "--model.remat")
    device = recipe("smoke:decoder", *rows, "full")
    host = recipe("smoke:decoder", *rows, "offload", "--sharding.optimizer-state-memory", "host")
    compiled = {name: compile_train_step(run, topology) for name, run in (("device", device), ("host", host))}
    for each in compiled.values():
        assert each.fits and not each.warnings, each.error
    assert compiled["device"].host_bytes == 0
    planned = estimate(build_program(host, compiler_devices(topology))).host
    moved = compiled["device"].argument_bytes - compiled["host"].argument_bytes
    # The tiles of these small matrices are half padding on the devices.
    assert planned["optimizer state"] <= moved <= 2 * planned["optimizer state"]
    assert compiled["host"].host_bytes >= moved
    assert compiled["host"].peak_bytes < compiled["device"].peak_bytes


def test_oversized_run_is_refused_with_xlas_error(capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe("smoke:decoder", "--training.global-batch-size", "65536", "--model.remat", "none")
    compiled = compile_train_step(run, parse_topology("v5e:2x2"))
    assert not compiled.fits
    assert "Ran out of memory" in compiled.error
    assert compiled.free_bytes < 0
    assert compiled.buffers, "buffers are reported for a refused program as well"
    print_compiled(run, compiled, Console(width=200))
    output = capsys.readouterr().out
    assert "does not fit" in output and compiled.error.splitlines()[0][:60] in output
    suggestions = output.partition("Change one of:")[2].strip().splitlines()
    assert len(suggestions) == 3
    assert all(suggestion.strip().startswith("--") for suggestion in suggestions)


def test_inefficient_resharding_gives_a_warning() -> None:
    """The warning that the other tests assert to be absent is detected in a program that has it."""
    run = recipe("smoke:decoder", "--training.global-batch-size", "8", "--sharding.tensor", "2")
    topology = parse_topology("v5e:2x4")
    program = build_program(run, compiler_devices(topology))

    def constrain(x: Any, *axes: Any) -> Any:
        return jax.lax.with_sharding_constraint(x, NamedSharding(program.mesh, PartitionSpec(*axes)))

    def step(x: Any) -> Any:
        y = jnp.sin(constrain(2 * x, ("tensor", "fsdp"), None, None))
        return jnp.cos(constrain(y.reshape(8, 6, 16), None, "tensor", "fsdp"))

    lowered = jax.jit(step).lower(jax.ShapeDtypeStruct((16, 16, 3), jnp.float32))
    compiled = compile_lowered("train", lowered, program, topology, effort="low")
    assert compiled.warnings


def test_compilation_is_deterministic_and_depends_on_the_run() -> None:
    """Two compilations of one run give the same report, and a change of the run changes it."""
    run = recipe("smoke:decoder")
    topology = parse_topology("v5e:2x2")
    first, again = compile_train_step(run, topology), compile_train_step(run, topology)
    assert dataclasses.replace(first, seconds=0.0) == dataclasses.replace(again, seconds=0.0)
    half = dataclasses.replace(run, training=dataclasses.replace(run.training, gradient_accumulation_steps=2))
    assert compile_train_step(half, topology).peak_bytes < first.peak_bytes
