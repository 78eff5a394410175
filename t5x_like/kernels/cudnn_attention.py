"""Attention by cuDNN's fused kernels for NVIDIA GPUs, through `jax.nn.dot_product_attention`.

A causal limit, a causal window and padding at the end of rows are passed as flags and lengths, so that the kernels skip
blocks without visible pairs and read no mask. Everything else (segments, prefixes, other windows, a relative bias) is
an array of the size of the scores in half precision, which the kernels read as a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.attention_backend import (
    AttentionBackend,
    AttentionOptions,
    AttentionRequest,
    usual_refusal,
)
from t5x_like.kernels.attention_masks import (
    BlockwiseMask,
    Mask,
    MaskSpec,
    SequenceSharding,
    dense_mask_and_bias,
)
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.kernels.reference_attention import join_sequences


class CudnnAttention(AttentionBackend):
    """`jax.nn.dot_product_attention` with the implementation "cudnn"."""

    platform = "gpu"

    def supports(self, request: AttentionRequest) -> str | None:
        if request.dtype == "float32":
            return "cuDNN's kernels are for half precision and the model computes in float32; set dtype=bfloat16"
        if request.softcap is not None:
            return 'it has no soft cap of the scores; set attention="blockwise"'
        if request.split is not None:
            return 'JAX does not compile it where devices split the sequence; set attention="blockwise"'
        if request.head_dim % 8 or request.head_dim > 256:
            return f'its heads are of a multiple of 8 up to 256, not {request.head_dim}; set attention="blockwise"'
        if request.q_length % 2 or request.kv_length % 2:
            return (
                f"it reads masks of even lengths only, not of {request.q_length} queries and {request.kv_length} keys; "
                'choose even lengths or attention="blockwise"'
            )
        return usual_refusal(request, "blockwise")

    def prepare_mask(
        self,
        mask: MaskSpec,
        relative_bias: RelativeBias | None,
        q_length: int,
        kv_length: int,
        split: SequenceSharding | None,
    ) -> Mask:
        return BlockwiseMask.of(mask, relative_bias, split)

    def attend(
        self, q_BxQxHxh: Array, keys: Sequence[Array], values: Sequence[Array], mask: Mask, options: AttentionOptions
    ) -> Array:
        arguments = _flags(mask, q_BxQxHxh.shape[0])
        if arguments is None:
            q_length, kv_lengths = q_BxQxHxh.shape[1], [k.shape[1] for k in keys]
            dense = dense_mask_and_bias(mask, q_length, kv_lengths)
            visible = dense.mask
            if visible is not None:
                # Padding alone has no axis of queries, which the library requires.
                visible = jnp.broadcast_to(visible, (*visible.shape[:2], q_length, sum(kv_lengths)))
            arguments = {"bias": None if dense.bias is None else dense.bias.astype(q_BxQxHxh.dtype), "mask": visible}
        # It accepts G key heads for H query heads, so that keys and values are not repeated.
        return jax.nn.dot_product_attention(
            q_BxQxHxh,
            join_sequences(keys),
            join_sequences(values),
            scale=options.scale,
            implementation="cudnn",
            **arguments,
        )


def _flags(mask: Mask, rows: int) -> dict[str, Any] | None:
    """Return the mask as arguments of the library that are no arrays of the size of the scores; None: it needs one."""
    if not isinstance(mask, BlockwiseMask) or len(mask.keys) > 1:
        return None
    keys, spec = mask.keys[0], mask.keys[0].mask
    has_prefix = spec.causal and spec.q_prefix is not None and spec.kv_prefix is not None
    has_positions = spec.q_positions is not None or spec.kv_positions is not None
    if keys.relative_bias is not None or keys.dynamic_window is not None or has_prefix or has_positions:
        return None
    arguments: dict[str, Any] = {"is_causal": spec.causal}
    if spec.kv_segment_ids is not None:
        if spec.q_segment_ids is not None or not spec.padding_at_end:
            return None
        # A row without any key reads one, whose result is ignored: a softmax over no keys is not defined.
        lengths = jnp.maximum(jnp.sum(jnp.asarray(spec.kv_segment_ids) != 0, axis=1, dtype=jnp.int32), 1)
        arguments["key_value_seq_lengths"] = jnp.broadcast_to(lengths, (rows,))
    if spec.window is not None:
        # The library's window is one to the left of a causal limit; with padding it is not documented.
        if not spec.causal or spec.kv_segment_ids is not None:
            return None
        arguments["local_window_size"] = (spec.window[0], 0)
    return arguments
