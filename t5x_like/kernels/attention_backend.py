"""Attention backends: the interface that an implementation of attention fulfils, and the requests that it can refuse.

The caller describes mask and bias (`MaskSpec`, `RelativeBias`). A backend turns the description into the form that it
needs (`prepare_mask`), once for all layers that share it, and attends (`attend`). A backend that computes masks block
by block returns the description itself, and no array of the size of the scores is made; `DenseMaskBackend` is the base
class of backends that need such an array.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from jax import Array

from t5x_like.kernels.attention_masks import (
    BlockwiseMask,
    Mask,
    MaskSpec,
    SequenceSharding,
    SequenceSplit,
    materialize,
)
from t5x_like.kernels.position_bias import RelativeBias

BiasKind = Literal["none", "relative", "content"]


@dataclasses.dataclass(frozen=True)
class AttentionRequest:
    """Static properties of an attention that not every backend supports. The defaults are the plainest attention.

    Attributes:
      num_heads: Number of query heads, a multiple of `num_kv_heads`.
      num_kv_heads: Number of key and value heads.
      head_dim: Width of a head.
      dtype: Type of queries, keys and values, such as "float32" or "bfloat16".
      bias: relative: T5's table by distance. content: an array [B, H, Q, K] that depends on queries and keys
        (disentangled attention), always given as a `DenseMask`.
      softcap: Scores s become softcap * tanh(s / softcap); None: no soft cap.
      dropout_rate: Rate at which the backend has to drop single probabilities. It is 0 where `attention` drops values
        in their place (`drops_values`).
      dynamic_window: The window is an array (`KeySpec.dynamic_window`). Backends with dense masks never see it.
      split: Split of the sequence over devices (`SequenceSharding.length_split`), or None.
      is_merged: Several sequences of keys count as one (merged attention, T5Gemma 2).
      has_positions: The mask has explicit positions instead of counting indices from 0.
      has_prefix: `MaskSpec.causal` does not apply within a prefix, which differs between rows.
      q_length: Number of queries; 0: not known.
      kv_length: Number of keys of all sequences together; 0: not known.
    """

    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 64
    dtype: str = "bfloat16"
    bias: BiasKind = "none"
    softcap: float | None = None
    dropout_rate: float = 0.0
    dynamic_window: bool = False
    split: SequenceSplit | None = None
    is_merged: bool = False
    has_positions: bool = False
    has_prefix: bool = False
    q_length: int = 0
    kv_length: int = 0

    def with_mask(self, mask: MaskSpec) -> AttentionRequest:
        """Return the request with the properties of a mask."""
        return dataclasses.replace(
            self,
            has_positions=mask.q_positions is not None or mask.kv_positions is not None,
            has_prefix=mask.has_prefix,
        )


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Numbers of one call of a backend.

    Attributes:
      scale: Factor on the products of queries and keys.
      softcap: Scores s become softcap * tanh(s / softcap) before bias and mask; None: no soft cap.
      dropout_rate: Rate at which probabilities are dropped, if there is a key.
      dropout_rng: Key of the dropout mask; None: no dropout.
      dropout_broadcast_length: One dropout mask [B, H, 1, K] for all queries.
    """

    scale: float
    softcap: float | None
    dropout_rate: float
    dropout_rng: Array | None
    dropout_broadcast_length: bool


