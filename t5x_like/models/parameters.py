"""How many parameters a configuration has and how many operations it costs: arithmetic, without jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from t5x_like.config.batch import ArraySpec
from t5x_like.config.model import ModelConfig, StackConfig


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part: token_embedder, encoder and decoder (as far as they are there), head, generator. A tied table
    is counted once, as token_embedder."""
    output = next(reversed(config.stacks.values()))
    stacks = {
        name: _stack(stack, config, cross=name == "decoder" and config.encoder is not None)
        for name, stack in config.stacks.items()
    }
    parts = {"token_embedder": config.vocab_size * config.table_width, **stacks}
    if config.generator is None:
        return {**parts, "head": _head(output, config)}
    # Its embeddings are the encoder's: it has a projection of its own, and neither positions nor their norm.
    shared = dataclasses.replace(config, embedding_width=config.table_width, embedding_norm=False)
    own = config.generator
    if own.positions == "learned":
        own = dataclasses.replace(own, positions="none")
    d = output.d_model
    return {
        **parts,
        "head": d * d + _bias(output, d) + d + 1,
        "generator": _stack(own, shared, cross=False) + _head(own, config),
    }


def _head(stack: StackConfig, config: ModelConfig) -> int:
    width = config.table_width
    total = _head_kernels(stack, config) - (width * config.vocab_size if config.tie_embeddings else 0)
    if config.head_bias:
        total += config.vocab_size
    if config.head_transform:
        total += _bias(stack, width) + _norm(stack, width)
    return total


def _head_kernels(stack: StackConfig, config: ModelConfig) -> int:
    """Elements of the head's matrices, a tied table among them."""
    if not config.head_transform:
        return stack.d_model * config.vocab_size
    return config.table_width * (stack.d_model + config.vocab_size)


def _bias(stack: StackConfig, width: int) -> int:
    return width if stack.use_bias else 0


def _norm(stack: StackConfig, width: int | None = None) -> int:
    width = width or stack.d_model
    return width + (width if stack.norm == "layernorm" and stack.use_bias else 0)


def _projection(stack: StackConfig, config: ModelConfig) -> int:
    """Elements of the matrix between embeddings and stack; 0 where they are of one width."""
    width = config.embedding_width or stack.d_model
    return 0 if width == stack.d_model else width * stack.d_model


def _stack(stack: StackConfig, config: ModelConfig, *, cross: bool) -> int:
    q_width, kv_width = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    attention = _attention_kernels(stack) + _bias(stack, q_width + 2 * kv_width + stack.d_model) + _norm(stack)
    inner = 2 if stack.mlp_gated else 1
    mlp = _mlp_kernels(stack) + _bias(stack, inner * stack.d_ff + stack.d_model) + _norm(stack)
    total = stack.num_layers * ((2 if cross else 1) * attention + mlp)
    if stack.positions == "relative_bias":
        total += stack.relative_bias_buckets * stack.num_heads
    width = config.embedding_width or stack.d_model
    if stack.positions == "learned":
        total += stack.max_positions * width
    if config.embedding_norm:
        total += _norm(stack, width)
    if stack.norm_placement == "pre":
        total += _norm(stack)
    projection = _projection(stack, config)
    return total + projection + (_bias(stack, stack.d_model) if projection else 0)


def _attention_kernels(stack: StackConfig) -> int:
    return stack.d_model * stack.head_dim * (2 * stack.num_heads + 2 * stack.num_kv_heads)


def _mlp_kernels(stack: StackConfig) -> int:
    return (3 if stack.mlp_gated else 2) * stack.d_model * stack.d_ff


def forward_flops(config: ModelConfig, features: Mapping[str, ArraySpec]) -> int:
    """Operations of matrix products (a multiply-add is 2) in one forward pass over a sub-batch of these shapes.

    Every cell counts, padding too, in all stacks and in the head; training costs three times as much. Causal attention
    counts the pairs that it needs, N (N + 1) / 2 per row; what a bidirectional prefix adds depends on the data and is
    left out. The formulas are those of the encoder-decoder in Raffel et al. 2020 with the keys and values of
    cross-attention moved to the source.
    """
    source = _row_shape(features, "encoder_input_tokens") if config.encoder is not None else (0, 0)
    target = _row_shape(features, "decoder_input_tokens") if config.decoder is not None else (0, 0)
    total = 0
    if config.encoder is not None:
        rows, length = source
        total += rows * _layers_flops(config.encoder, config, length, pairs=length * length)
    if config.decoder is not None:
        rows, length = target
        total += rows * _layers_flops(config.decoder, config, length, pairs=length * (length + 1) // 2)
        if config.encoder is not None:
            total += rows * _cross_flops(config.decoder, source[1], length)
    output = next(reversed(config.stacks.values()))
    rows, length = target if config.decoder is not None else source
    head = _head_kernels(output, config)
    if config.generator is not None:
        shared = dataclasses.replace(config, embedding_width=config.table_width)
        total += rows * _layers_flops(config.generator, shared, length, pairs=length * length)
        head = _head_kernels(config.generator, config) + output.d_model * (output.d_model + 1)
    return total + 2 * rows * length * head


def _row_shape(features: Mapping[str, ArraySpec], name: str) -> tuple[int, int]:
    rows, length = features[name].shape
    return rows, length


def _layers_flops(stack: StackConfig, config: ModelConfig, length: int, *, pairs: int) -> int:
    products = 2 * length * (_attention_kernels(stack) + _mlp_kernels(stack))
    layers = stack.num_layers * (products + 4 * stack.num_heads * stack.head_dim * pairs)
    return layers + 2 * length * _projection(stack, config)


def _cross_flops(stack: StackConfig, source: int, target: int) -> int:
    d, h = stack.d_model, stack.head_dim
    products = 2 * target * 2 * d * stack.num_heads * h + 2 * source * 2 * d * stack.num_kv_heads * h
    return stack.num_layers * (products + 4 * stack.num_heads * h * source * target)
