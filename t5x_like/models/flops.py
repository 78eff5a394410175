"""FLOPs of the forward pass of a configuration by arithmetic, without jax."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from t5x_like.config.batch_spec import REJECTED, ArraySpec
from t5x_like.config.model import LayerKind, ModelConfig, StackConfig


def _head_kernels(stack: StackConfig, config: ModelConfig) -> int:
    """Return the number of elements of the head's matrices, including a tied table."""
    if config.task_head is not None:
        return stack.d_model * ((stack.d_model if config.task_head.transform else 0) + config.task_head.outputs)
    if not config.lm_head_transform:
        return stack.d_model * config.vocab_size
    return config.lm_head_width * (stack.d_model + config.vocab_size)


def _projection(stack: StackConfig, config: ModelConfig) -> int:
    """Return the number of elements of the matrix from embeddings to the stack; 0 if they have the same width."""
    width = config.embedding_dim or stack.d_model
    return 0 if width == stack.d_model else width * stack.d_model


def _attention_kernels(stack: StackConfig) -> int:
    query_like = (3 if stack.attention_gate else 2) * stack.num_heads
    return stack.d_model * stack.head_dim * (query_like + 2 * stack.num_kv_heads)


def _mlp_kernels(stack: StackConfig) -> int:
    """Return the number of elements of the matrices of one MLP or expert."""
    return (3 if stack.mlp_gated else 2) * stack.d_model * stack.d_ff


def forward_flops(
    config: ModelConfig, features: Mapping[str, ArraySpec], *, prefixes: Sequence[tuple[int, float]] = ()
) -> int:
    """Return the FLOPs of one forward pass over a sub-batch of these shapes: the sum of `forward_flops_by_part`."""
    return sum(forward_flops_by_part(config, features, prefixes=prefixes).values())


def forward_flops_by_part(
    config: ModelConfig,
    features: Mapping[str, ArraySpec],
    *,
    all_pairs: bool = False,
    prefixes: Sequence[tuple[int, float]] = (),
) -> dict[str, int]:
    """Return the FLOPs of matrix products (2 per multiply-add) in one forward pass over a sub-batch of these shapes.

    Every token position counts, including padding, in all stacks and in the head; training costs three times as much.
    Causal attention counts the visible pairs, N (N + 1) / 2 per row, and local layers the pairs within their window.
    In a mixture of experts, the experts that a token is routed to and the shared ones count. The formulas follow the
    encoder-decoder of Raffel et al. 2020, with the keys and values of cross-attention counted on the source.

    Args:
      config: Model.
      features: Shapes of a sub-batch.
      all_pairs: Count all pairs of a query and a key, visible or not, as a backend with materialized scores does.
      prefixes: Lengths of the parts of a decoder's row that attend in both directions, with the mean number of each
        length in a row: the pairs that they add are counted.

    Returns:
      FLOPs by part. For each stack (encoder, decoder, generator) that exists: "<stack> projections" of attention,
      "<stack> scores" (products of queries with keys and of probabilities with values), "<stack> mlp" (including router
      and experts) and, for embeddings of another width, "<stack> embedding". Further "cross projections", "cross
      scores" and "head".
    """
    source = _row_shape(features, "encoder_input_tokens") if config.encoder is not None else (0, 0)
    target = _row_shape(features, "decoder_input_tokens") if config.decoder is not None else (0, 0)
    if f"{REJECTED}decoder_input_tokens" in features:
        target = 2 * target[0], target[1]
    parts: dict[str, int] = {}
    for name, stack in config.stacks.items():
        rows, length = source if name == "encoder" else target
        causal = name == "decoder"
        parts |= _layers_flops(name, stack, config, rows, length, causal=causal, all_pairs=all_pairs)
        if causal and prefixes and not all_pairs:
            kinds = collections.Counter(stack.layer_kinds)
            pairs = sum(count * _prefix_pairs(stack, kind, prefixes) for kind, count in kinds.items())
            parts[f"{name} scores"] += round(4 * stack.num_heads * stack.head_dim * rows * pairs)
    if config.decoder is not None and config.encoder is not None:
        parts |= _cross_flops(config.decoder, config.encoder.d_model, target[0], source[1], target[1])
    output = next(reversed(config.stacks.values()))
    rows, length = target if config.decoder is not None else source
    head = _head_kernels(output, config)
    if config.generator is not None:
        shared = dataclasses.replace(config, embedding_dim=config.lm_head_width)
        parts |= _layers_flops(
            "generator", config.generator, shared, rows, length, causal=False, all_pairs=all_pairs, distances=False
        )
        head = _head_kernels(config.generator, config) + output.d_model * (output.d_model + 1)
    if config.task_head is not None and config.task_head.pools:
        length = 1  # The states are pooled before the head.
    parts["head"] = 2 * rows * length * head
    return parts


