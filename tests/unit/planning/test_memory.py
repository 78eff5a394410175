"""Memory estimate of a device: exact for the state, and consistent formulas for everything else."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.planning_runs import FAMILIES, small_run

from t5x_like.config import AdafactorConfig, AdamWConfig, FreezeConfig, LoraConfig, RunConfig, ShardingConfig
from t5x_like.hardware.fake_devices import fake_devices
from t5x_like.hardware.topologies import parse_topology
from t5x_like.models.factory import abstract_model, bind_params, kernels
from t5x_like.planning.batch_size_search import POLICIES
from t5x_like.planning.estimate.memory import bytes_per_device, estimate, tiled_bytes, trained_params
from t5x_like.planning.estimate.parameters import parameter_parts, total
from t5x_like.planning.sharding_table import parameter_shardings
from t5x_like.program import build_program
from t5x_like.sharding.saved_activations import saved_activations
from t5x_like.training.losses import batch_metrics, summed_loss


def residual_bytes(run: RunConfig) -> int:
    """Return the bytes that JAX saves from the forward to the backward pass, by an abstract trace.

    Logits and parameters are not counted.
    """
    model = abstract_model(run.model)
    (features,) = (
        {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in spec.items()}
        for spec in build_program(run, jax.devices()[:1]).batch_spec.values()
    )

    def residuals(params: Any, features: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            def apply(params: Any, features: Any, rng: Any) -> Any:
                return bind_params(model.graphdef, params).output(features, dropout_rng=rng)

            rng = key if run.model.uses_rng else None
            metrics, coefficients = batch_metrics(
                apply, params, {"main": features}, rng, z_loss=1e-4, label_smoothing=0.0, denoisers=[]
            )
            return summed_loss(metrics, coefficients, metrics)

        return jax.vjp(loss, params)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(residuals)(model.params, features, key).jaxpr
    inputs = {id(var) for var in jaxpr.invars}
    saved = {id(var): var.aval for var in jaxpr.outvars if hasattr(var, "aval") and id(var) not in inputs}
    sizes = [
        math.prod(array.shape) * array.dtype.itemsize
        for array in saved.values()
        if not jnp.issubdtype(array.dtype, jax.dtypes.extended) and run.model.vocab_size not in array.shape
    ]
    return sum(sizes)


CASES = [("t5_1_1", "none"), ("gemma_2", "dots")]
MORE = [
    *((family, remat) for family in FAMILIES for remat in ("none", "dots", "full") if (family, remat) not in CASES),
    *((family, remat) for family in ("t5_1_1", "bert") for remat in ("mlp", "attention", "qkv", "outputs")),
]


@pytest.mark.parametrize(("family", "remat"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in MORE)])
def test_saved_activations_match_the_residuals_of_jax(family: str, remat: str) -> None:
    if family == "mixtral" and remat != "full":
        pytest.skip("the estimate is of the buffers of experts that are split over devices, on TPUs")
    require_residuals_of_jax(small_run(family, layers=8, remat=remat, dtype="bfloat16", vocab_size=520))


def test_saved_scores_of_self_and_cross_attention_match_the_residuals_of_jax() -> None:
    run = small_run("t5_1_1", layers=8, remat="none", dtype="bfloat16", vocab_size=520, attention="xla")
    require_residuals_of_jax(run)


def test_masks_and_biases_count_only_for_backends_that_make_them() -> None:
    for backend, expected in (("reference", {"masks", "relative bias"}), ("blockwise", set()), ("flash", set())):
        run = small_run("t5_1_1", attention=backend)
        (features,) = build_program(run, jax.devices()[:1]).batch_spec.values()
        saved = saved_activations(run.model, features)
        for arrays in saved.values():
            assert {array.name for array in arrays} & {"masks", "relative bias"} == expected, backend


def require_residuals_of_jax(run: RunConfig) -> None:
    (features,) = build_program(run, jax.devices()[:1]).batch_spec.values()
    formula = sum(array.nbytes for arrays in saved_activations(run.model, features).values() for array in arrays)
    # A few arrays around the layers are not counted: norms of embeddings, BERT's head, statistics.
    assert 0.9 < formula / residual_bytes(run) < 1.1


@pytest.mark.parametrize(
    ("family", "sharding", "optimizer"),
    [
        ("t5_1_1", ShardingConfig(fsdp=4, tensor=2), AdafactorConfig()),
        ("llama_3", ShardingConfig(data=2, fsdp=-1), AdamWConfig()),
        ("mixtral", ShardingConfig(fsdp=2, expert=4), AdamWConfig()),
    ],
)
def test_state_bytes_equal_those_on_the_devices(family: str, sharding: ShardingConfig, optimizer: Any) -> None:
    run = small_run(family, rows=16, layers=2)
    run = dataclasses.replace(run, sharding=sharding, training=dataclasses.replace(run.training, optimizer=optimizer))
    program = build_program(run, jax.devices())
    found = estimate(program)
    # Real arrays with the shardings of a run.
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


def estimate_for(run: RunConfig, topology: str) -> Any:
    machine = parse_topology(topology)
    return estimate(build_program(run, fake_devices(machine)), machine.usable_bytes)


def partitioned(run: RunConfig, **degrees: int) -> RunConfig:
    return dataclasses.replace(run, sharding=ShardingConfig(**degrees))


def test_parts_sum_to_the_peak_which_is_the_highest_moment() -> None:
    found = estimate_for(small_run("t5_1_1", rows=16), "v5e:4x4")
    assert sum(found.parts.values()) == found.peak_bytes
    state = sum(found.state.values())
    assert found.peak_bytes == max(state + sum(parts.values()) for parts in found.moments.values())
    assert found.fits


def test_doubling_fsdp_halves_everything_that_is_split() -> None:
    run = small_run("llama_3", rows=16, width=256, dtype="bfloat16")
    four, eight = (estimate_for(run, f"h100:{count}") for count in (4, 8))
    norms = 4 * (2 * 2 + 1) * 256
    assert four.state["parameters"] - norms == 2 * (eight.state["parameters"] - norms)
    for moment, part in (("head", "saved activations"), ("head", "logits"), ("layers", "cotangents of the MLP")):
        # Masks that are shared by all rows are not split over them.
        assert four.moments[moment][part] == pytest.approx(2 * eight.moments[moment][part], rel=0.01)


def test_rows_and_accumulation_scale_activations_only() -> None:
    run = small_run("llama_3", rows=32, width=256)
    more = dataclasses.replace(run, training=dataclasses.replace(run.training, global_batch_size=64))
    parts = dataclasses.replace(more, training=dataclasses.replace(more.training, gradient_accumulation_steps=2))
    one, two, halved = (estimate_for(r, "h100:8") for r in (run, more, parts))
    assert one.state == two.state == halved.state
    assert two.moments["head"]["logits"] == 2 * one.moments["head"]["logits"] == 2 * halved.moments["head"]["logits"]
    assert halved.moments["head"]["sums of gradients"] == halved.gradients


def test_loss_in_chunks_needs_the_logits_of_a_chunk_and_the_gradient_of_the_head() -> None:
    run = small_run("llama_3", rows=32, width=256)
    chunks = dataclasses.replace(run, training=dataclasses.replace(run.training, loss_chunk_tokens=16))
    whole, found = (estimate_for(r, "h100:8").moments["head"] for r in (run, chunks))
    positions = 4 * run.data.row_length
    assert found["logits"] == pytest.approx(whole["logits"] * 16 / positions)
    assert found["gradient of the head"] == 4 * 256 * run.model.vocab_size


def test_more_remat_saves_fewer_activations() -> None:
    kept = {
        remat: estimate_for(small_run("t5gemma", rows=16, layers=4, remat=remat), "v5p:2x2x2").moments["head"][
            "saved activations"
        ]
        for remat in POLICIES
    }
    for policies in (["none", "dots", "attention", "qkv", "outputs", "full"], ["dots", "mlp", "full"]):
        assert all(kept[more] > kept[less] for more, less in itertools.pairwise(policies)), kept


def test_frozen_parameters_have_no_gradients() -> None:
    run = small_run("t5_1_1", rows=16)
    frozen = FreezeConfig(paths=("encoder/.*", "token_embedder/.*"))
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, freeze=(frozen,)))
    program = build_program(run, jax.devices())
    found = estimate(program)
    frozen_bytes = bytes_per_device([program.abstract_params["encoder"], program.abstract_params["token_embedder"]])
    assert found.gradients == found.state["parameters"] - frozen_bytes == bytes_per_device(trained_params(program))
    assert "gradients of the token table" not in found.moments["embeddings"]


@pytest.mark.parametrize(
    ("shape", "itemsize", "expected"),
    [
        ((4096, 128), 4, 4096 * 128 * 4),
        # A query kernel with 192 columns per device: the columns are innermost and are rounded up to 256.
        ((12, 192, 12, 64), 4, 12 * 256 * 12 * 64 * 4),
        ((12, 2048, 192), 4, 12 * 2048 * 192 * 4),
        ((3, 32), 4, 8 * 128 * 4),
        ((5,), 4, 512),
        ((), 4, 4),
    ],
)
def test_tiles_round_the_two_innermost_dimensions_up(shape: tuple[int, ...], itemsize: int, expected: int) -> None:
    assert tiled_bytes(shape, itemsize) == expected


def test_frozen_base_in_8_bits_is_counted_with_its_scales() -> None:
    run = small_run("llama_3")
    found = {}
    for base_type in ("float32", "int8"):
        lora = LoraConfig(base="base", rank=4, base_type=base_type)
        changed = dataclasses.replace(run, training=dataclasses.replace(run.training, lora=lora))
        program = build_program(changed, jax.devices()[:1])
        parts = parameter_parts(program)
        found[base_type] = estimate(program).state["frozen base"]
        assert found[base_type] == total(parts).bytes_per_device
        rows = [row for row in parameter_shardings(program) if row.name.startswith("base/")]
        assert found[base_type] == sum(row.bytes_per_device for row in rows)
        assert total(parts).count == sum(leaf.size for leaf in jax.tree.leaves(program.spec.params))
    of_model = kernels(run.model).values()
    elements = sum(math.prod(kernel.shape) for kernel in of_model)
    scales = sum(math.prod((*kernel.shape[: kernel.stacked], *kernel.shape[kernel.split :])) for kernel in of_model)
    assert found["float32"] - found["int8"] == 3 * elements - 4 * scales
