"""Meshes, rules, shardings and the checks before compilation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from t5x_like.config import (
    CausalLM,
    DataConfig,
    DcnConfig,
    ModelConfig,
    RunConfig,
    ShardingConfig,
    TrainingConfig,
)
from t5x_like.errors import ConfigError
from t5x_like.sharding import rules, validation
from t5x_like.sharding.constrain import activation_context, constrain
from t5x_like.sharding.mesh import make_mesh
from t5x_like.sharding.shardings import batch_shardings, tree_shardings


def mesh_of(**degrees: int) -> Mesh:
    return make_mesh(ShardingConfig(**{"fsdp": 1, **degrees}), jax.devices())


def run_with(**changes: Any) -> RunConfig:
    training = TrainingConfig(num_train_steps=1, global_batch_size=changes.pop("global_batch_size", 16), **changes)
    data = DataConfig(layout="causal_lm", mixture=(CausalLM(),), inputs_length=0, targets_length=8)
    model = ModelConfig(encoder=None, decoder=None, vocab_size=8)
    return RunConfig(name="t", model=model, data=data, training=training)


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_minus_one_is_filled_in_and_axes_are_auto() -> None:
    mesh = mesh_of(data=2, fsdp=-1)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert len(set(mesh.devices.flat)) == 8


@pytest.mark.parametrize(
    ("degrees", "messages"),
    [
        ({"data": 3}, ["data=3 x fsdp=1", "product 3", "number of devices, 8"]),
        ({"data": 3, "fsdp": -1}, ["product 3", "divides the number of devices, 8"]),
        ({"data": -1, "fsdp": -1}, ["-1 for data and fsdp"]),
        ({"tensor": 0, "data": -3}, ["sharding.tensor: found 0", "sharding.data: found -3"]),
    ],
)
def test_degrees_with_a_wrong_product_are_refused(degrees: dict[str, int], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        mesh_of(**degrees)
    assert all(words in str(error.value) for words in messages), str(error.value)


@dataclasses.dataclass(frozen=True)
class Simulated:
    """Attributes of a device that a mesh reads."""

    id: int
    slice_index: int | None
    process_index: int = 0
    platform: str = "simulated"
    device_kind: str = "none"


def ids(mesh: Mesh) -> Any:
    return jax.tree.map(lambda device: device.id, mesh.devices.tolist())


def test_slices_are_outermost_in_each_axis() -> None:
    """Devices of a slice are scattered over the list, as a scheduler may assign them."""
    devices = [Simulated(id=10 * (n % 2) + n // 2, slice_index=n % 2) for n in range(8)]
    config = ShardingConfig(fsdp=-1, tensor=2)
    mesh = make_mesh(config, devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert ids(mesh) == [[[[[0, 1]]], [[[2, 3]]]], [[[[10, 11]]], [[[12, 13]]]]], "slices are copies by default"

    mesh = make_mesh(dataclasses.replace(config, dcn=DcnConfig(data=1, fsdp=2)), devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}
    assert ids(mesh) == [[[[[0, 1]]], [[[2, 3]]], [[[10, 11]]], [[[12, 13]]]]]


def test_groups_of_devices_without_slice_index_stand_for_slices() -> None:
    def mesh_with(**degrees: int) -> Mesh:
        return make_mesh(ShardingConfig(fsdp=-1, tensor=2, dcn=DcnConfig(**degrees)), jax.devices())

    assert dict(mesh_with().shape)["data"] == 1, "without degrees between slices, all devices are one slice"
    assert dict(mesh_with(data=2).shape) == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert ids(mesh_with(data=2)) == [[[[[0, 1]]], [[[2, 3]]]], [[[[4, 5]]], [[[6, 7]]]]]
    assert ids(mesh_with(data=1, tensor=2)) == [[[[[0, 1, 4, 5]]], [[[2, 3, 6, 7]]]]]


def test_devices_without_slice_index_are_grouped_by_process() -> None:
    devices = [Simulated(n, slice_index=None, process_index=n % 2) for n in range(4)]
    mesh = make_mesh(ShardingConfig(dcn=DcnConfig(data=2)), devices)
    assert ids(mesh) == [[[[[0]]], [[[2]]]], [[[[1]]], [[[3]]]]]


@pytest.mark.parametrize(
    ("dcn", "messages"),
    [
        ({"data": 3}, ["sharding.dcn: found data=3", "product 3", "is the number of slices, 2"]),
        ({"data": 1}, ["product 1", "number of slices, 2", "-1"]),
        ({"fsdp": -1}, ["-1 for data and fsdp"]),
        ({"data": 3, "fsdp": -1}, ["product 3", "divides the number of slices, 2"]),
        ({"data": 0}, ["sharding.dcn.data: found 0"]),
    ],
)
def test_degrees_between_slices_with_a_wrong_product_are_refused(dcn: dict[str, int], messages: list[str]) -> None:
    devices = [Simulated(n, n // 4) for n in range(8)]
    with pytest.raises(ConfigError) as error:
        make_mesh(ShardingConfig(dcn=DcnConfig(**dcn)), devices)
    assert all(words in str(error.value) for words in messages), str(error.value)


def test_slices_of_different_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 in slice_index 0, 3 in slice_index 1"):
        make_mesh(ShardingConfig(), [Simulated(n, min(n, 1)) for n in range(4)])
    with pytest.raises(ConfigError, match="3 devices in 2 slices"):
        make_mesh(ShardingConfig(), [Simulated(n, n % 2) for n in range(3)])
    with pytest.raises(ConfigError, match="devices in each of 2 slices, 4"):
        make_mesh(ShardingConfig(tensor=3), [Simulated(n, n % 2) for n in range(8)])


def test_logical_axis_in_several_pairs_is_split_over_all_their_mesh_axes() -> None:
    table = rules.default_rules(ShardingConfig(parameter_rules=(("mlp", "fsdp"), ("mlp", "tensor"), ("embed", None))))
    found = rules.spec(("embed", "mlp"), table.parameters, (8, 16), mesh_of(fsdp=4, tensor=2))
    assert found == PartitionSpec(None, ("fsdp", "tensor"))


def test_fsdp_splits_parameters_by_embed_and_activations_by_rows_only() -> None:
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    table = rules.default_rules(ShardingConfig())
    query = ("layers", "embed", "heads", "head_dim")
    assert rules.spec(query, table.parameters, (4, 64, 4, 16), mesh) == PartitionSpec(None, "fsdp", "tensor", None)
    hidden = ("batch", "length", "embed")
    assert rules.spec(hidden, table.activations, (8, 16, 64), mesh) == PartitionSpec(("data", "fsdp"), None, None)


def test_mesh_axis_of_size_one_is_left_out() -> None:
    table = rules.default_rules(ShardingConfig())
    assert rules.spec(("batch",), table.activations, (8,), mesh_of(fsdp=8)) == PartitionSpec("fsdp")


def test_rule_overrides_take_precedence_and_are_checked() -> None:
    table = rules.default_rules(ShardingConfig(parameter_rules=(("embed", None), ("mlp", "fsdp"))))
    assert rules.spec(("embed", "mlp"), table.parameters, (8, 16), mesh_of(fsdp=8)) == PartitionSpec(None, "fsdp")
    with pytest.raises(ConfigError) as error:
        rules.default_rules(ShardingConfig(parameter_rules=(("embd", "fsdp"),), activation_rules=(("mlp", "tp"),)))
    assert "'embd'" in str(error.value) and "'tp'" in str(error.value)


def test_tree_shardings_lists_every_problem() -> None:
    mesh = mesh_of(fsdp=2, tensor=4)
    table = rules.default_rules(ShardingConfig(parameter_rules=(("norm", "tensor"),)))
    axes = {"a": ("embed", "mlp"), "b": ("colour",), "c": ("heads", "norm"), "d": ("embed", "kv_heads")}
    arrays = {"a": shape(3, 6), "b": shape(2), "c": shape(4, 8), "d": shape(4, 2)}
    with pytest.raises(ConfigError) as error:
        tree_shardings(mesh, table, axes, arrays)
    text = str(error.value)
    assert "a, axis embed: found 3, expected a multiple of 2 (fsdp=2)" in text
    assert "a, axis mlp: found 6, expected a multiple of 4 (tensor=4)" in text
    assert "b: found the logical axis 'colour'" in text
    assert "c: found mesh axis 'tensor' twice" in text
    assert len(error.value.problems) == 4, "fewer key heads than the tensor degree are not a problem"


def test_shards_have_the_shape_that_the_rules_give() -> None:
    mesh = mesh_of(fsdp=2, tensor=4)
    table = rules.default_rules(ShardingConfig())
    tree = {"head": {"kernel": shape(64, 512)}, "norm": {"scale": shape(64)}, "step": shape()}
    axes = {"head": {"kernel": ("embed", "vocab")}, "norm": {"scale": ("norm",)}, "step": ()}
    shardings = tree_shardings(mesh, table, axes, tree)
    assert shardings["norm"]["scale"].shard_shape((64,)) == (64,)
    placed = jax.device_put(jnp.zeros((64, 512)), shardings["head"]["kernel"])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(32, 128)}


def test_batch_is_split_by_rows_over_data_and_fsdp() -> None:
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    batch = {"main": {"decoder_input_tokens": shape(8, 16), "denoiser_ids": shape(8)}}
    shardings = batch_shardings(mesh, rules.default_rules(ShardingConfig()), batch)["main"]
    assert shardings["decoder_input_tokens"].shard_shape((8, 16)) == (2, 16)
    assert shardings["denoiser_ids"].shard_shape((8,)) == (2,)


def test_validation_reports_indivisible_batches_and_unused_axes() -> None:
    table = rules.default_rules(ShardingConfig())
    axes, arrays = {"head": ("embed", "vocab")}, {"head": shape(64, 512)}
    clean = validation.validate_sharding(run_with(global_batch_size=16), mesh_of(fsdp=8), table, axes, arrays)
    assert clean == []
    rows = validation.validate_sharding(
        run_with(global_batch_size=24, gradient_accumulation_steps=2), mesh_of(data=2, fsdp=4), table, axes, arrays
    )
    assert [(p.where, p.found) for p in rows] == [("training.global_batch_size", "24")]
    assert "16 (data=2 x fsdp=4 x 2 accumulation steps)" in rows[0].expected
    idle = validation.validate_sharding(run_with(), mesh_of(expert=8), table, axes, arrays)
    assert [p.where for p in idle] == ["sharding.expert"]


def test_large_replicated_parameter_is_refused_if_parameters_are_sharded() -> None:
    table = rules.default_rules(ShardingConfig(parameter_rules=(("vocab", None),)))
    axes, arrays = {"table": ("vocab", None)}, {"table": shape(2**18, 128)}
    found = validation.validate_sharding(run_with(), mesh_of(fsdp=8), table, axes, arrays)
    assert [p.where for p in found] == ["table"]
    assert validation.validate_sharding(run_with(), mesh_of(data=8), table, axes, arrays) == []


def test_constrain_shards_activations_within_a_context_only() -> None:
    mesh = mesh_of(data=2, tensor=4)
    table = rules.default_rules(ShardingConfig())
    x = jnp.zeros((4, 2, 8, 6))
    names = ("batch", "length", "heads", "head_dim")
    assert constrain(x, names) is x

    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        with activation_context(mesh, table):
            return constrain(x + 1, names)

    assert f(x).sharding.shard_shape(x.shape) == (2, 2, 2, 6)
    few_heads = jnp.zeros((4, 2, 3, 6))
    assert f(few_heads).sharding.shard_shape(few_heads.shape) == (2, 2, 3, 6), "an indivisible activation stays whole"
    assert constrain(x, names) is x
    with activation_context(mesh, table), pytest.raises(ConfigError, match="colour"):
        constrain(x, (None, None, None, "colour"))


def test_rules_are_immutable_data() -> None:
    table = rules.default_rules(ShardingConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.parameters = {}  # type: ignore[misc]
