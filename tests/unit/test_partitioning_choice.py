"""Which mesh is chosen for a run, and that it is always one that can be."""

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
    ConfigError,
    DataConfig,
    ModelConfig,
    PartitioningConfig,
    Problem,
    RunConfig,
    StackConfig,
    TrainingConfig,
)
from t5x_like.config.partitioning import AXES
from t5x_like.config.validate import validate
from t5x_like.partitioning.check import check_partitioning
from t5x_like.partitioning.choose import GIB, Choice, Look, Machine, choose_degrees, choose_partitioning
from t5x_like.partitioning.mesh import make_mesh
from t5x_like.partitioning.rules import standard


@dataclasses.dataclass(frozen=True)
class Described:
    id: int
    slice_index: int
    device_kind: str = "TPU v5 lite"
    process_index: int = 0
    platform: str = "described"


def choice(*, devices: int, rows: int, state: float, slices: int = 1, usable: float = 16, experts: int = 1) -> Choice:
    """For a model of eight heads whose state takes `state` GiB; activations take nothing."""

    def look(degrees: Mapping[str, int]) -> Look:
        ways = degrees["data"] * degrees["fsdp"] * degrees["expert"]
        if rows % ways:
            return Look([Problem("rows", str(rows), f"a multiple of {ways}")], 0, 0)
        if 8 % degrees["tensor"]:
            return Look([Problem("heads", "8", f"a multiple of {degrees['tensor']}")], 0, 0)
        shares = degrees["fsdp"] * degrees["context"] * degrees["tensor"] * degrees["expert"]
        return Look((), int(state * GIB / shares), 0)

    return choose_degrees(Machine(devices, slices, int(usable * GIB)), experts, look)


def chosen(**facts: Any) -> dict[str, int]:
    return {axis: degree for axis, degree in choice(**facts).degrees.items() if degree > 1}


def test_the_rule() -> None:
    assert chosen(devices=64, rows=64, state=100) == {"fsdp": 64}
    assert chosen(devices=64, rows=64, state=1) == {"data": 64}, "nothing is gained from gathering a small state"
    assert chosen(devices=64, rows=16, state=100) == {"fsdp": 16, "tensor": 4}, "the least that the rows allow"
    assert chosen(devices=64, rows=4, state=100) == {"fsdp": 4, "context": 2, "tensor": 8}, "tensor to eight, context"
    assert chosen(devices=64, rows=64, state=100, experts=8) == {"fsdp": 8, "expert": 8}
    two = choice(devices=64, rows=64, state=100, slices=2)
    assert (two.degrees["fsdp"], two.dcn["data"], two.dcn["fsdp"]) == (32, 2, 1), "copies over the slow network"


def test_the_reason_says_what_stood_against_a_simpler_mesh() -> None:
    assert "the simplest mesh; estimated 1.56 GiB" in choice(devices=64, rows=64, state=100).reason
    assert "fsdp=64: rows is 16, and not a multiple of 64" in choice(devices=64, rows=16, state=100).reason
    assert "memory of these devices is not known" in choice(devices=64, rows=64, state=100, usable=0).reason
    tight = choice(devices=64, rows=64, state=2000)
    assert "no mesh is estimated to fit 14.40 GiB" in tight.reason and tight.degrees["fsdp"] == 64


def test_without_any_mesh_the_simplest_one_s_problems_are_listed() -> None:
    with pytest.raises(ConfigError, match="rows: found 3, expected a multiple of 64"):
        choose_degrees(Machine(64, 1, 0), 1, lambda degrees: Look([Problem("rows", "3", "a multiple of 64")], 0, 0))


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
        training=TrainingConfig(num_train_steps=1, batch_size=rows),
        partitioning=PartitioningConfig(auto=True),
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
def test_a_chosen_mesh_is_always_valid(
    rows: int, length: int, width: int, heads: int, devices: int, slices: int
) -> None:
    run = a_run(rows, length, width, heads)
    rules = standard(run.partitioning)
    axes = {"query": ("layers", "embed", "heads", "head_dim"), "head": ("embed", "vocab"), "mlp": ("embed", "mlp")}
    shapes = {"query": (1, width, heads, 8), "head": (width, 96), "mlp": (width, 64)}
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "float32"), shapes, is_leaf=lambda x: isinstance(x, tuple))
    described = [Described(n, n // devices) for n in range(devices * slices)]
    try:
        config, reason = choose_partitioning(run, rules, described, (axes, params), (axes, params))
    except ConfigError:
        for degrees in itertools.product(*[[n for n in range(1, devices + 1) if devices % n == 0]] * 4):
            if math.prod(degrees) == devices and degrees[3] <= 8:
                data, fsdp, context, tensor = degrees
                mesh = AbstractMesh((data * slices, fsdp, 1, context, tensor), AXES)
                assert check_partitioning(run, mesh, rules, axes, params), f"{mesh} would have been valid"
        return
    mesh = make_mesh(config, described)
    assert mesh.size == devices * slices and reason
    assert check_partitioning(run, mesh, rules, axes, params) == []


def test_degrees_are_chosen_or_named_but_not_both() -> None:
    run = a_run(8, 8, 16, 4)
    assert not [p for p in validate(run) if p.where.startswith("partitioning")]
    both = dataclasses.replace(run, partitioning=PartitioningConfig(auto=True, tensor=2))
    assert "partitioning.auto" in [p.where for p in validate(both)]
