"""How many parameters a configuration has and how many operations it costs: arithmetic, without jax."""

from __future__ import annotations

from collections.abc import Mapping

from t5x_like.config.batch import ArraySpec
from t5x_like.config.model import ModelConfig, StackConfig


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part: token_embedder, encoder and decoder (as far as they are there), head. A tied table is counted
    once, as token_embedder."""
    output = next(reversed(config.stacks.values()))
    d = output.d_model
    head = 0 if config.tie_embeddings else d * config.vocab_size
    if config.head_bias:
        head += config.vocab_size
    if config.head_transform:
        head += d * d + _bias(output, d) + _norm(output)
    stacks = {
        name: _stack(stack, config, cross=name == "decoder" and config.encoder is not None)
        for name, stack in config.stacks.items()
    }
    return {"token_embedder": config.vocab_size * d, **stacks, "head": head}


def _bias(stack: StackConfig, width: int) -> int:
    return width if stack.use_bias else 0


def _norm(stack: StackConfig) -> int:
    return stack.d_model + (stack.d_model if stack.norm == "layernorm" and stack.use_bias else 0)


def _stack(stack: StackConfig, config: ModelConfig, *, cross: bool) -> int:
    q_width, kv_width = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    attention = _attention_kernels(stack) + _bias(stack, q_width + 2 * kv_width + stack.d_model) + _norm(stack)
    inner = 2 if stack.mlp_gated else 1
    mlp = _mlp_kernels(stack) + _bias(stack, inner * stack.d_ff + stack.d_model) + _norm(stack)
    total = stack.num_layers * ((2 if cross else 1) * attention + mlp)
    if stack.positions == "relative_bias":
        total += stack.relative_bias_buckets * stack.num_heads
    if stack.positions == "learned":
        total += stack.max_positions * stack.d_model
    norms = (stack.norm_placement == "pre") + config.embedding_norm
    return total + norms * _norm(stack)


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
        total += rows * _layers_flops(config.encoder, length, pairs=length * length)
    if config.decoder is not None:
        rows, length = target
        total += rows * _layers_flops(config.decoder, length, pairs=length * (length + 1) // 2)
        if config.encoder is not None:
            total += rows * _cross_flops(config.decoder, source[1], length)
    output = next(reversed(config.stacks.values()))
    rows, length = target if config.decoder is not None else source
    head = output.d_model * config.vocab_size + (output.d_model**2 if config.head_transform else 0)
    return total + 2 * rows * length * head


def _row_shape(features: Mapping[str, ArraySpec], name: str) -> tuple[int, int]:
    rows, length = features[name].shape
    return rows, length


def _layers_flops(stack: StackConfig, length: int, *, pairs: int) -> int:
    products = 2 * length * (_attention_kernels(stack) + _mlp_kernels(stack))
    return stack.num_layers * (products + 4 * stack.num_heads * stack.head_dim * pairs)


def _cross_flops(stack: StackConfig, source: int, target: int) -> int:
    d, h = stack.d_model, stack.head_dim
    products = 2 * target * 2 * d * stack.num_heads * h + 2 * source * 2 * d * stack.num_kv_heads * h
    return stack.num_layers * (products + 4 * stack.num_heads * h * source * target)
