"""Loss and gradients are the same on every mesh, and parameters and optimizer state are split."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parallel_programs import ARCHITECTURES, ROWS, batch_for, run_for
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config import AdafactorConfig, LoraConfig, RunConfig, ShardingConfig
from t5x_like.config.batch_spec import ArraySpec
from t5x_like.monitoring.metrics import compute
from t5x_like.program import Program, build_program
from t5x_like.sharding.mesh import make_mesh
from t5x_like.utils.type_aliases import PyTree

ONE_DEVICE = ShardingConfig(fsdp=1)
MESHES = {
    "fsdp": ShardingConfig(fsdp=8),
    "data_tensor": ShardingConfig(data=2, fsdp=1, tensor=4),
    "data_fsdp_tensor": ShardingConfig(data=2, fsdp=2, tensor=2),
}
QUERY_SHARDS = {"fsdp": (2, 8, 4, 16), "data_tensor": (2, 64, 1, 16), "data_fsdp_tensor": (2, 32, 2, 16)}
SHARE_PER_DEVICE = {"fsdp": 0.15, "data_tensor": 0.31, "data_fsdp_tensor": 0.28}
"""Upper bound on the fraction of all parameters on a device: an eighth or a quarter, and those few that are split over
one axis only or not at all (norms, biases, key heads that are fewer than the tensor degree)."""
RESHARDING_WARNING = "Involuntary full rematerialization"


@functools.cache
def start(architecture: str) -> PyTree:
    """Return the training state before the first step, on the host."""
    return jax.tree.map(np.asarray, program_for(run_for(architecture, ONE_DEVICE)).init())


@functools.cache
def one_device(architecture: str) -> tuple[PyTree, PyTree]:
    """Return state and metrics after a step on one device."""
    return step_on(run_for(architecture, ONE_DEVICE), start(architecture))


def program_for(run: RunConfig) -> Program:
    return build_program(run, jax.devices()[: 1 if run.sharding == ONE_DEVICE else 8])


def place(program: Program, state: PyTree) -> PyTree:
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state))


def step_on(run: RunConfig, state: PyTree, batch: PyTree | None = None) -> tuple[PyTree, PyTree]:
    program = program_for(run)
    return program.train_step(place(program, state), program.shard_batch(batch_for(run) if batch is None else batch))


def shard_shape(x: jax.Array) -> tuple[int, ...]:
    """Return the shape of the shard that each device holds."""
    (shape,) = {shard.data.shape for shard in x.addressable_shards}
    return shape


def query_kernel(tree: PyTree) -> jax.Array:
    return tree["encoder" if "encoder" in tree else "decoder"]["layers"]["self_attention"]["query"]["kernel"]


def assert_same(actual: PyTree, expected: PyTree, tolerance: float = 1e-5) -> None:
    """Assert equality up to rounding at the scale of the whole tree: some gradients (key biases) are 0 by symmetry."""
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=tolerance * scale), actual, expected)


@pytest.mark.parametrize(
    "mesh", ["data_fsdp_tensor", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "data_tensor"))]
)
@pytest.mark.parametrize(
    "architecture",
    [name if name == "encoder_decoder" else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES],
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(
    architecture: str, mesh: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Adam's first moment after one step is a tenth of the gradient."""
    expected_state, expected = one_device(architecture)
    capfd.readouterr()
    state, metrics = step_on(run_for(architecture, MESHES[mesh]), start(architecture))
    assert RESHARDING_WARNING not in capfd.readouterr().err
    assert compute(metrics["loss"]) == pytest.approx(compute(expected["loss"]), rel=1e-5)
    assert compute(metrics["grad_norm"]) == pytest.approx(compute(expected["grad_norm"]), rel=1e-4)
    assert_same(state["opt_state"].mu, expected_state["opt_state"].mu)

    params, first_moment = state["params"], state["opt_state"].mu
    assert shard_shape(query_kernel(params)) == shard_shape(query_kernel(first_moment)) == QUERY_SHARDS[mesh]
    for tree in (params, first_moment, state["opt_state"].nu):
        leaves = jax.tree.leaves(tree)
        assert sum(np.prod(shard_shape(x)) for x in leaves) <= SHARE_PER_DEVICE[mesh] * sum(x.size for x in leaves)


