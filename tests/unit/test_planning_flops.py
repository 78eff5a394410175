"""Counted operations beside those that XLA counts in the training step."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from planning_runs import small_run

from t5x_like.config import RunConfig
from t5x_like.planning.flops import (
    cross_attention_premium,
    executed_flops,
    forward_flops,
    six_n_d,
    training_flops,
)
from t5x_like.planning.tokens import tokens_per_step
from t5x_like.program import assemble


def counted_by_xla(run: RunConfig) -> float:
    """FLOPs of the train step before XLA optimises it, elementwise work among them."""
    program = assemble(run, jax.devices()[:1])
    batch = {
        name: {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in features.items()}
        for name, features in program.batch_spec.items()
    }
    return program.train_step.lower(program.abstract_state, batch).cost_analysis()["flops"]


def wide_run(family: str, remat: str) -> RunConfig:
    """Unscanned, since XLA counts the body of a scan once, and so wide that what is no product hardly counts."""
    run = small_run(
        family, width=1024, rows=16, length=128, scan_layers=False, remat=remat, dtype="float32", vocab_size=4096
    )
    undropped = {
        name: dataclasses.replace(
            stack, dropout_rate=0.0, num_heads=16, num_kv_heads=16 * stack.num_kv_heads // stack.num_heads, head_dim=64
        )
        for name, stack in run.model.stacks.items()
    }
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **undropped))


CASES = [("t5_1_1", "none"), ("llama_3", "full")]
MORE = [
    (family, remat)
    for family in ("t5_1_1", "llama_3", "bert", "mixtral", "gemma_2", "t5gemma")
    for remat in ("none", "dots", "full")
    if (family, remat) not in CASES
]


@pytest.mark.parametrize(("family", "remat"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in MORE)])
def test_executed_flops_are_those_of_xla(family: str, remat: str) -> None:
    run = wide_run(family, remat)
    assert 1.0 <= counted_by_xla(run) / executed_flops(run) < 1.02


def test_model_flops_are_what_is_executed_where_nothing_is_computed_twice_or_unseen() -> None:
    run = small_run("bert", attention="cudnn", dtype="bfloat16")
    assert executed_flops(run) == training_flops(run) == 3 * sum(forward_flops(run).values())
    again = dataclasses.replace(run, model=dataclasses.replace(run.model, remat="full"))
    assert training_flops(again) == training_flops(run) < executed_flops(again)


def test_an_encoder_decoder_pays_for_cross_attention_and_the_others_do_not() -> None:
    # With d_ff = 4 d and gated: 4 d^2 of cross-attention over two cells beside 2 (4 d^2 + 12 d^2), at short rows.
    run = small_run("t5_1_1", width=256, length=16, vocab_size=512)
    assert cross_attention_premium(run) == pytest.approx(4 / 32, rel=0.1)
    assert cross_attention_premium(small_run("llama_3")) == 0


def test_six_n_d_leaves_out_attention() -> None:
    run = small_run("llama_3", length=512, tie_embeddings=False)
    parts = forward_flops(run)
    products = sum(count for part, count in parts.items() if not part.endswith("scores"))
    kernels = products // (2 * tokens_per_step(run))
    assert six_n_d(run, kernels) == 3 * products < training_flops(run)
