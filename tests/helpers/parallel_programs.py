"""Small runs of the architectures and random batches for them, for the tests on meshes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from t5x_like.config import (
    AdamWConfig,
    CausalLM,
    DataConfig,
    MaskedLM,
    ModelConfig,
    MoEConfig,
    Objective,
    PrefixLM,
    RunConfig,
    ScheduleConfig,
    ShardingConfig,
    StackConfig,
    TrainingConfig,
    batch_spec,
)
from t5x_like.config.objectives import Layout
from t5x_like.program import Program
from t5x_like.utils.type_aliases import PyTree

ROWS, VOCABULARY = 16, 512
ARCHITECTURES = ("encoder_decoder", "prefix_lm", "decoder", "encoder")


def run_for(
    architecture: str, sharding: ShardingConfig, *, packed: bool = False, length: int = 16, **training: Any
) -> RunConfig:
    """Return a small run of an architecture.

    The architectures differ in features with different shardings: relative bias, rotary and learned positions, fewer
    key heads than the tensor degree, biases, tied and untied heads, dropout.
    """
    stack = StackConfig(num_layers=2, d_model=64, num_heads=4, num_kv_heads=4, head_dim=16, d_ff=128)
    causal = dataclasses.replace(stack, relative_bias_bidirectional=False)
    grouped = dataclasses.replace(stack, positions="rope", num_kv_heads=2)
    bert = dataclasses.replace(
        stack,
        positions="learned",
        max_positions=32,
        norm="layernorm",
        norm_placement="post",
        use_bias=True,
        mlp_gated=False,
        mlp_activation="gelu",
    )
    dropped = dataclasses.replace(stack, dropout_rate=0.1)
    models = {
        "encoder_decoder": ModelConfig(encoder=dropped, decoder=causal, vocab_size=VOCABULARY),
        "prefix_lm": ModelConfig(encoder=None, decoder=stack, vocab_size=VOCABULARY, tie_embeddings=True),
        "decoder": ModelConfig(encoder=None, decoder=grouped, vocab_size=VOCABULARY, remat="full"),
        "encoder": ModelConfig(
            encoder=bert,
            decoder=None,
            vocab_size=VOCABULARY,
            tie_embeddings=True,
            embedding_norm=True,
            lm_head_transform=True,
            head_bias=True,
        ),
    }
    models["electra"] = dataclasses.replace(
        models["encoder"],
        generator=dataclasses.replace(bert, d_model=32, num_heads=4, num_kv_heads=4, head_dim=8, d_ff=64),
        embedding_dim=48,
    )
    rotary = dataclasses.replace(
        stack, positions="rope", layer_pattern=("local", "global"), sliding_window=(5, 3), qk_norm=True
    )
    models["experts"] = ModelConfig(
        encoder=None,
        decoder=dataclasses.replace(rotary, num_kv_heads=2, experts=MoEConfig(num_experts=4, num_shared_experts=1)),
        vocab_size=VOCABULARY,
    )
    experts = MoEConfig(num_experts=4, num_shared_experts=1, scoring="sigmoid", bias_update_rate=0.01)
    models["balanced_experts"] = dataclasses.replace(
        models["experts"], decoder=dataclasses.replace(models["experts"].decoder, experts=experts)
    )
    models["distances"] = dataclasses.replace(
        models["encoder"],
        encoder=dataclasses.replace(
            bert, positions="disentangled", relative_bias_buckets=8, relative_bias_max_distance=16
        ),
    )
    models["merged"] = ModelConfig(
        encoder=rotary,
        decoder=dataclasses.replace(rotary, cross_attention="merged", attention_softcap=20.0),
        vocab_size=VOCABULARY,
        unscaled_embedding_token_id=7,
        tie_embeddings=True,
    )
    some_experts = MoEConfig(num_experts=4, experts_per_token=1, normalize_weights=False, layer_period=2, capacity=4)
    models["blocks"] = ModelConfig(
        encoder=dataclasses.replace(stack, layer_pattern=("local",), sliding_window=(3, 3), global_block_size=4),
        decoder=dataclasses.replace(causal, experts=some_experts),
        vocab_size=VOCABULARY,
    )
    models["gated"] = dataclasses.replace(
        models["prefix_lm"],
        decoder=dataclasses.replace(
            stack, norm="layernorm", norm_placement="normformer", attention_gate=True, depth_weights=True
        ),
    )
    layouts: dict[str, tuple[Layout, Objective]] = {
        "blocks": ("encoder_decoder", PrefixLM(name="s")),
        "gated": ("prefix_lm", PrefixLM(name="s")),
        "experts": ("causal_lm", CausalLM()),
        "balanced_experts": ("causal_lm", CausalLM()),
        "distances": ("encoder", MaskedLM()),
        "merged": ("encoder_decoder", PrefixLM(name="s")),
        "encoder_decoder": ("encoder_decoder", PrefixLM(name="s")),
        "prefix_lm": ("prefix_lm", PrefixLM(name="s")),
        "decoder": ("causal_lm", CausalLM()),
        "encoder": ("encoder", MaskedLM()),
        "electra": ("encoder", MaskedLM()),
    }
    layout, objective = layouts[architecture]
    options = {"optimizer": AdamWConfig(weight_decay=0.0), "max_gradient_norm": None} | training
    return RunConfig(
        name=architecture,
        model=models[architecture],
        data=DataConfig(
            layout=layout,
            mixture=(objective,),
            inputs_length=length,
            targets_length=0 if layout == "encoder" else length,
            example_mode="documents" if packed else "windows",
        ),
        training=TrainingConfig(
            num_train_steps=10,
            global_batch_size=ROWS,
            schedule=ScheduleConfig(kind="constant", learning_rate=1e-3, warmup_steps=0),
            **options,
        ),
        sharding=sharding,
    )


def batch_for(run: RunConfig, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Return a batch of random tokens in rows of random lengths, with a prefix of up to half a row and a loss on the
    rest.

    A packed row has three examples of random lengths, each with its prefix, and padding.
    """
    rng = np.random.default_rng(seed)
    shapes = batch_spec(run)["main"]
    batch = {}
    for name, array in shapes.items():
        if name == "denoiser_ids":
            batch[name] = np.zeros(array.shape, np.int32)
        elif name.endswith(("_segment_ids", "_positions")):
            batch[name] = np.zeros(array.shape, np.int32)
        elif name.endswith("_tokens"):
            batch[name] = rng.integers(1, VOCABULARY, array.shape).astype(np.int32)
    for stack in ("encoder", "decoder"):
        if f"{stack}_input_tokens" not in batch:
            continue
        rows, length = batch[f"{stack}_input_tokens"].shape
        positions = np.arange(length)
        stop = rng.integers(length // 2 + 2, length + 1, (rows, 1))
        prefix = rng.integers(1, length // 2, (rows, 1))
        if f"{stack}_segment_ids" in shapes:
            ends = np.sort([rng.choice(np.arange(2, length), 3, replace=False) for _ in range(rows)], axis=1)
            ids = 1 + (positions[None, :, None] >= ends[:, None, :]).sum(-1)
            starts = np.concatenate([np.zeros((rows, 1), int), ends], axis=1)[np.arange(rows)[:, None], ids - 1]
            batch[f"{stack}_segment_ids"] = np.where(ids > 3, 0, ids).astype(np.int32)
            batch[f"{stack}_positions"] = np.where(ids > 3, 0, positions - starts).astype(np.int32)
            stop, prefix = ends[:, 2:], starts + 1
        batch[f"{stack}_input_tokens"] *= positions < stop
        if f"{stack}_loss_weights" in shapes:
            batch[f"{stack}_loss_weights"] = ((positions < stop) & (positions >= prefix)).astype(np.int32)
        if f"{stack}_causal_attention" in shapes:
            batch[f"{stack}_causal_attention"] = (positions <= prefix).astype(np.int32)
    assert set(batch) == set(shapes)
    return {"main": batch}


def random_like(abstract: PyTree | None, seed: int) -> PyTree | None:
    """Return random parameters of the shapes of a tree on the host; None for None. Nothing is compiled."""
    random = np.random.default_rng(seed)
    return abstract and jax.tree.map(lambda x: 0.2 * random.standard_normal(x.shape, np.float32), abstract)


def start(program: Program, parts: dict[str, PyTree | None]) -> PyTree:
    """Return a training state of zeros with the given parts on the program's devices. Nothing is compiled."""
    abstract = {
        **program.abstract_state,
        "base": program.abstract_base,
        "teacher": program.abstract_teacher_params,
    }
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.abstract_state)
    state = {**zeros, **{name: part for name, part in parts.items() if part is not None}}
    return jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), state, {name: abstract[name] for name in state}
    )