@pytest.mark.slow
def test_loss_in_chunks_does_not_depend_on_the_mesh(capfd: pytest.CaptureFixture[str]) -> None:
    """A tied table, which the lookups read as well, against whole logits on one device."""
    expected_state, expected = one_device("prefix_lm")
    capfd.readouterr()
    run = run_for("prefix_lm", MESHES["data_fsdp_tensor"], loss_chunk_tokens=16)
    state, metrics = step_on(run, start("prefix_lm"))
    assert RESHARDING_WARNING not in capfd.readouterr().err
    for name in ("loss", "accuracy", "grad_norm"):
        assert compute(metrics[name]) == pytest.approx(compute(expected[name]), rel=1e-4)
    assert_same(state["opt_state"].mu, expected_state["opt_state"].mu)


@pytest.mark.parametrize(
    "mesh",
    [
        ShardingConfig(data=2, fsdp=2, expert=2),
        ShardingConfig(fsdp=2, tensor=4),
    ],
)
@pytest.mark.slow
def test_experts_are_split_over_their_axis(mesh: ShardingConfig, capfd: pytest.CaptureFixture[str]) -> None:
    expected_state, expected = one_device("balanced_experts")
    capfd.readouterr()
    state, metrics = step_on(run_for("balanced_experts", mesh), start("balanced_experts"))
    assert RESHARDING_WARNING not in capfd.readouterr().err
    for name in ("loss", "moe/aux_loss/decoder"):
        assert compute(metrics[name]) == pytest.approx(compute(expected[name]), rel=1e-5)
    assert 1.9 < compute(metrics["moe/aux_loss/decoder"]) < 4
    # Biases of routers have no gradient, so that the optimizer's state is that of the other parameters.
    (moments,), (expected_moments,) = state["opt_state"].values(), expected_state["opt_state"].values()
    assert_same(moments.mu, expected_moments.mu)
    experts, expected_experts = (tree["params"]["decoder"]["layers"]["mlp"] for tree in (state, expected_state))
    np.testing.assert_array_equal(experts["router_bias"], expected_experts["router_bias"])
    assert np.any(expected_experts["router_bias"])
    kernel = experts["wi_0"]["kernel"]
    assert shard_shape(kernel) == (2, 4 // mesh.expert, 64 // mesh.fsdp, 128 // mesh.tensor)


@pytest.mark.parametrize("structure", ["merged", "blocks", "gated"])
@pytest.mark.slow
def test_structures_do_not_depend_on_the_mesh(structure: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Merged attention over kinds of layers; sums of blocks and experts in some layers; gates and weights of depths."""
    expected_state, expected = one_device(structure)
    capfd.readouterr()
    state, metrics = step_on(run_for(structure, MESHES["data_fsdp_tensor"]), start(structure))
    assert RESHARDING_WARNING not in capfd.readouterr().err
    assert compute(metrics["loss"]) == pytest.approx(compute(expected["loss"]), rel=1e-5)
    assert_same(state["opt_state"].mu, expected_state["opt_state"].mu)


@pytest.mark.slow
def test_adafactor_factors_are_sharded_like_their_parameter() -> None:
    optimizer = AdafactorConfig(min_dim_size_to_factor=16)
    state = None
    results = []
    for sharding in (ONE_DEVICE, MESHES["data_fsdp_tensor"]):
        run = run_for("decoder", sharding, optimizer=optimizer)
        program = program_for(run)
        if state is None:
            state = jax.tree.map(np.asarray, program.init())
        placed = place(program, state)
        for seed in range(2):
            placed, _ = program.train_step(placed, program.shard_batch(batch_for(run, seed)))
        results.append(placed)
    assert_same(results[1]["params"], results[0]["params"])
    moments = query_kernel(results[1]["opt_state"]["second_moment"])
    assert shard_shape(moments["v_row"]) == (2, 32) and shard_shape(moments["v_col"]) == (2, 2, 16)


@pytest.mark.slow
def test_accumulation_parts_are_split_evenly_and_give_the_result_of_the_whole_batch() -> None:
    expected_state, expected = one_device("decoder")
    run = run_for("decoder", MESHES["fsdp"], gradient_accumulation_steps=2)
    program = program_for(run)
    state, batch = place(program, start("decoder")), program.shard_batch(batch_for(run))
    step = program.train_step.lower(state, batch).compile()
    state, metrics = step(state, batch)
    assert compute(metrics["loss"]) == pytest.approx(compute(expected["loss"]), rel=1e-5)
    assert_same(state["opt_state"].mu, expected_state["opt_state"].mu)

    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(program.batch_spec))
    text = program.train_step.lower(program.abstract_state, batch).compile().as_text()
    carried = [
        shape for line in text.splitlines() if " while(" in line for shape in re.findall(r"\w\d+\[([\d,]*)\]", line)
    ]
    assert "2,1,32" in carried, "two parts of one row of 32 tokens on each of eight devices"
    assert f"{ROWS // 2},32" not in carried
    assert "2,8,128" in carried and "2,64,128" not in carried, "gradients are accumulated in shards"


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_sub_batches_give_the_result_of_one_padded_batch(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the rows in a sub-batch of half the length on a mesh, compared with one batch on one device."""
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
    for name in ("loss", "loss_tokens", "grad_norm", "accuracy"):
        assert compute(metrics[name]) == pytest.approx(compute(expected[name]), rel=1e-4)
    assert_same(state["opt_state"].mu, expected_state["opt_state"].mu)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp", "data_fsdp_tensor"])
def test_generator_and_discriminator_do_not_depend_on_the_mesh(mesh: str) -> None:
    """Samples, losses and gradients are the same.

    The discriminator's loss is fifty times as large, so that a single different sample would be noticed.
    """
    expected_state, expected = one_device("electra")
    state, metrics = step_on(run_for("electra", MESHES[mesh]), start("electra"))
    for name in ("loss", "discriminator/loss", "grad_norm"):
        assert compute(metrics[name]) == pytest.approx(compute(expected[name]), rel=1e-4)
    for name in ("discriminator/replaced", "discriminator/accuracy", "discriminator/recall"):
        assert float(metrics[name].sum) == float(expected[name].sum)
    assert_same(state["opt_state"].mu, expected_state["opt_state"].mu)
    assert shard_shape(query_kernel(state["params"]["generator"]))[1] < 32


def test_initial_parameters_and_evaluation_do_not_depend_on_the_mesh() -> None:
    run = run_for("decoder", MESHES["data_fsdp_tensor"])
    program = program_for(run)
    state = program.init()
    jax.tree.map(np.testing.assert_array_equal, state, start("decoder"))
    # Not weakly typed, as in the state that a step returns: otherwise the second step would be compiled again.
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    assert shard_shape(query_kernel(state["params"])) == QUERY_SHARDS["data_fsdp_tensor"]
    metrics = program.eval_step(state["params"], program.shard_batch(batch_for(run)))
    assert compute(metrics["loss"]) == pytest.approx(compute(one_device("decoder")[1]["loss"]), rel=1e-5)


def test_inefficient_resharding_gives_the_warning_that_other_tests_forbid(capfd: pytest.CaptureFixture[str]) -> None:
    """Reshard from columns split over an axis to rows split over it and another axis.

    Looking up rows in a table whose columns are split over fsdp would need this.
    """
    mesh = make_mesh(MESHES["data_fsdp_tensor"], jax.devices())
    columns = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, None))
    x = jax.ShapeDtypeStruct((16, 16, 64), jnp.float32, sharding=columns)
    jax.jit(lambda x: jax.lax.with_sharding_constraint(2 * x, rows)).lower(x).compile()
    assert RESHARDING_WARNING in capfd.readouterr().err


