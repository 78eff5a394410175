"""Loss and gradients are the same on meshes that combine kinds of parallelism, with packing and split sequences.

One device and eight differ by rounding only: the loss by a relative 1e-5, each gradient by a relative 1e-4 or by 1e-5
of the largest gradient of the model (float32).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import pytest
from helpers.parallel_programs import ARCHITECTURES, batch_for, run_for

from t5x_like.config import DcnConfig, RunConfig, ShardingConfig
from t5x_like.decoding.engine import generate_tokens
from t5x_like.errors import ConfigError
from t5x_like.kernels.attention import get_backend
from t5x_like.monitoring.metrics import compute
from t5x_like.program import Program, build_program
from t5x_like.utils.type_aliases import PyTree

RESHARDING_WARNING = "Involuntary full rematerialization"


def mesh_of(*, slices: int = 1, **degrees: Any) -> ShardingConfig:
    return ShardingConfig(**{"fsdp": 1, **degrees}, dcn=DcnConfig(data=slices))


ONE_DEVICE = mesh_of()
CONTEXT = mesh_of(context=8)
PRODUCT = mesh_of(fsdp=2, context=2, tensor=2)
SLICES = mesh_of(slices=2, fsdp=2, context=2)
GATHERED = mesh_of(fsdp=2, context=4, context_attention="all_gather")
MESHES = {"context": CONTEXT, "fsdp_context_tensor": PRODUCT, "slices": SLICES, "gathered": GATHERED}


@functools.cache
def one_device(architecture: str) -> tuple[PyTree, PyTree, PyTree]:
    """Return the state before a step on one device, a tenth of the gradients of the step, and its metrics."""
    program = build_program(run_for(architecture, ONE_DEVICE, packed=True), jax.devices()[:1])
    start = jax.tree.map(np.asarray, program.init())
    state, metrics = program.train_step(placed(program, start), program.shard_batch(batch_for(program.run)))
    return start, *jax.tree.map(np.asarray, (state["opt_state"].mu, metrics))


def placed(program: Program, state: PyTree) -> PyTree:
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state))


def check(
    architecture: str, mesh: ShardingConfig, capfd: pytest.CaptureFixture[str], *, attention: str = "auto"
) -> Program:
    start, expected, expected_metrics = one_device(architecture)
    capfd.readouterr()
    run = run_for(architecture, mesh, packed=True)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, attention=attention))
    program = build_program(run, jax.devices())
    assert "_segment_ids" in str(list(program.batch_spec["main"])), "rows are packed"
    state, metrics = program.train_step(placed(program, start), program.shard_batch(batch_for(program.run)))
    assert RESHARDING_WARNING not in capfd.readouterr().err
    assert compute(metrics["loss"]) == pytest.approx(compute(expected_metrics["loss"]), rel=1e-5)
    assert compute(metrics["grad_norm"]) == pytest.approx(compute(expected_metrics["grad_norm"]), rel=1e-4)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), state["opt_state"].mu, expected
    )
    return program


@pytest.mark.slow
def test_prefix_lm_with_fsdp_context_and_tensor(capfd: pytest.CaptureFixture[str]) -> None:
    """Packed prefixes, T5's bias and a tied head, with sequence, heads and parameters split."""
    program = check("prefix_lm", PRODUCT, capfd)
    tokens = program.shard_batch(batch_for(program.run))["main"]["decoder_input_tokens"]
    assert {shard.data.shape for shard in tokens.addressable_shards} == {(8, 16)}, "half of the rows, half of each"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ring", "all_gather"])
