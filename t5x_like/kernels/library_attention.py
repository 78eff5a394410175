"""Attention by `jax.nn.dot_product_attention`, compiled by XLA on every platform."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import Array

from t5x_like.kernels.attention_backend import (
    AttentionOptions,
    AttentionRequest,
    DenseMaskBackend,
    usual_refusal,
)
from t5x_like.kernels.attention_masks import DenseMask, Mask
from t5x_like.kernels.reference_attention import join_sequences


class XlaAttention(DenseMaskBackend):
    """`jax.nn.dot_product_attention` with the implementation "xla"."""

    is_portable = True
    materializes_scores = True

    def supports(self, request: AttentionRequest) -> str | None:
        if request.softcap is not None:
            return 'it has no soft cap of the scores; set attention="reference"'
        if request.split is not None and request.split.form == "ring":
            return (
                "it cannot attend to a sequence that is split over the devices of a ring; set "
                'attention="reference", or sharding.context_attention="all_gather" to keep the backend'
            )
        return usual_refusal(request, "reference")

    def attend(
        self, q_BxQxHxh: Array, keys: Sequence[Array], values: Sequence[Array], mask: Mask, options: AttentionOptions
    ) -> Array:
        # Bias and mask are arrays: the causal flag of the library covers neither prefixes nor segments.
        assert isinstance(mask, DenseMask)
        # It accepts G key heads for H query heads, so that keys and values are not repeated.
        return jax.nn.dot_product_attention(
            q_BxQxHxh,
            join_sequences(keys),
            join_sequences(values),
            bias=None if mask.bias is None else mask.bias.astype(q_BxQxHxh.dtype),
            mask=mask.mask,
            scale=options.scale,
            implementation="xla",
        )