def perturbed(tree: PyTree) -> PyTree:
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), tree)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["decoder", "experts"])
def test_adapters_are_split_as_their_kernels_and_train_the_same_on_every_mesh(architecture: str) -> None:
    lora = LoraConfig(base="base", rank=3, paths=(".*/layers/.*kernel",))
    mesh = ShardingConfig(fsdp=4, expert=2) if architecture == "experts" else ShardingConfig(fsdp=4, tensor=2)
    base = start(architecture)["params"]
    results = []
    for sharding in (ONE_DEVICE, mesh):
        program = program_for(run_for(architecture, sharding, lora=lora))
        state = jax.tree.map(np.asarray, program_for(run_for(architecture, ONE_DEVICE, lora=lora)).init())
        state["params"] = perturbed(state["params"])
        frozen = jax.device_put(base, jax.tree.map(lambda leaf: leaf.sharding, program.abstract_base_params))
        batch = program.shard_batch(batch_for(program.run))
        after, metrics = program.train_step(place(program, state) | {"base": frozen}, batch)
        results.append(jax.tree.map(np.asarray, (after["opt_state"], metrics)))
        jax.tree.map(np.testing.assert_array_equal, after["base"], base)
    # Compare the moments, which are the gradients: for a gradient near zero, Adam's update is dominated by rounding
    # errors.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()), *results)
    # On the last mesh, A [layers, embed, rank] and B [layers, rank, heads, head_dim] are split as the kernel's axes
    # are.
    query = query_kernel(after["params"])
    tensor = program.mesh.shape["tensor"]
    assert shard_shape(query["lora_a"]) == (2, 64 // 4, 3)
    assert shard_shape(query["lora_b"]) == (2, 3, 4 // tensor, 16)
    if architecture == "experts":
        assert shard_shape(after["params"]["decoder"]["layers"]["mlp"]["wo"]["kernel"]["lora_a"])[1] == 2