class AttentionBackend(abc.ABC):
    """Implementation of attention, to be registered by `kernels.attention.register_backend`.

    Attributes:
      is_portable: It runs on every platform, so that a model with it can be exported.
      platform: The only platform of JAX that its kernels are for, such as "tpu"; None: any, or not known.
      materializes_scores: It writes the scores [B, H, Q, K] to memory; memory estimates read this.
      needs_placement: XLA cannot partition its kernels or its loop over rows. On a mesh of several devices it needs the
        placement of rows and heads for `shard_map` (`SequenceSharding` without axes of the length).
      gathers_keys: Where `context_attention="all_gather"` splits a sequence, each device gathers the keys itself, and
        the backend needs the placement of the sequence for `shard_map`. Otherwise XLA partitions the attention.
      recomputes_scores: Its backward pass computes the scores again instead of keeping them; estimates of memory and
        operations read this.
    """

    is_portable: ClassVar[bool] = False
    platform: ClassVar[str | None] = None
    materializes_scores: ClassVar[bool] = False
    recomputes_scores: ClassVar[bool] = False
    needs_placement: ClassVar[bool] = False
    gathers_keys: ClassVar[bool] = False

    @abc.abstractmethod
    def supports(self, request: AttentionRequest) -> str | None:
        """Return None, or what the backend cannot do and how to avoid it, as the end of an error message."""

    @abc.abstractmethod
    def prepare_mask(
        self,
        mask: MaskSpec,
        relative_bias: RelativeBias | None,
        q_length: int,
        kv_length: int,
        split: SequenceSharding | None,
    ) -> Mask:
        """Return the mask in the form that `attend` reads: dense, or `BlockwiseMask.of` to keep the description.

        Layers of several windows, several sequences of keys and biases of single layers are combined from the result
        (`stack_masks`, `concat_masks`, `add_bias`).

        Args:
          mask: Description of the mask.
          relative_bias: T5's bias, or None.
          q_length: Number of queries.
          kv_length: Number of keys.
          split: Placement for `shard_map`; the result must be a `BlockwiseMask` with it. None unless the sequence is
            split over the devices of a ring, or the backend `gathers_keys` or `needs_placement`.
        """

    @abc.abstractmethod
    def attend(
        self, q_BxQxHxh: Array, keys: Sequence[Array], values: Sequence[Array], mask: Mask, options: AttentionOptions
    ) -> Array:
        """Return softmax(scale * q k + bias) v over the visible keys, [B, Q, H, h] in the type of q.

        Args:
          q_BxQxHxh: Queries, not yet scaled; head i reads key and value head i // (H / G).
          keys: Sequences of keys [B, K, G, h] under one softmax, one after the other; most attentions have one.
          values: Values of the same shapes.
          mask: Result of `prepare_mask`, possibly combined for several sequences: a dense mask covers all of them, a
            blockwise one has one `KeySpec` for each.
          options: Scale, soft cap and dropout.
        """


class DenseMaskBackend(AttentionBackend):
    """Backend that reads a dense mask, except for sequences that are split over devices."""

    def prepare_mask(
        self,
        mask: MaskSpec,
        relative_bias: RelativeBias | None,
        q_length: int,
        kv_length: int,
        split: SequenceSharding | None,
    ) -> Mask:
        if split is not None:
            return BlockwiseMask.of(mask, relative_bias, split)
        return materialize(mask, relative_bias, q_length, kv_length)


def usual_refusal(request: AttentionRequest, instead: str) -> str | None:
    """Return what a fused kernel that neither makes biases from content nor drops single probabilities cannot do.

    Args:
      request: Properties of the attention.
      instead: Backend that the message recommends.

    Returns:
      The end of an error message, as `AttentionBackend.supports` returns it, or None.
    """
    if request.bias == "content":
        return 'it does not support disentangled positions; set attention="reference"'
    if request.dropout_rate:
        return (
            f"it cannot drop single probabilities (dropout_rate {request.dropout_rate:g}); set "
            "dropout_broadcast_length=True with as many key heads as query heads, dropout_rate=0 or "
            f'attention="{instead}"'
        )
    return None


def drops_values(num_heads: int, num_kv_heads: int, dropout_broadcast_length: bool) -> bool:
    """Return whether dropout of probabilities can be done on the values, which every backend then supports.

    A dropout mask m without a query axis satisfies sum_k (p_qk m_k) v_k = sum_k p_qk (m_k v_k). With fewer key heads
    than query heads, query heads that share a value would share their mask, so it is not done.
    """
    return dropout_broadcast_length and num_heads == num_kv_heads
