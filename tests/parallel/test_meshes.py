"""The same loss and gradients on every mesh, with parameters and optimizer state really split."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from programs import ARCHITECTURES, ROWS, batch_for, run_for

from t5x_like.config import Adafactor, LoraConfig, PartitioningConfig, RunConfig
from t5x_like.config.batch import ArraySpec
from t5x_like.monitoring.metrics import value
from t5x_like.partitioning.mesh import make_mesh
from t5x_like.program import Program, assemble

Tree = Any

ONE_DEVICE = PartitioningConfig(fsdp=1)
MESHES = {
    "fsdp": PartitioningConfig(fsdp=8),
    "data_tensor": PartitioningConfig(data=2, fsdp=1, tensor=4),
    "data_fsdp_tensor": PartitioningConfig(data=2, fsdp=2, tensor=2),
}
QUERY_SHARDS = {"fsdp": (2, 8, 4, 16), "data_tensor": (2, 64, 1, 16), "data_fsdp_tensor": (2, 32, 2, 16)}
SHARE_PER_DEVICE = {"fsdp": 0.15, "data_tensor": 0.31, "data_fsdp_tensor": 0.28}
"""Upper bound on what a device holds of all parameters: an eighth or a quarter, and the few that are split over one
axis only or not at all (norms, biases, key heads that are fewer than the tensor degree)."""
COMPLAINT = "Involuntary full rematerialization"


@functools.cache
def start(architecture: str) -> Tree:
    """The training state before the first step, on the host."""
    return jax.tree.map(np.asarray, assembled(run_for(architecture, ONE_DEVICE)).init())


@functools.cache
def one_device(architecture: str) -> tuple[Tree, Tree]:
    """State and metrics after a step on one device."""
    return step_on(run_for(architecture, ONE_DEVICE), start(architecture))


def assembled(run: RunConfig) -> Program:
    return assemble(run, jax.devices()[: 1 if run.partitioning == ONE_DEVICE else 8])


def place(program: Program, state: Tree) -> Tree:
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state))


def step_on(run: RunConfig, state: Tree, batch: Tree | None = None) -> tuple[Tree, Tree]:
    program = assembled(run)
    return program.train_step(place(program, state), program.put(batch_for(run) if batch is None else batch))


def shard_shape(x: jax.Array) -> tuple[int, ...]:
    """The shape of what each device really holds."""
    (shape,) = {shard.data.shape for shard in x.addressable_shards}
    return shape


def query_kernel(tree: Tree) -> jax.Array:
    return tree["encoder" if "encoder" in tree else "decoder"]["layers"]["self_attention"]["query"]["kernel"]


def assert_same(found: Tree, expected: Tree, tolerance: float = 1e-5) -> None:
    """Equal to rounding at the scale of the whole tree: some gradients, as those of key biases, are 0 by symmetry."""
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=tolerance * scale), found, expected)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_do_not_depend_on_the_mesh(
    architecture: str, mesh: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Adam's first moment after one step is a tenth of the gradient."""
    expected_state, expected = one_device(architecture)
    capfd.readouterr()
    state, metrics = step_on(run_for(architecture, MESHES[mesh]), start(architecture))
    assert COMPLAINT not in capfd.readouterr().err
    assert value(metrics["loss"]) == pytest.approx(value(expected["loss"]), rel=1e-5)
    assert value(metrics["gradient_norm"]) == pytest.approx(value(expected["gradient_norm"]), rel=1e-4)
    assert_same(state["opt_state"].mu, expected_state["opt_state"].mu)

    params, first_moment = state["params"], state["opt_state"].mu
    assert shard_shape(query_kernel(params)) == shard_shape(query_kernel(first_moment)) == QUERY_SHARDS[mesh]
    for tree in (params, first_moment, state["opt_state"].nu):
        leaves = jax.tree.leaves(tree)
        assert sum(np.prod(shard_shape(x)) for x in leaves) <= SHARE_PER_DEVICE[mesh] * sum(x.size for x in leaves)


