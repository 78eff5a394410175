"""FLOPs of training and decoding steps: the model's own, from which utilization is computed, and those executed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from t5x_like.config import RunConfig, batch_spec
from t5x_like.config.batch_spec import ArraySpec
from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.config.remat import kept_products
from t5x_like.kernels.attention import get_backend
from t5x_like.kernels.attention_backend import AttentionRequest
from t5x_like.kernels.auto_attention import choose
from t5x_like.models.factory import kernels
from t5x_like.models.flops import attention_output_flops, forward_flops_by_part
from t5x_like.planning.estimate.kv_cache_bytes import attended_tokens
from t5x_like.planning.estimate.tokens import prefix_lengths, tokens_per_step

BACKWARD = 2
"""Products of the backward pass per product of the forward pass: one for the inputs and one for the parameters."""


def training_flops(run: RunConfig) -> float:
    """Return the model FLOPs of a training step: three times those of the forward pass, without recomputation, and the
    forward pass of a teacher."""
    return float((1 + BACKWARD) * sum(forward_flops(run).values()) + _teacher_flops(run))


def _teacher_flops(run: RunConfig, *, all_pairs: bool = False) -> int:
    distillation = run.training.distillation
    teacher = None if distillation is None or distillation.top_k is not None else distillation.model
    if teacher is None:
        return 0
    if all_pairs:
        teacher = _with_padding(teacher)
    prefixes = prefix_lengths(run)
    return sum(
        sum(forward_flops_by_part(teacher, features, all_pairs=all_pairs, prefixes=prefixes).values())
        for features in batch_spec(run).values()
    )


def forward_flops(run: RunConfig) -> dict[str, int]:
    """Return the model FLOPs of the forward pass of a step over all sub-batches, by part: `models.flops`.

    In a prefix LM they include the pairs of tokens that its prefixes add to causal attention, on average.
    """
    total: Counter[str] = Counter()
    prefixes = prefix_lengths(run)
    for features in batch_spec(run).values():
        total.update(forward_flops_by_part(run.model, features, prefixes=prefixes))
    return dict(total)


def executed_flops(run: RunConfig) -> float:
    """Return the FLOPs of matrix products that the devices execute in a training step.

    They exceed the model's FLOPs for these reasons. The padding of a vocabulary is multiplied as its tokens are. All
    pairs of a query and a key are counted, masked or not; this is an upper bound, because backends that work in blocks
    skip masked blocks. The backward pass recomputes what was not saved: with attention by "reference" the scores; with
    a policy of `remat` both products of attention and all experts as well, and the products with parameters that the
    policy does not keep, except a last product whose result is not needed. The products of the optimizer (Muon) are
    added. Elementwise operations are not counted, and neither are the rows of no use in tiles of experts on CPUs and
    GPUs (`kernels.grouped_mlp`).
    """
    config = _with_padding(run.model)
    total = float(optimizer_flops(run) + _teacher_flops(run, all_pairs=True))
    for features in batch_spec(run).values():
        forward = forward_flops_by_part(config, features, all_pairs=True)
        outputs = attention_output_flops(config, features)
        total += (1 + BACKWARD) * sum(forward.values()) + _recomputed(config, forward, outputs)
    return total


def _with_padding(config: ModelConfig) -> ModelConfig:
    """Return the model with the padding of its vocabulary counted as tokens."""
    return dataclasses.replace(config, vocab_size=config.padded_vocab_size)


def optimizer_flops(run: RunConfig) -> int:
    """Return the FLOPs of the optimizer's matrix products in a step, over all matrices of the layers' kernels.

    The products of adapters are not counted: they are too small.
    """
    if run.training.lora is not None or run.training.optimizer.matmul_flops(1, 1) == 0:
        return 0
    total = 0
    for kernel in kernels(run.model).values():
        stacked, inputs, outputs = (
            math.prod(kernel.shape[part])
            for part in (
                slice(kernel.stacked),
                slice(kernel.stacked, kernel.split),
                slice(kernel.split, None),
            )
        )
        total += stacked * run.training.optimizer.matmul_flops(inputs, outputs)
    return total


def decode_flops(config: ModelConfig, *, rows: int, length: int, encoder_length: int = 0) -> float:
    """Return the FLOPs of matrix products in a decoding step of one token per row, with the padding of the vocabulary.

    Args:
      config: Model with a decoder.
      rows: Number of rows.
      length: Tokens of each row, the new one included. Global layers attend to all of them, local layers to those in
        their window.
      encoder_length: Tokens of the encoder's output, for cross-attention.
    """
    decoder = config.decoder
    assert decoder is not None
    # The encoder does not run again, and the keys and values of its output are cached: a source of length 0.
    features = {
        "encoder_input_tokens": ArraySpec((rows, 0), "int32"),
        "decoder_input_tokens": ArraySpec((rows, 1), "int32"),
    }
    parts = forward_flops_by_part(_with_padding(config), features, all_pairs=True)
    products = sum(
        count for part, count in parts.items() if not part.startswith("encoder ") and not part.endswith(" scores")
    )
    keys = attended_tokens(decoder, length) + decoder.num_layers * encoder_length
    return float(products + rows * 4 * decoder.num_heads * decoder.head_dim * keys)


def _recomputed(config: ModelConfig, forward: Mapping[str, int], outputs: int) -> float:
    """Return the FLOPs of the layers' forward pass that the backward pass recomputes.

    Args:
      config: Model.
      forward: FLOPs of the forward pass by part.
      outputs: Those of the products with the output kernels of attention.
    """
    by_kind = {
        kind: sum(count for part, count in forward.items() if part.split()[-1] == kind)
        for kind in ("projections", "scores")
    }
    # Every portable candidate of "auto" recomputes the scores.
    backend = choose(config.attention, None, AttentionRequest()).backend
    total = 0.5 * by_kind["scores"] if get_backend(backend).recomputes_scores else 0.0
    if config.remat == "none":
        return total
    kept = kept_products(config.remat)
    total += by_kind["scores"]
    total += 0 if "qkv" in kept else by_kind["projections"] - outputs
    total += 0 if "outputs" in kept else outputs
    for name, stack in [*config.stacks.items(), ("generator", config.generator)]:
        if stack is not None:
            shares = _mlp_shares(stack)
            # The result of an MLP is read by a norm after it, or by nothing in the backward pass.
            is_read = stack.norm_placement in ("post", "both") and "outputs" not in kept
            recomputed = shares.experts + ("mlp" not in kept) * shares.inner + is_read * shares.last
            # Without a name, the product of a router is kept by "dots" alone.
            recomputed += (config.remat != "dots") * shares.router
            total += forward[f"{name} mlp"] * recomputed
    return total


class _MlpShares(NamedTuple):
    """Fractions of the FLOPs of a stack's MLPs: products with the first kernels and with the last one of MLPs and
    shared experts, all products of routed experts, and those of routers."""

    inner: float
    last: float
    experts: float
    router: float


def _mlp_shares(stack: StackConfig) -> _MlpShares:
    kernels = 3 if stack.mlp_gated else 2
    if stack.experts is None:
        return _MlpShares((kernels - 1) / kernels, 1 / kernels, 0.0, 0.0)
    # In units of d_model * d_ff: the layers without experts have an MLP, the others experts and a router.
    with_experts = len(stack.expert_layers)
    dense = stack.num_layers - with_experts + with_experts * stack.experts.num_shared_experts
    routed = with_experts * kernels * stack.experts.experts_per_token
    router = with_experts * stack.experts.num_experts / stack.d_ff
    total = kernels * dense + routed + router
    return _MlpShares((kernels - 1) * dense / total, dense / total, routed / total, router / total)


def cross_attention_premium(run: RunConfig) -> float:
    """Return the FLOPs of cross-attention as a fraction of all other FLOPs of the step; 0 without cross-attention.

    This is the overhead of an encoder-decoder's two stacks over a single stack that reads the same tokens.
    """
    parts = forward_flops(run)
    cross = sum(count for part, count in parts.items() if part.startswith("cross "))
    return cross / (sum(parts.values()) - cross)


def six_n_d(run: RunConfig, parameters: int) -> float:
    """Return 6 N D, the usual estimate: a multiply and an add per parameter and token position, three times."""
    return 6.0 * parameters * tokens_per_step(run)
