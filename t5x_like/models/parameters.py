"""How many parameters a configuration has and how many operations it costs: arithmetic, without jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from t5x_like.config.batch import ArraySpec
from t5x_like.config.model import LayerKind, ModelConfig, StackConfig


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part: token_embedder, encoder and decoder (as far as they are there), head, generator, and the
    rarer tables that a model may have beside them. A tied table is counted once, as token_embedder."""
    output = next(reversed(config.stacks.values()))
    stacks = {
        name: _stack(stack, config, reads=config.encoder if name == "decoder" else None)
        for name, stack in config.stacks.items()
    }
    parts = {"token_embedder": config.vocab_size * config.table_width, **stacks}
    if config.separate_encoder_embeddings and config.encoder is not None:
        parts["encoder_token_embedder"] = config.vocab_size * config.encoder.d_model
    if config.unscaled_token is not None:
        parts["unscaled_embedding"] = config.table_width
    if config.generator is None:
        return {**parts, "head": _head(output, config)}
    # Its embeddings are the encoder's: it has a projection of its own, and neither positions nor their norm.
    shared = dataclasses.replace(config, embedding_width=config.table_width, embedding_norm=False)
    own = dataclasses.replace(config.generator, token_types=0)
    if own.positions == "learned":
        own = dataclasses.replace(own, positions="none")
    d = output.d_model
    return {
        **parts,
        "head": d * d + _bias(output, d) + d + 1,
        "generator": _stack(own, shared, reads=None) + _head(own, config),
    }


def _head(stack: StackConfig, config: ModelConfig) -> int:
    if config.task_head is not None:
        biases = (stack.d_model if config.task_head.transform else 0) + config.task_head.outputs
        return _head_kernels(stack, config) + biases
    width = config.table_width
    total = _head_kernels(stack, config) - (width * config.vocab_size if config.tie_embeddings else 0)
    if config.head_bias:
        total += config.vocab_size
    if config.head_transform:
        total += _bias(stack, width) + _norm(stack, width)
    return total


def _head_kernels(stack: StackConfig, config: ModelConfig) -> int:
    """Elements of the head's matrices, a tied table among them."""
    if config.task_head is not None:
        return stack.d_model * ((stack.d_model if config.task_head.transform else 0) + config.task_head.outputs)
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


def _stack(stack: StackConfig, config: ModelConfig, *, reads: StackConfig | None) -> int:
    """`reads` is the encoder beside a decoder."""
    layer = _attention(stack, stack.d_model) + _mlp(stack)
    if reads is not None and stack.cross_attention == "separate":
        layer += _attention(stack, reads.d_model)
    if stack.positions == "relative_bias" and stack.relative_bias_per_layer:
        layer += stack.relative_bias_buckets * stack.num_heads
    total = stack.num_layers * layer
    if stack.positions == "relative_bias" and not stack.relative_bias_per_layer:
        total += stack.relative_bias_buckets * stack.num_heads
    if stack.positions == "disentangled":
        total += 2 * stack.relative_bias_buckets * stack.d_model + _norm(stack)
    width = config.embedding_width or stack.d_model
    total += stack.token_types * width
    if stack.positions == "learned":
        total += stack.max_positions * width
    if config.embedding_norm:
        total += _norm(stack, width)
    if stack.norm_placement != "post":
        total += _norm(stack)
    if not stack.first_layer_attention_norm:
        total -= _norm(stack)
    projection = _projection(stack, config)
    return total + projection + (_bias(stack, stack.d_model) if projection else 0)


def _branch_norms(stack: StackConfig) -> int:
    return (2 if stack.norm_placement == "both" else 1) * _norm(stack)


def _attention(stack: StackConfig, kv_width: int) -> int:
    """One attention of a layer with its norms; keys and values come from states of `kv_width`."""
    q, kv = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    kernels = 2 * stack.d_model * q + 2 * kv_width * kv
    qk_norms = 2 * _norm(stack, stack.head_dim) if stack.qk_norm else 0
    return kernels + _bias(stack, q + 2 * kv + stack.d_model) + qk_norms + _branch_norms(stack)


def _mlp(stack: StackConfig) -> int:
    if stack.experts is not None:
        count = stack.experts.num_experts
        return count * _mlp_kernels(stack) + count * stack.d_model + _branch_norms(stack)
    inner = 2 if stack.mlp_gated else 1
    return _mlp_kernels(stack) + _bias(stack, inner * stack.d_ff + stack.d_model) + _branch_norms(stack)


def _attention_kernels(stack: StackConfig) -> int:
    return stack.d_model * stack.head_dim * (2 * stack.num_heads + 2 * stack.num_kv_heads)


def _mlp_kernels(stack: StackConfig) -> int:
    """Of one MLP or expert."""
    return (3 if stack.mlp_gated else 2) * stack.d_model * stack.d_ff


def forward_flops(config: ModelConfig, features: Mapping[str, ArraySpec]) -> int:
    """Operations of one forward pass over a sub-batch of these shapes: the sum of `forward_flops_by_part`."""
    return sum(forward_flops_by_part(config, features).values())


