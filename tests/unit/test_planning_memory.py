"""Memory of a device: exact where a program says what it holds, and laws where a formula estimates."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planning_runs import FAMILIES, small_run

from t5x_like.config import Adafactor, AdamW, Freeze, PartitioningConfig, RunConfig
from t5x_like.models.build import abstract, merge
from t5x_like.planning import activations
from t5x_like.planning.memory import bytes_per_device, estimate, tiled_bytes, trained_params
from t5x_like.planning.outlines import device_outlines
from t5x_like.planning.topologies import parse_topology
from t5x_like.program import assemble
from t5x_like.training.losses import batch_metrics, summed_loss


def residual_bytes(run: RunConfig) -> int:
    """What JAX keeps from the forward to the backward pass of a step: by an abstract trace, without logits and
    parameters."""
    model = abstract(run.model)
    (features,) = (
        {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in spec.items()}
        for spec in assemble(run, jax.devices()[:1]).batch_spec.values()
    )

    def residuals(params: Any, features: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            def apply(params: Any, features: Any, rng: Any) -> Any:
                return merge(model.graphdef, params).output(features, dropout_rng=rng)

            rng = key if run.model.draws else None
            metrics, coefficients = batch_metrics(
                apply, params, {"main": features}, rng, z_loss=1e-4, label_smoothing=0.0, denoisers=[]
            )
            return summed_loss(metrics, coefficients, metrics)

        return jax.vjp(loss, params)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(residuals)(model.params, features, key).jaxpr
    given = {id(var) for var in jaxpr.invars}
    kept = {id(var): var.aval for var in jaxpr.outvars if hasattr(var, "aval") and id(var) not in given}
    sizes = [
        math.prod(array.shape) * array.dtype.itemsize
        for array in kept.values()
        if not jnp.issubdtype(array.dtype, jax.dtypes.extended) and run.model.vocab_size not in array.shape
    ]
    return sum(sizes)


CASES = [("t5_1_1", "none"), ("gemma_2", "dots")]
MORE = [(family, remat) for family in FAMILIES for remat in ("none", "dots", "full") if (family, remat) not in CASES]


@pytest.mark.parametrize(("family", "remat"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in MORE)])
def test_kept_activations_are_what_jax_keeps(family: str, remat: str) -> None:
    run = small_run(family, layers=8, remat=remat, dtype="bfloat16", vocab_size=520)
    (features,) = assemble(run, jax.devices()[:1]).batch_spec.values()
    formula = sum(held.nbytes for kept in activations.saved(run.model, features).values() for held in kept)
    # A few arrays around the layers are not counted: norms of embeddings, BERT's head, statistics.
    assert 0.9 < formula / residual_bytes(run) < 1.1


@pytest.mark.parametrize(
    ("family", "partitioning", "optimizer"),
    [
        ("t5_1_1", PartitioningConfig(fsdp=4, tensor=2), Adafactor()),
        ("llama_3", PartitioningConfig(data=2, fsdp=-1), AdamW()),
        ("mixtral", PartitioningConfig(fsdp=2, expert=4), AdamW()),
    ],
)
def test_state_is_exactly_what_the_devices_hold(family: str, partitioning: PartitioningConfig, optimizer: Any) -> None:
    run = small_run(family, rows=16, layers=2)
    run = dataclasses.replace(
        run, partitioning=partitioning, training=dataclasses.replace(run.training, optimizer=optimizer)
    )
    program = assemble(run, jax.devices())
    found = estimate(program)
    # Real arrays, placed as a run places its own.
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), program.abstract_state)
    device = jax.devices()[3]

    def held(tree: Any) -> int:
        return sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
            if shard.device == device
        )

    assert found.state == {"parameters": held(state["params"]), "optimizer state": held(state["opt_state"])}
    assert found.gradients == held(state["params"])


def described(run: RunConfig, topology: str) -> Any:
    machine = parse_topology(topology)
    return estimate(assemble(run, device_outlines(machine)), machine.usable_bytes)


def partitioned(run: RunConfig, **degrees: int) -> RunConfig:
    return dataclasses.replace(run, partitioning=PartitioningConfig(**degrees))


def test_the_parts_are_the_peak_and_no_moment_is_higher() -> None:
    found = described(small_run("t5_1_1", rows=16), "v5e:4x4")
    assert sum(found.parts.values()) == found.peak_bytes
    state = sum(found.state.values())
    assert found.peak_bytes == max(state + sum(parts.values()) for parts in found.moments.values())
    assert found.fits


def test_twice_the_fsdp_devices_hold_half_of_everything_that_is_split() -> None:
    run = small_run("llama_3", rows=16, width=256, dtype="bfloat16")
    four, eight = (described(run, f"h100:{count}") for count in (4, 8))
    norms = 4 * (2 * 2 + 1) * 256
    assert four.state["parameters"] - norms == 2 * (eight.state["parameters"] - norms)
    for moment, part in (("head", "kept activations"), ("head", "logits"), ("layers", "cotangents of the MLP")):
        # Masks that are the same for all rows are not split over them.
        assert four.moments[moment][part] == pytest.approx(2 * eight.moments[moment][part], rel=0.01)


def test_rows_and_accumulation_scale_activations_only() -> None:
    run = small_run("llama_3", rows=32, width=256)
    more = dataclasses.replace(run, training=dataclasses.replace(run.training, batch_size=64))
    parts = dataclasses.replace(more, training=dataclasses.replace(more.training, gradient_accumulation_steps=2))
    one, two, halved = (described(r, "h100:8") for r in (run, more, parts))
    assert one.state == two.state == halved.state
    assert two.moments["head"]["logits"] == 2 * one.moments["head"]["logits"] == 2 * halved.moments["head"]["logits"]
    assert halved.moments["head"]["sums of gradients"] == halved.gradients


def test_more_remat_keeps_less() -> None:
    kept = [
        described(small_run("t5gemma", rows=16, layers=4, remat=remat), "v5p:2x2x2").moments["head"]["kept activations"]
        for remat in ("none", "dots", "full")
    ]
    assert kept[0] > kept[1] > kept[2]


def test_frozen_parameters_have_no_gradients() -> None:
    run = small_run("t5_1_1", rows=16)
    frozen = Freeze(paths=("encoder/.*", "token_embedder/.*"))
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, freeze=(frozen,)))
    program = assemble(run, jax.devices())
    found = estimate(program)
    gone = bytes_per_device([program.abstract_params["encoder"], program.abstract_params["token_embedder"]])
    assert found.gradients == found.state["parameters"] - gone == bytes_per_device(trained_params(program))
    assert "gradients of the token table" not in found.moments["embeddings"]


@pytest.mark.parametrize(
    ("shape", "itemsize", "expected"),
    [
        ((4096, 128), 4, 4096 * 128 * 4),
        # Of a query kernel that is split to 192 columns, these are innermost: rounded up to 256.
        ((12, 192, 12, 64), 4, 12 * 256 * 12 * 64 * 4),
        ((12, 2048, 192), 4, 12 * 2048 * 192 * 4),
        ((3, 32), 4, 8 * 128 * 4),
        ((5,), 4, 512),
        ((), 4, 4),
    ],
)
def test_tiles_round_the_two_innermost_dimensions_up(shape: tuple[int, ...], itemsize: int, expected: int) -> None:
    assert tiled_bytes(shape, itemsize) == expected
