"""FLOPs by formula compared with XLA's count for the training step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.data_examples import text_store
from helpers.even_experts import even_experts
from helpers.planning_runs import small_run

from t5x_like.config import (
    CausalLM,
    MaskedDiffusion,
    MaskedLM,
    MuonConfig,
    Objective,
    PrefixLM,
    RunConfig,
    SpanCorruption,
    TokenizerConfig,
    ul2,
)
from t5x_like.data.stream.row_stream import TrainingStream
from t5x_like.kernels import expert_dispatch
from t5x_like.models import factory
from t5x_like.planning.estimate.flops import (
    cross_attention_premium,
    decode_flops,
    executed_flops,
    forward_flops,
    optimizer_flops,
    six_n_d,
    training_flops,
)
from t5x_like.planning.estimate.parameters import parameter_parts
from t5x_like.planning.estimate.tokens import tokens_per_step
from t5x_like.program import build_program


def counted_by_xla(run: RunConfig) -> float:
    """Return the FLOPs of the train step before XLA optimizes it, including elementwise operations."""
    program = build_program(run, jax.devices()[:1])
    batch = {
        name: {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in features.items()}
        for name, features in program.batch_spec.items()
    }
    return program.train_step.lower(program.abstract_state, batch).cost_analysis()["flops"]


def wide_run(family: str, remat: str) -> RunConfig:
    """Return a run without scan, whose body XLA counts once, and so wide that matrix products dominate."""
    run = small_run(
        family, width=1024, rows=16, length=128, scan_layers=False, remat=remat, dtype="float32", vocab_size=4096
    )
    undropped = {
        name: dataclasses.replace(
            stack, dropout_rate=0.0, num_heads=16, num_kv_heads=16 * stack.num_kv_heads // stack.num_heads, head_dim=64
        )
        for name, stack in run.model.stacks.items()
    }
    # The formula counts all pairs of attention, of which blocks skip some, and XLA counts a loop over blocks once.
    return dataclasses.replace(run, model=dataclasses.replace(run.model, attention="reference", **undropped))


CASES = [("t5_1_1", "none"), ("llama_3", "full")]
MORE = [
    (family, remat)
    for family in ("t5_1_1", "llama_3", "bert", "mixtral", "gemma_2", "t5gemma")
    for remat in ("none", "dots", "full")
    if (family, remat) not in CASES
] + [(family, remat) for family in ("t5_1_1", "bert") for remat in ("mlp", "attention", "qkv", "outputs")]


@pytest.mark.parametrize(("family", "remat"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in MORE)])
def test_executed_flops_match_xla(family: str, remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_dispatch, "grouped_mlp", even_experts)
    run = wide_run(family, remat)
    assert 1.0 <= counted_by_xla(run) / executed_flops(run) < 1.02


def test_executed_flops_equal_model_flops_without_recomputation_and_masking() -> None:
    run = small_run("bert", attention="cudnn", dtype="bfloat16")
    assert executed_flops(run) == training_flops(run) == 3 * sum(forward_flops(run).values())
    recomputed = dataclasses.replace(run, model=dataclasses.replace(run.model, remat="full"))
    assert training_flops(recomputed) == training_flops(run) < executed_flops(recomputed)


MIXTURES: dict[str, tuple[Objective, ...]] = {
    "prefix LM": (PrefixLM(name="s", min_target_fraction=0.1, max_target_fraction=0.9),),
    "pairs of windows": (PrefixLM(name="s", complementary_pairs=True),),
    "spans": (SpanCorruption(name="r"), SpanCorruption(name="x", t5_exact=True, noise_density=0.5)),
    "UL2": ul2(),
    "masked next token": (CausalLM(rate=1.0), MaskedLM(rate=1.0)),
    "masked diffusion": (MaskedDiffusion(),),
    "causal LM": (CausalLM(),),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_pairs_of_bidirectional_prefixes_are_those_of_the_rows(name: str, tmp_path: Path) -> None:
    """Of real rows every visible pair is counted, and the FLOPs agree with them within 1 %."""
    run = small_run("llama_3", rows=64)
    tokenizer = TokenizerConfig(kind="bytes", num_sentinels=64)
    fields = {"layout": "prefix_lm", "mixture": MIXTURES[name], "tokenizer": tokenizer}
    data = dataclasses.replace(run.data, **fields)
    run = dataclasses.replace(run, data=data)
    store = text_store(tmp_path / "store", ["a text that is long enough. " * 900], ["held out " * 9])
    stream = TrainingStream((store,), data, 64)
    pairs, rows, length = 0, 0, data.row_length
    for step in range(32):
        for features in stream.batch(step).values():
            prefix = features["decoder_causal_attention"].astype(np.int64)
            segments = features.get("decoder_segment_ids", np.ones_like(prefix))
            sizes = [(prefix * (segments == segment)).sum(axis=1) for segment in range(1, segments.max() + 1)]
            pairs += sum(int((size * (size - 1) // 2).sum()) for size in sizes)
            rows += len(prefix)
    decoder = run.model.decoder
    assert decoder is not None
    per_pair = 4 * decoder.num_heads * decoder.head_dim * decoder.num_layers * 64
    counted = per_pair * (length * (length + 1) / 2 + pairs / rows)
    assert forward_flops(run)["decoder scores"] == pytest.approx(counted, rel=0.01)
    if name == "masked diffusion":
        assert executed_flops(run) > training_flops(run) > 3 * per_pair * length**2 * 0.99


def test_only_an_encoder_decoder_has_cross_attention_overhead() -> None:
    # With d_ff = 4 d and gated: 4 d^2 of cross-attention over two token positions beside 2 (4 d^2 + 12 d^2), at short
    # rows.
    run = small_run("t5_1_1", width=256, length=16, vocab_size=512)
    assert cross_attention_premium(run) == pytest.approx(4 / 32, rel=0.1)
    assert cross_attention_premium(small_run("llama_3")) == 0


def test_six_n_d_excludes_attention_scores() -> None:
    run = small_run("llama_3", length=512, tie_embeddings=False)
    parts = forward_flops(run)
    products = sum(count for part, count in parts.items() if not part.endswith("scores"))
    kernels = products // (2 * tokens_per_step(run))
    assert six_n_d(run, kernels) == 3 * products < training_flops(run)


@pytest.mark.parametrize("family", ["llama_3", "t5_1_1", "mixtral"])
def test_decode_flops_are_products_with_the_kernels_and_the_cache(family: str) -> None:
    run = small_run(family, tie_embeddings=False)
    parts = parameter_parts(build_program(run, jax.devices()[:1]))
    decoder = run.model.decoder
    assert decoder is not None
    kernels = sum(
        part.active
        for name, part in parts.items()
        if name in ("decoder attention", "decoder MLP", "decoder router", "head")
    )
    if "decoder experts" in parts:
        kernels += parts["decoder experts"].active
    if "decoder cross-attention" in parts:
        # Queries and outputs: keys and values of the source are in the cache.
        kernels += parts["decoder cross-attention"].count // 2
    source = 24 if run.model.encoder is not None else 0
    heads = decoder.num_layers * decoder.num_heads * decoder.head_dim
    expected = 3 * (2 * kernels + 4 * heads * (100 + source))
    assert decode_flops(run.model, rows=3, length=100, encoder_length=source) == pytest.approx(expected)


def test_products_of_muon_match_xla() -> None:
    muon = MuonConfig()
    run = small_run("llama_3", width=256)
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, optimizer=muon))
    kernels = {path: kernel for path, kernel in factory.kernels(run.model).items() if "vocab" not in kernel.axes}
    axes = {path: {"kernel": kernel.axes} for path, kernel in kernels.items()}
    arrays = {path: {"kernel": jax.ShapeDtypeStruct(x.shape, "float32")} for path, x in kernels.items()}
    optimizer = muon.build(axes)
    lowered = jax.jit(optimizer.update).lower(
        arrays, jax.eval_shape(optimizer.init, arrays), arrays, learning_rate=jax.ShapeDtypeStruct((), "float32")
    )
    assert 1.0 <= lowered.cost_analysis()["flops"] / optimizer_flops(run) < 1.05
    assert executed_flops(run) - optimizer_flops(run) == executed_flops(small_run("llama_3", width=256))
