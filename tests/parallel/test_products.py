"""The same loss and gradients on products of kinds of parallelism, packed, with a split sequence among them.

One device and eight differ by rounding only: the loss by 1e-5 of itself, each gradient by 1e-4 of itself or 1e-5 of the
largest one of the model (float32).
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import numpy as np
import pytest
from programs import ARCHITECTURES, batch_for, run_for

from t5x_like.config import ConfigError, DcnConfig, PartitioningConfig, RunConfig
from t5x_like.decoding.generate import generate_tokens
from t5x_like.monitoring.metrics import value
from t5x_like.program import Program, assemble

Tree = Any
COMPLAINT = "Involuntary full rematerialization"


def mesh_of(*, slices: int = 1, **degrees: Any) -> PartitioningConfig:
    return PartitioningConfig(**{"fsdp": 1, **degrees}, dcn=DcnConfig(data=slices))


ONE_DEVICE = mesh_of()
CONTEXT = mesh_of(context=8)
PRODUCT = mesh_of(fsdp=2, context=2, tensor=2)
SLICES = mesh_of(slices=2, fsdp=2, context=2)
GATHERED = mesh_of(fsdp=2, context=4, context_attention="all_gather")
MESHES = {"context": CONTEXT, "fsdp_context_tensor": PRODUCT, "slices": SLICES, "gathered": GATHERED}


@functools.cache
def one_device(architecture: str) -> tuple[Tree, Tree, Tree]:
    """The state before a step on one device, and the gradients (a tenth of them) and metrics of the step."""
    program = assemble(run_for(architecture, ONE_DEVICE, packed=True), jax.devices()[:1])
    start = jax.tree.map(np.asarray, program.init())
    state, metrics = program.train_step(placed(program, start), program.put(batch_for(program.run)))
    return start, *jax.tree.map(np.asarray, (state["opt_state"].mu, metrics))


def placed(program: Program, state: Tree) -> Tree:
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state))


def check(architecture: str, mesh: PartitioningConfig, capfd: pytest.CaptureFixture[str]) -> Program:
    start, expected, expected_metrics = one_device(architecture)
    capfd.readouterr()
    program = assemble(run_for(architecture, mesh, packed=True), jax.devices())
    assert "_segment_ids" in str(list(program.batch_spec["main"])), "rows are packed"
    state, metrics = program.train_step(placed(program, start), program.put(batch_for(program.run)))
    assert COMPLAINT not in capfd.readouterr().err
    assert value(metrics["loss"]) == pytest.approx(value(expected_metrics["loss"]), rel=1e-5)
    assert value(metrics["gradient_norm"]) == pytest.approx(value(expected_metrics["gradient_norm"]), rel=1e-4)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), state["opt_state"].mu, expected
    )
    return program


def test_a_prefix_lm_on_a_product_of_three(capfd: pytest.CaptureFixture[str]) -> None:
    """Packed prefixes, T5's bias, a tied head; sequence, heads and parameters split."""
    program = check("prefix_lm", PRODUCT, capfd)
    tokens = program.put(batch_for(program.run))["main"]["decoder_input_tokens"]
    assert {shard.data.shape for shard in tokens.addressable_shards} == {(8, 16)}, "half of the rows, half of each"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str, mesh: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Dropout in the encoder-decoder: the same numbers are dropped, however the sequence is split."""
    program = check(architecture, MESHES[mesh], capfd)
    assert program.mesh.size == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "mesh"),
    [
        ("experts", mesh_of(fsdp=2, expert=2, context=2)),
        ("experts", mesh_of(expert=2, context=2, tensor=2)),
        ("experts", mesh_of(slices=2, expert=4)),
        ("all_experts", mesh_of(fsdp=2, expert=2, context=2)),
    ],
    ids=lambda x: x if isinstance(x, str) else "x".join(f"{n}{d}" for n, d in x.degrees.items() if d > 1),
)
def test_experts_with_windows_and_fewer_key_heads(
    architecture: str, mesh: PartitioningConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    check(architecture, mesh, capfd)


@pytest.mark.slow
def test_merged_attention_windows_and_soft_caps(capfd: pytest.CaptureFixture[str]) -> None:
    check("merged", PRODUCT, capfd)


@pytest.mark.slow
def test_a_generator_and_a_discriminator(capfd: pytest.CaptureFixture[str]) -> None:
    check("electra", PRODUCT, capfd)


@pytest.mark.slow
def test_disentangled_positions_gather_keys_and_values(capfd: pytest.CaptureFixture[str]) -> None:
    check("distances", mesh_of(fsdp=2, context=4), capfd)


LENGTH = 8 * 13


def shapes(run: RunConfig) -> set[tuple[int, ...]]:
    """Of all arrays of floats on a device in the compiled training step."""
    program = assemble(run, jax.devices())
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(program.batch_spec))
    text = program.train_step.lower(program.abstract_state, batch).compile().as_text()
    found = re.findall(r"\bf32\[([\d,]+)\]", text)
    return {tuple(map(int, dims.split(","))) for dims in found}


def test_no_device_has_a_whole_row_of_states_or_more_scores_than_those_of_two_blocks() -> None:
    """Of rows of 104 cells (no other dimension has that size) on eight devices, in forward and backward pass."""
    here = shapes(run_for("prefix_lm", CONTEXT, length=LENGTH // 2))
    assert not [shape for shape in here if LENGTH in shape]
    assert [shape for shape in here if shape[-2:] == (LENGTH // 8, LENGTH // 8)], "scores of a block with another"


@pytest.mark.slow
def test_gathered_keys_and_values_leave_scores_split() -> None:
    mesh = mesh_of(context=8, context_attention="all_gather")
    here = shapes(run_for("decoder", mesh, length=LENGTH // 2))
    assert not [shape for shape in here if shape.count(LENGTH) > 1]
    whole = {shape for shape in here if LENGTH in shape}
    assert (16, LENGTH, 2, 16) in whole, "keys or values"
    assert not [shape for shape in whole if 64 in shape], "states"


def test_what_a_split_sequence_cannot_be_is_said_before_compilation() -> None:
    def problems(run: RunConfig) -> str:
        with pytest.raises(ConfigError) as error:
            assemble(run, jax.devices())
        return str(error.value)

    odd = problems(run_for("encoder_decoder", CONTEXT, length=12))
    assert "length of encoder_input_tokens: found 12, expected a multiple of 8 (context=8)" in odd
    twice = problems(run_for("decoder", mesh_of(fsdp=2, tensor=4, activation_rules=(("length", "tensor"),))))
    assert "activation decoder/query, axes batch, length, heads, head_dim: found mesh axis 'tensor' twice" in twice


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_greedy_tokens_do_not_depend_on_the_mesh(architecture: str) -> None:
    """Prompts whose first pass goes round a ring, then steps, which do not."""
    random = np.random.default_rng(0)
    prompts = [random.integers(1, 512, length).tolist() for length in (16, 11, 9, 13, 5, 16, 7, 2)]
    state = one_device(architecture)[0]
    found = []
    for mesh, devices in ((ONE_DEVICE, 1), (PRODUCT, 8)):
        program = assemble(run_for(architecture, mesh, packed=True), jax.devices()[:devices])
        # Larger than they start, so that one token is clearly the most likely.
        params = jax.tree.map(lambda x: 3 * x, placed(program, state)["params"])
        allowed = np.ones(program.run.model.vocab_size, bool)
        bidirectional = architecture == "prefix_lm"
        found.append(
            generate_tokens(program, params, prompts, allowed_V=allowed, max_new_tokens=6, bidirectional=bidirectional)
        )
    assert found[0] == found[1] and len({tuple(row) for row in found[0]}) > 1