def attention_output_flops(config: ModelConfig, features: Mapping[str, ArraySpec]) -> int:
    """Return the FLOPs of the products with the output kernels of attention in one forward pass over a sub-batch. They
    are a part of the projections of `forward_flops_by_part`."""
    stacks = [*config.stacks.items(), ("encoder", config.generator)]
    total = 0
    for name, stack in stacks:
        if stack is not None:
            rows, length = _row_shape(features, f"{name}_input_tokens")
            rows *= 2 if f"{REJECTED}{name}_input_tokens" in features else 1
            is_crossed = name == "decoder" and config.encoder is not None and stack.cross_attention == "separate"
            kernels = stack.num_layers * stack.d_model * stack.num_heads * stack.head_dim * (2 if is_crossed else 1)
            total += 2 * rows * length * kernels
    return total


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
    """Return the FLOPs of a stack's layers. `distances`: count the projections of disentangled positions."""
    mlp = stack.num_layers * _mlp_kernels(stack)
    if stack.experts is not None:
        more = stack.experts.experts_per_token + stack.experts.num_shared_experts - 1
        # The second term is the router, a product with one column per expert.
        mlp += len(stack.expert_layers) * (more * _mlp_kernels(stack) + stack.experts.num_experts * stack.d_model)
    tokens = rows * length
    projections = stack.num_layers * 2 * tokens * _attention_kernels(stack)
    if distances:
        projections += _distance_flops(stack)
    # Keys and values of LongT5's sums of blocks, which all tokens attend to.
    blocks = stack.num_blocks(length)
    projections += stack.num_layers * 2 * rows * blocks * 2 * stack.d_model * stack.num_kv_heads * stack.head_dim
    pairs = sum(length**2 if all_pairs else _pairs(stack, kind, length, causal=causal) for kind in stack.layer_kinds)
    pairs += stack.num_layers * length * blocks
    width = stack.num_heads * stack.head_dim
    # Two products (queries with keys, probabilities with values) of 2 FLOPs per multiply-add.
    scores = 4 * width * rows * pairs
    if stack.positions == "disentangled":
        # Scores of each query and of each key with all distances.
        # Two products per token, with 2 * buckets distances each.
        scores += stack.num_layers * 2 * 2 * width * tokens * 2 * stack.relative_bias_buckets
    parts = {
        f"{name} projections": projections,
        f"{name} scores": scores,
        f"{name} mlp": 2 * tokens * mlp,
    }
    embedding = 2 * tokens * _projection(stack, config)
    return {**parts, f"{name} embedding": embedding} if embedding else parts


def _prefix_pairs(stack: StackConfig, kind: LayerKind, prefixes: Sequence[tuple[int, float]]) -> float:
    """Return the mean number of pairs in a row whose key is to the right of the query and in the same prefix."""
    return sum(
        share * (_pairs(stack, kind, length, causal=False) - _pairs(stack, kind, length, causal=True))
        for length, share in prefixes
        if length > 1
    )


def _pairs(stack: StackConfig, kind: LayerKind, length: int, *, causal: bool) -> int:
    """Return the number of visible pairs of a query and a key in a row."""
    left, right = stack.sliding_window if kind == "local" and stack.sliding_window is not None else (length, length)
    right = 0 if causal else right
    to_left, to_right = min(left, length - 1), min(right, length - 1)

    def within(distance: int) -> int:
        # sum of (length - d) for d = 1 .. distance: the pairs at most `distance` apart on one side.
        return distance * length - distance * (distance + 1) // 2

    return length + within(to_left) + within(to_right)


def _distance_flops(stack: StackConfig) -> int:
    """Return the FLOPs of the keys and queries of disentangled positions, which are computed once per batch."""
    if stack.positions != "disentangled":
        return 0
    heads = stack.num_heads + stack.num_kv_heads
    return stack.num_layers * 2 * 2 * stack.relative_bias_buckets * stack.d_model * heads * stack.head_dim


def _cross_flops(stack: StackConfig, source_width: int, rows: int, source: int, target: int) -> dict[str, int]:
    d, h = stack.d_model, stack.head_dim
    # Keys and values are projected from the source; queries and the output from the target.
    products = 2 * source * 2 * source_width * stack.num_kv_heads * h
    if stack.cross_attention == "separate":
        products += 2 * target * 2 * d * stack.num_heads * h
    return {
        "cross projections": stack.num_layers * rows * products,
        "cross scores": stack.num_layers * rows * 4 * stack.num_heads * h * source * target,
    }