def test_flash_kernels_of_split_sequences_with_packed_prefixes_and_bias(
    form: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = get_backend("flash")
    for name, value in {"interpret": True, "block": 8, "platform": None}.items():
        monkeypatch.setattr(backend, name, value)
    mesh = mesh_of(fsdp=2, context=2, tensor=2, context_attention=form)
    assert "flash for decoder self-attention" in check("prefix_lm", mesh, capfd, attention="flash").attention


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_do_not_depend_on_the_mesh(
    architecture: str, mesh: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The encoder-decoder has dropout: the same numbers are dropped however the sequence is split."""
    program = check(architecture, MESHES[mesh], capfd)
    assert program.mesh.size == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "mesh"),
    [
        ("experts", mesh_of(fsdp=2, expert=2, context=2)),
        ("experts", mesh_of(expert=2, context=2, tensor=2)),
        ("experts", mesh_of(slices=2, expert=4)),
    ],
    ids=lambda x: x if isinstance(x, str) else "x".join(f"{n}{d}" for n, d in x.degrees.items() if d > 1),
)
def test_experts_with_windows_and_fewer_key_heads_do_not_depend_on_the_mesh(
    architecture: str, mesh: ShardingConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    check(architecture, mesh, capfd)


@pytest.mark.slow
def test_merged_attention_windows_and_soft_caps_do_not_depend_on_the_mesh(capfd: pytest.CaptureFixture[str]) -> None:
    check("merged", PRODUCT, capfd)


@pytest.mark.slow
def test_generator_and_discriminator_do_not_depend_on_the_mesh(capfd: pytest.CaptureFixture[str]) -> None:
    check("electra", PRODUCT, capfd)


@pytest.mark.slow
def test_disentangled_positions_do_not_depend_on_the_mesh(capfd: pytest.CaptureFixture[str]) -> None:
    check("distances", mesh_of(fsdp=2, context=4), capfd)


LENGTH = 8 * 13


def float_shapes(run: RunConfig) -> set[tuple[int, ...]]:
    """Return the shapes of all float arrays on a device in the compiled training step."""
    program = build_program(run, jax.devices())
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(program.batch_spec))
    text = program.train_step.lower(program.abstract_state, batch).compile().as_text()
    dimensions = re.findall(r"\bf32\[([\d,]+)\]", text)
    return {tuple(map(int, dims.split(","))) for dims in dimensions}


def test_ring_keeps_no_whole_row_and_scores_of_two_blocks_only() -> None:
    """Rows have 104 positions (no other dimension has that size) on eight devices, in forward and backward pass."""
    shapes = float_shapes(run_for("prefix_lm", CONTEXT, length=LENGTH // 2))
    assert not [shape for shape in shapes if LENGTH in shape]
    assert [shape for shape in shapes if shape[-2:] == (LENGTH // 8, LENGTH // 8)], "scores of a block with another"


@pytest.mark.slow
def test_gathered_keys_and_values_keep_scores_split() -> None:
    mesh = mesh_of(context=8, context_attention="all_gather")
    shapes = float_shapes(run_for("decoder", mesh, length=LENGTH // 2))
    assert not [shape for shape in shapes if shape.count(LENGTH) > 1]
    whole = {shape for shape in shapes if LENGTH in shape}
    assert (16, LENGTH, 2, 16) in whole, "keys or values"
    assert not [shape for shape in whole if 64 in shape], "states"


def test_invalid_split_sequences_are_refused_before_compilation() -> None:
    def problems(run: RunConfig) -> str:
        with pytest.raises(ConfigError) as error:
            build_program(run, jax.devices())
        return str(error.value)

    odd = problems(run_for("encoder_decoder", CONTEXT, length=12))
    assert (
        "length of encoder_input_tokens and length of decoder_input_tokens: found 12, expected a multiple of 8" in odd
    )
    twice = problems(run_for("decoder", mesh_of(fsdp=2, tensor=4, activation_rules=(("length", "tensor"),))))
    assert "activation decoder/queries, axes batch, length, heads, head_dim" in twice
    assert ": found mesh axis 'tensor' twice" in twice


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_greedy_tokens_do_not_depend_on_the_mesh(architecture: str) -> None:
    """The prefill of a prompt uses the ring; the decoding steps do not."""
    random = np.random.default_rng(0)
    prompts = [random.integers(1, 512, length).tolist() for length in (16, 11, 9, 13, 5, 16, 7, 2)]
    state = one_device(architecture)[0]
    tokens = []
    for mesh, devices in ((ONE_DEVICE, 1), (PRODUCT, 8)):
        program = build_program(run_for(architecture, mesh, packed=True), jax.devices()[:devices])
        # Larger than at initialization, so that one token is clearly the most likely.
        params = jax.tree.map(lambda x: 3 * x, placed(program, state)["params"])
        allowed = np.ones(program.run.model.vocab_size, bool)
        bidirectional = architecture == "prefix_lm"
        tokens.append(
            generate_tokens(program, params, prompts, allowed_V=allowed, max_new_tokens=6, bidirectional=bidirectional)
        )
    assert tokens[0] == tokens[1] and len({tuple(row) for row in tokens[0]}) > 1
