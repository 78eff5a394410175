"""Automatic choice of a mesh: the rule, its reasons, and that every chosen mesh is valid."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from t5x_like.config import (
    CausalLM,
    DataConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    ShardingConfig,
    StackConfig,
    TrainingConfig,
)
from t5x_like.config.sharding import AXES
from t5x_like.config.validation import validate
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.hardware.topologies import GIB
from t5x_like.sharding.auto_mesh import (
    DevicePool,
    MeshChoice,
    MeshEstimate,
    choose_degrees,
    choose_sharding,
)
from t5x_like.sharding.mesh import make_mesh
from t5x_like.sharding.rules import default_rules
from t5x_like.sharding.validation import validate_sharding


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    slice_index: int
    device_kind: str = "TPU v5 lite"
    process_index: int = 0
    platform: str = "described"


def choice(
    *, devices: int, rows: int, state: float, slices: int = 1, usable: float = 16, experts: int = 1
) -> MeshChoice:
    """Return the choice for a model with eight heads, `state` GiB of state, and no activations."""

    def estimate(degrees: Mapping[str, int]) -> MeshEstimate:
        row_shards = degrees["data"] * degrees["fsdp"] * degrees["expert"]
        if rows % row_shards:
            return MeshEstimate([ConfigProblem("rows", str(rows), f"a multiple of {row_shards}")], 0, 0)
        if 8 % degrees["tensor"]:
            return MeshEstimate([ConfigProblem("heads", "8", f"a multiple of {degrees['tensor']}")], 0, 0)
        shares = degrees["fsdp"] * degrees["context"] * degrees["tensor"] * degrees["expert"]
        return MeshEstimate((), int(state * GIB / shares), 0)

    return choose_degrees(DevicePool(devices, slices, int(usable * GIB)), experts, estimate)


def chosen(**facts: Any) -> dict[str, int]:
    return {axis: degree for axis, degree in choice(**facts).degrees.items() if degree > 1}


def test_degrees_follow_the_rule() -> None:
    assert chosen(devices=64, rows=64, state=100) == {"fsdp": 64}
    assert chosen(devices=64, rows=64, state=1) == {"data": 64}, "nothing is gained from gathering a small state"
    assert chosen(devices=64, rows=16, state=100) == {"fsdp": 16, "tensor": 4}, (
        "the smallest tensor degree with which the rows can be split"
    )
    assert chosen(devices=64, rows=4, state=100) == {"fsdp": 4, "context": 2, "tensor": 8}, (
        "tensor up to eight, then context"
    )
    assert chosen(devices=64, rows=64, state=100, experts=8) == {"fsdp": 8, "expert": 8}
    two = choice(devices=64, rows=64, state=100, slices=2)
    assert (two.degrees["fsdp"], two.dcn["data"], two.dcn["fsdp"]) == (32, 2, 1), (
        "data parallelism over the slow network"
    )


def test_reason_states_why_a_simpler_mesh_was_rejected() -> None:
    assert "the simplest mesh; estimated 1.56 GiB" in choice(devices=64, rows=64, state=100).reason
    assert "fsdp=64: rows is 16, and not a multiple of 64" in choice(devices=64, rows=16, state=100).reason
    assert "memory of these devices is not known" in choice(devices=64, rows=64, state=100, usable=0).reason
    tight = choice(devices=64, rows=64, state=2000)
    assert "no mesh is estimated to fit into 14.4 GiB" in tight.reason and tight.degrees["fsdp"] == 64


def test_problems_of_the_simplest_mesh_are_listed_if_none_is_valid() -> None:
    with pytest.raises(ConfigError, match="rows: found 3, expected a multiple of 64"):
        choose_degrees(
            DevicePool(64, 1, 0),
            1,
            lambda degrees: MeshEstimate([ConfigProblem("rows", "3", "a multiple of 64")], 0, 0),
        )


def a_run(rows: int, length: int, width: int, heads: int) -> RunConfig:
    stack = StackConfig(
        num_layers=1,
        d_model=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=8,
        d_ff=64,
        relative_bias_bidirectional=False,
    )
    return RunConfig(
        name="t",
        model=ModelConfig(encoder=None, decoder=stack, vocab_size=96),
        data=DataConfig(layout="causal_lm", mixture=(CausalLM(),), inputs_length=0, targets_length=length),
        training=TrainingConfig(num_train_steps=1, global_batch_size=rows),
        sharding=ShardingConfig(auto=True),
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 64),
    st.sampled_from([8, 24, 32, 100]),
    st.sampled_from([16, 48, 96]),
    st.sampled_from([1, 3, 4, 12]),
    st.sampled_from([1, 2, 4, 6, 8, 16]),
    st.sampled_from([1, 2]),
)
def test_chosen_mesh_is_always_valid(rows: int, length: int, width: int, heads: int, devices: int, slices: int) -> None:
    run = a_run(rows, length, width, heads)
    rules = default_rules(run.sharding)
    axes = {"query": ("layers", "embed", "heads", "head_dim"), "head": ("embed", "vocab"), "mlp": ("embed", "mlp")}
    shapes = {"query": (1, width, heads, 8), "head": (width, 96), "mlp": (width, 64)}
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "float32"), shapes, is_leaf=lambda x: isinstance(x, tuple))
    described = [FakeDevice(n, n // devices) for n in range(devices * slices)]
    try:
        config, reason = choose_sharding(run, rules, described, (axes, params), (axes, params), ({}, {}))
    except ConfigError:
        for degrees in itertools.product(*[[n for n in range(1, devices + 1) if devices % n == 0]] * 4):
            if math.prod(degrees) == devices and degrees[3] <= 8:
                data, fsdp, context, tensor = degrees
                mesh = AbstractMesh((data * slices, fsdp, 1, context, tensor), AXES)
                assert validate_sharding(run, mesh, rules, axes, params), f"{mesh} would have been valid"
        return
    mesh = make_mesh(config, described)
    assert mesh.size == devices * slices and reason
    assert validate_sharding(run, mesh, rules, axes, params) == []


def test_auto_and_explicit_degrees_exclude_each_other() -> None:
    run = a_run(8, 8, 16, 4)
    assert not [p for p in validate(run) if p.where.startswith("sharding")]
    both = dataclasses.replace(run, sharding=ShardingConfig(auto=True, tensor=2))
    assert "sharding.auto" in [p.where for p in validate(both)]


def test_dense_stack_beside_a_stack_of_experts_leaves_the_experts_divided() -> None:
    run = a_run(16, 8, 16, 4)
    dense = run.model.decoder
    assert dense is not None
    stacks = {
        "encoder": dataclasses.replace(dense, relative_bias_bidirectional=True),
        "decoder": dataclasses.replace(dense, experts=MoEConfig(num_experts=4)),
    }
    data = dataclasses.replace(run.data, layout="encoder_decoder", inputs_length=8)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **stacks), data=data)
    axes, shapes = {"experts": ("experts", "embed", "mlp")}, {"experts": jax.ShapeDtypeStruct((4, 16, 64), "float32")}
    devices = [FakeDevice(n, 0) for n in range(8)]
    config, _ = choose_sharding(run, default_rules(run.sharding), devices, (axes, shapes), (axes, shapes), ({}, {}))
    assert config.expert == 4


def test_optimizer_state_on_the_host_counts_while_it_is_fetched() -> None:
    """Each device holds half of 16 GiB of parameters, and half of as much optimizer state."""
    axes = {"mlp": ("embed", "mlp"), "count": (None,)}
    shapes = {"mlp": jax.ShapeDtypeStruct((2**16, 2**16), "float32"), "count": jax.ShapeDtypeStruct((1,), "int32")}
    devices = [FakeDevice(n, 0) for n in range(2)]

    def reason(sharding: ShardingConfig) -> str:
        run, array = dataclasses.replace(a_run(2, 8, 16, 4), sharding=sharding), (axes, shapes)
        return choose_sharding(run, default_rules(sharding), devices, array, array, array)[1]

    on_device = reason(ShardingConfig(auto=True))
    on_host = reason(ShardingConfig(auto=True, optimizer_state_memory="host"))
    assert "16.0 GiB of state and" in on_device and "from the host" not in on_device
    assert "8.00 GiB of state and" in on_host and "(then 8.00 GiB of optimizer state from the host)" in on_host
    # What is fetched takes the place of the activations, which the backward pass has freed.
    assert MeshEstimate((), 8, 2, 5).total == 13 and MeshEstimate((), 8, 6, 5).total == 14


def test_logits_count_as_many_tokens_as_the_loss_has_at_once() -> None:
    """A device has 128 rows of 128 tokens, and 4 bytes of logits and of their cotangents for each of 32,000 ids."""
    axes, shapes = {"head": ("embed", "vocab")}, {"head": jax.ShapeDtypeStruct((64, 32_000), "float32")}
    estimates = {}
    for chunk in (0, 512, None):
        run = a_run(1024, 128, 64, 4)
        training = dataclasses.replace(run.training, loss_chunk_tokens=chunk)
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=32_000), training=training)
        devices = [FakeDevice(n, 0) for n in range(8)]
        config, reason = choose_sharding(
            run, default_rules(run.sharding), devices, (axes, shapes), (axes, shapes), ({}, {})
        )
        assert config.tensor == config.context == 1
        number, unit = reason.partition(" of state and ")[2].split()[:2]
        estimates[chunk] = float(number) * {"MiB": 2**20, "GiB": GIB}[unit]
    head_gradient = 4 * 64 * 32_000
    saved = (128 * 128 - 512) * 32_000 * 8 - head_gradient
    assert estimates[0] - estimates[512] == pytest.approx(saved, rel=0.01)
    # 524 tokens have 64 MiB of logits.
    assert estimates[None] - estimates[512] == pytest.approx((524 - 512) * 32_000 * 8, abs=2**20)