def forward_flops_by_part(
    config: ModelConfig, features: Mapping[str, ArraySpec], *, all_pairs: bool = False
) -> dict[str, int]:
    """Operations of matrix products (a multiply-add is 2) in one forward pass over a sub-batch of these shapes.

    Every cell counts, padding too, in all stacks and in the head; training costs three times as much. Causal attention
    counts the pairs that it needs, N (N + 1) / 2 per row, and local layers those of their window; what a bidirectional
    prefix adds depends on the data and is left out. Of experts, those that a token takes count, however they are
    computed. The formulas are those of the encoder-decoder in Raffel et al. 2020 with the keys and values of
    cross-attention moved to the source.

    Args:
      config: The model.
      features: A sub-batch.
      all_pairs: Count all pairs of a query and a key, seen or not, as a backend that materialises scores computes them.

    Returns:
      By stack (encoder, decoder, generator), as far as they are there: "<stack> projections" of attention, "<stack>
      scores" (products of queries with keys and of probabilities with values), "<stack> mlp" (router and experts among
      them) and, of embeddings of another width, "<stack> embedding"; "cross projections", "cross scores"; "head".
    """
    source = _row_shape(features, "encoder_input_tokens") if config.encoder is not None else (0, 0)
    target = _row_shape(features, "decoder_input_tokens") if config.decoder is not None else (0, 0)
    parts: dict[str, int] = {}
    for name, stack in config.stacks.items():
        rows, length = source if name == "encoder" else target
        parts |= _layers_flops(name, stack, config, rows, length, causal=name == "decoder", all_pairs=all_pairs)
    if config.decoder is not None and config.encoder is not None:
        parts |= _cross_flops(config.decoder, config.encoder.d_model, target[0], source[1], target[1])
    output = next(reversed(config.stacks.values()))
    rows, length = target if config.decoder is not None else source
    head = _head_kernels(output, config)
    if config.generator is not None:
        shared = dataclasses.replace(config, embedding_width=config.table_width)
        parts |= _layers_flops(
            "generator", config.generator, shared, rows, length, causal=False, all_pairs=all_pairs, distances=False
        )
        head = _head_kernels(config.generator, config) + output.d_model * (output.d_model + 1)
    if config.task_head is not None and config.task_head.kind != "token_classification":
        length = 1  # Pooled first.
    parts["head"] = 2 * rows * length * head
    return parts


def _row_shape(features: Mapping[str, ArraySpec], name: str) -> tuple[int, int]:
    rows, length = features[name].shape
    return rows, length


def _layers_flops(
    name: str,
    stack: StackConfig,
    config: ModelConfig,
    rows: int,
    length: int,
    *,
    causal: bool,
    all_pairs: bool,
    distances: bool = True,
) -> dict[str, int]:
    """`distances`: whether the states of disentangled positions go through the projections, once per batch."""
    mlp = _mlp_kernels(stack)
    if stack.experts is not None:
        mlp = stack.experts.experts_per_token * mlp + stack.experts.num_experts * stack.d_model
    tokens = rows * length
    projections = stack.num_layers * 2 * tokens * _attention_kernels(stack)
    if distances:
        projections += _distance_flops(stack)
    pairs = sum(length**2 if all_pairs else _pairs(stack, kind, length, causal=causal) for kind in stack.layer_kinds)
    width = stack.num_heads * stack.head_dim
    scores = 4 * width * rows * pairs
    if stack.positions == "disentangled":
        # Each query with all distances, and each key.
        scores += stack.num_layers * 2 * 2 * width * tokens * 2 * stack.relative_bias_buckets
    parts = {
        f"{name} projections": projections,
        f"{name} scores": scores,
        f"{name} mlp": stack.num_layers * 2 * tokens * mlp,
    }
    embedding = 2 * tokens * _projection(stack, config)
    return {**parts, f"{name} embedding": embedding} if embedding else parts


def _pairs(stack: StackConfig, kind: LayerKind, length: int, *, causal: bool) -> int:
    """Queries and keys that see each other in a row."""
    left, right = stack.window if kind == "local" and stack.window is not None else (length, length)
    right = 0 if causal else right
    to_left, to_right = min(left, length - 1), min(right, length - 1)

    def within(distance: int) -> int:
        return distance * length - distance * (distance + 1) // 2

    return length + within(to_left) + within(to_right)


def _distance_flops(stack: StackConfig) -> int:
    """Keys and queries of the distances of disentangled positions: once per batch."""
    if stack.positions != "disentangled":
        return 0
    heads = stack.num_heads + stack.num_kv_heads
    return stack.num_layers * 2 * 2 * stack.relative_bias_buckets * stack.d_model * heads * stack.head_dim


def _cross_flops(stack: StackConfig, source_width: int, rows: int, source: int, target: int) -> dict[str, int]:
    d, h = stack.d_model, stack.head_dim
    products = 2 * source * 2 * source_width * stack.num_kv_heads * h
    if stack.cross_attention == "separate":
        products += 2 * target * 2 * d * stack.num_heads * h
    return {
        "cross projections": stack.num_layers * rows * products,
        "cross scores": stack.num_layers * rows * 4 * stack.num_heads * h * source * target,
    }
