"""Untrained models of each layout, and decoding without a cache as a reference."""

from __future__ import annotations

import functools

import jax
import numpy as np

from t5x_like.config import CausalLM, DataConfig, ModelConfig, RunConfig, StackConfig, TrainingConfig, ul2
from t5x_like.program import Program, build_program

VOCABULARY = 64
EOS = 1
PROMPTS = [[5, 9, 33, 7, 1], [8], [12, 40, 41, 42, 3, 3, 3, 17, 20, 21, 50, 51, 52, 53, 54, 55, 56, 1], [60, 2]]


ALLOWED = (np.arange(VOCABULARY) % 7 != 0) & (np.arange(VOCABULARY) != EOS)


@functools.cache
def untrained(layout: str, positions: str = "relative_bias", max_positions: int = 64) -> tuple[Program, dict]:
    """Return a program, and parameters so large that the next token depends on all tokens before it."""
    stack = StackConfig(
        num_layers=2,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=64,
        positions=positions,
        max_positions=max_positions,
    )
    encoder = stack if layout == "encoder_decoder" else None
    run = RunConfig(
        name="tiny",
        model=ModelConfig(encoder=encoder, decoder=stack, vocab_size=VOCABULARY),
        data=DataConfig(
            layout=layout,
            mixture=(CausalLM(),) if layout == "causal_lm" else ul2(),
            inputs_length=32,
            targets_length=32,
        ),
        training=TrainingConfig(num_train_steps=1, global_batch_size=4),
    )
    program = build_program(run, jax.devices()[:1])
    rng = np.random.default_rng(0)
    return program, jax.tree.map(lambda leaf: rng.normal(0.0, 0.4, leaf.shape).astype(np.float32), program.spec.params)


def recompute(program: Program, params, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """Decode greedily without a cache, one row at a time. Attention is causal, so padding has no effect."""
    layout = program.run.data.layout
    logits = jax.jit(lambda params, batch: program.model(params)(batch)[0])

    def row(tokens: list[int]) -> np.ndarray:
        return np.pad(np.array(tokens, np.int32), (0, 48 - len(tokens)))[None]

    def next_token(prompt: list[int], tokens: list[int]) -> int:
        stream = [0, *tokens] if layout == "encoder_decoder" else [0, *prompt, *tokens]
        batch = {"decoder_input_tokens": row(stream)}
        if layout == "encoder_decoder":
            batch["encoder_input_tokens"] = row(prompt)
        if layout == "prefix_lm":
            batch["decoder_causal_attention"] = row([1] * (len(prompt) + 1))
        return int(np.where(ALLOWED, logits(params, batch)[len(stream) - 1], -np.inf).argmax())

    results = []
    for prompt in prompts:
        tokens: list[int] = []
        while len(tokens) < steps:
            tokens.append(next_token(prompt, tokens))
        results.append(tokens)
    return results