@pytest.mark.parametrize("mesh", [PartitioningConfig(data=2, fsdp=2, expert=2), PartitioningConfig(fsdp=2, tensor=4)])
def test_experts_are_split_over_their_axis(mesh: PartitioningConfig, capfd: pytest.CaptureFixture[str]) -> None:
    expected_state, expected = one_device("experts")
    capfd.readouterr()
    state, metrics = step_on(run_for("experts", mesh), start("experts"))
    assert COMPLAINT not in capfd.readouterr().err
    for name in ("loss", "load_balancing/decoder"):
        assert value(metrics[name]) == pytest.approx(value(expected[name]), rel=1e-5)
    assert 1.9 < value(metrics["load_balancing/decoder"]) < 4
    assert_same(state["opt_state"].mu, expected_state["opt_state"].mu)
    kernel = state["params"]["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert shard_shape(kernel) == (2, 4 // mesh.expert, 64 // mesh.fsdp, 128 // mesh.tensor)


def test_kinds_of_layers_and_merged_attention_do_not_depend_on_the_mesh() -> None:
    expected_state, expected = one_device("merged")
    state, metrics = step_on(run_for("merged", MESHES["data_fsdp_tensor"]), start("merged"))
    assert value(metrics["loss"]) == pytest.approx(value(expected["loss"]), rel=1e-5)
    assert_same(state["opt_state"].mu, expected_state["opt_state"].mu)


def test_adafactor_keeps_its_factors_where_the_parameter_is() -> None:
    optimizer = Adafactor(min_dim_size_to_factor=16)
    state = None
    results = []
    for partitioning in (ONE_DEVICE, MESHES["data_fsdp_tensor"]):
        run = run_for("decoder", partitioning, optimizer=optimizer)
        program = assembled(run)
        if state is None:
            state = jax.tree.map(np.asarray, program.init())
        placed = place(program, state)
        for seed in range(2):
            placed, _ = program.train_step(placed, program.put(batch_for(run, seed)))
        results.append(placed)
    assert_same(results[1]["params"], results[0]["params"])
    moments = query_kernel(results[1]["opt_state"]["second_moment"])
    assert shard_shape(moments["v_row"]) == (2, 32) and shard_shape(moments["v_col"]) == (2, 2, 16)


def test_accumulated_parts_are_split_evenly_and_give_the_result_of_the_whole_batch() -> None:
    expected_state, expected = one_device("decoder")
    run = run_for("decoder", MESHES["fsdp"], gradient_accumulation_steps=2)
    program = assembled(run)
    state, batch = place(program, start("decoder")), program.put(batch_for(run))
    step = program.train_step.lower(state, batch).compile()
    state, metrics = step(state, batch)
    assert value(metrics["loss"]) == pytest.approx(value(expected["loss"]), rel=1e-5)
    assert_same(state["opt_state"].mu, expected_state["opt_state"].mu)

    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(program.batch_spec))
    text = program.train_step.lower(program.abstract_state, batch).compile().as_text()
    carried = [
        shape for line in text.splitlines() if " while(" in line for shape in re.findall(r"\w\d+\[([\d,]*)\]", line)
    ]
    assert "2,1,32" in carried, "two parts of one row of 32 tokens on each of eight devices"
    assert f"{ROWS // 2},32" not in carried
    assert "2,8,128" in carried and "2,64,128" not in carried, "gradients are accumulated in shards"


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sub_batches_are_one_padded_batch(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the rows in a sub-batch of half the length, on a mesh, against all of them in one on one device."""
    half, rows = 16, ROWS // 2
    batch = {name: np.array(x) for name, x in batch_for(run_for("decoder", ONE_DEVICE))["main"].items()}
    for feature in (x for x in batch.values() if x.ndim == 2):
        feature[rows:, half:] = 0
    expected_state, expected = step_on(run_for("decoder", ONE_DEVICE), start("decoder"), {"main": batch})

    short = {name: x[rows:, :half] if x.ndim == 2 else x[rows:] for name, x in batch.items()}
    split = {"main": {name: x[:rows] for name, x in batch.items()}, "short": short}
    run = run_for("decoder", MESHES["data_fsdp_tensor"], gradient_accumulation_steps=parts)
    shapes = jax.tree.map(lambda x: ArraySpec(x.shape, "int32"), split)
    monkeypatch.setattr("t5x_like.program.batch_spec", lambda run: shapes)
    state, metrics = step_on(run, start("decoder"), split)
    for name in ("loss", "loss_tokens", "gradient_norm", "accuracy"):
        assert value(metrics[name]) == pytest.approx(value(expected[name]), rel=1e-4)
    assert_same(state["opt_state"].mu, expected_state["opt_state"].mu)


@pytest.mark.parametrize("mesh", [pytest.param("fsdp", marks=pytest.mark.slow), "data_fsdp_tensor"])
def test_generator_and_discriminator_do_not_depend_on_the_mesh(mesh: str) -> None:
    """The same samples, losses and gradients; the discriminator's are fifty times as large, so that one sample that
    were another would be seen."""
    expected_state, expected = one_device("electra")
    state, metrics = step_on(run_for("electra", MESHES[mesh]), start("electra"))
    for name in ("loss", "discriminator/loss", "gradient_norm"):
        assert value(metrics[name]) == pytest.approx(value(expected[name]), rel=1e-4)
    for name in ("discriminator/replaced", "discriminator/accuracy", "discriminator/recall"):
        assert float(metrics[name].sum) == float(expected[name].sum)
    assert_same(state["opt_state"].mu, expected_state["opt_state"].mu)
    assert shard_shape(query_kernel(state["params"]["generator"]))[1] < 32


def test_fresh_parameters_and_evaluation_do_not_depend_on_the_mesh() -> None:
    run = run_for("decoder", MESHES["data_fsdp_tensor"])
    program = assembled(run)
    state = program.init()
    jax.tree.map(np.testing.assert_array_equal, state, start("decoder"))
    # As a step gives them back: else the second step would be compiled anew.
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    assert shard_shape(query_kernel(state["params"])) == QUERY_SHARDS["data_fsdp_tensor"]
    metrics = program.eval_step(state["params"], program.put(batch_for(run)))
    assert value(metrics["loss"]) == pytest.approx(value(one_device("decoder")[1]["loss"]), rel=1e-5)


def test_the_complaint_that_these_tests_look_for_is_made_and_seen(capfd: pytest.CaptureFixture[str]) -> None:
    """From columns split over an axis to rows split over it and another one: what looking up rows in a table whose
    columns are split over fsdp would ask for."""
    mesh = make_mesh(MESHES["data_fsdp_tensor"], jax.devices())
    columns = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, None))
    x = jax.ShapeDtypeStruct((16, 16, 64), jnp.float32, sharding=columns)
    jax.jit(lambda x: jax.lax.with_sharding_constraint(2 * x, rows)).lower(x).compile()
    assert COMPLAINT in capfd.readouterr().err


def moved(tree: Tree) -> Tree:
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), tree)


@pytest.mark.parametrize("architecture", ["decoder", pytest.param("experts", marks=pytest.mark.slow)])
def test_adapters_are_split_as_their_kernels_and_learn_the_same_on_every_mesh(architecture: str) -> None:
    lora = LoraConfig(base="base", rank=3, paths=(".*/layers/.*kernel",))
    mesh = PartitioningConfig(fsdp=4, expert=2) if architecture == "experts" else PartitioningConfig(fsdp=4, tensor=2)
    base = start(architecture)["params"]
    found = []
    for partitioning in (ONE_DEVICE, mesh):
        program = assembled(run_for(architecture, partitioning, lora=lora))
        state = jax.tree.map(np.asarray, assembled(run_for(architecture, ONE_DEVICE, lora=lora)).init())
        state["params"] = moved(state["params"])
        frozen = jax.device_put(base, jax.tree.map(lambda leaf: leaf.sharding, program.abstract_base))
        batch = program.put(batch_for(program.run))
        after, metrics = program.train_step(place(program, state) | {"base": frozen}, batch)
        found.append(jax.tree.map(np.asarray, (after["opt_state"], metrics)))
        jax.tree.map(np.testing.assert_array_equal, after["base"], base)
    # The moments, which are the gradients: Adam's direction is that of rounding errors where a gradient is nearly zero.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()), *found)
    # Of the last mesh: A [layers, embed, rank] and B [layers, rank, heads, head_dim] lie where the kernel's axes do.
    query = query_kernel(after["params"])
    tensor = program.mesh.shape["tensor"]
    assert shard_shape(query["lora_a"]) == (2, 64 // 4, 3)
    assert shard_shape(query["lora_b"]) == (2, 3, 4 // tensor, 16)
    if architecture == "experts":
        assert shard_shape(after["params"]["decoder"]["layers"]["mlp"]["wo"]["kernel"]["lora_a"])[1] == 2
