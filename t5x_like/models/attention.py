"""Multi-head attention: projections around the attention kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.kernels.attention import AUTO, attention, get_backend, unknown_backend
from t5x_like.kernels.attention_masks import (
    BlockwiseMask,
    DenseMask,
    Mask,
    MaskSpec,
    SequenceSharding,
    materialize,
)
from t5x_like.kernels.auto_attention import choose
from t5x_like.kernels.decode_attention import KVSegment, attend
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.models.kv_cache import KeysValues, LayerCache
from t5x_like.models.layers import Dense, FusedDense, Norm, activate, attention_scale, attention_stddevs
from t5x_like.models.rotary import CosSin, rotate
from t5x_like.sharding.attention_choice import attention_request, attention_uses, can_split_sequence
from t5x_like.sharding.constrain import active_platform, attention_placement, constrain, sequence_split

SeveralKeysValues = tuple[tuple[Array, ...], tuple[Array, ...]]
"""Keys and values of several sequences."""


class Distances(NamedTuple):
    """Relative positions of disentangled attention: a state per bucket of distances, and the bucket of each pair.

    Attributes:
      states: [R, d], one state per bucket.
      buckets: int32 [1 or B, Q, K], the bucket of each query and key.
    """

    states: Array
    buckets: Array


def attention_problems(model: ModelConfig) -> Iterator[ConfigProblem]:
    """Yield a problem if the model's attention backend is unknown or does not support what a stack needs."""
    problem = unknown_backend(model.attention)
    if problem is not None:
        yield problem
    if problem is not None or model.attention == AUTO:
        return
    for use in attention_uses(model):
        reason = get_backend(model.attention).supports(use.request)
        if reason is not None and not use.is_cross:
            yield ConfigProblem(
                "model.attention", f"{model.attention} for model.{use.stack}", f"a backend that supports it: {reason}"
            )


@dataclasses.dataclass(frozen=True)
class PlannedAttention:
    """Attention of a stack on the devices of the active mesh.

    Attributes:
      backend: Name of the backend.
      has_dense_mask: The mask is dense for every backend, because the bias of each layer has the size of the scores.
      placement: Placement of the arrays for `shard_map`, or None.
    """

    backend: str
    has_dense_mask: bool
    placement: SequenceSharding | None

    def prepare_mask(self, mask: MaskSpec, bias: RelativeBias | None, q_length: int, kv_length: int) -> Mask:
        """Return the mask as the backend reads it; each device computes the part of its queries of a dense one."""
        if self.has_dense_mask:
            prepared: Mask = materialize(mask, None, q_length, kv_length)
        else:
            prepared = get_backend(self.backend).prepare_mask(mask, bias, q_length, kv_length, self.placement)
        if isinstance(prepared, BlockwiseMask):
            return prepared
        dense_bias, dense = prepared.bias, prepared.mask
        return DenseMask(
            bias=None if dense_bias is None else constrain(dense_bias, ("batch", "heads", "length", None)),
            mask=None if dense is None else constrain(dense, ("batch", None, "length", None)),
        )


def plan_attention(
    config: StackConfig,
    attention: str,
    dtype: str,
    mask: MaskSpec,
    *,
    rows: int,
    length: int,
    source_length: int,
    is_cross: bool,
    is_merged: bool,
) -> PlannedAttention:
    """Return the backend of an attention on the active mesh, and the placement of its arrays.

    Args:
      config: The stack.
      attention: `ModelConfig.attention`; "auto" is resolved for the platform of the devices.
      dtype: Type of the activations.
      mask: Mask of the attention.
      rows: Rows of the batch.
      length: Length of the stack's own sequence.
      source_length: Length of the encoder's sequence; 0 without one.
      is_cross: The attention is cross-attention.
      is_merged: The self-attention also reads the encoder's states.

    Raises:
      ConfigError: the named backend does not support the attention, or is for other devices than those of the mesh.
    """
    sizes = (config.num_heads, config.num_kv_heads)
    is_disentangled = config.positions == "disentangled"
    lengths = [length, source_length] if source_length else [length]
    placement = sequence_split(rows, lengths, *sizes) if can_split_sequence(config) else None
    request = attention_request(
        config,
        dtype,
        q_length=length,
        source_length=source_length,
        is_cross=is_cross,
        is_merged=is_merged,
        split=None if placement is None else placement.length_split,
    ).with_mask(mask)
    platform = active_platform()
    backend = choose(attention, platform, request).backend
    if (reason := get_backend(backend).supports(request)) is not None:
        raise ConfigError([ConfigProblem("model.attention", backend, f"a backend that supports it: {reason}")])
    expected = get_backend(backend).platform
    if expected is not None and platform not in (None, expected):
        found = f"{backend} on devices of platform {platform!r}"
        fix = 'set model.attention="auto"'
        raise ConfigError([ConfigProblem("model.attention", found, f"devices of platform {expected!r}", fix)])
    implementation = get_backend(backend)
    if placement is not None and placement.form == "all_gather" and not implementation.gathers_keys:
        # XLA gathers the keys, by the constraint on them in `Attention`, and partitions the computation.
        placement = None
    if placement is None and implementation.needs_placement:
        placement = attention_placement(rows, *sizes)
    return PlannedAttention(backend, is_disentangled and not is_cross, placement)


class Attention(nnx.Module):
    """Multi-head attention with queries from one sequence and keys and values from the same or another one."""

    def __init__(self, config: StackConfig, *, kv_width: int, rngs: nnx.Rngs):
        """`kv_width` is the width of the sequence that keys and values are projected from."""
        self.config = config
        bias = config.use_bias or config.qkv_bias
        heads, kv_heads = ("heads", config.num_heads), ("kv_heads", config.num_kv_heads)
        embed, kv_embed, head_dim = ("embed", config.d_model), ("embed", kv_width), ("head_dim", config.head_dim)
        q_stddev, kv_stddev, out_stddev = attention_stddevs(config)
        dense = functools.partial(Dense, rngs=rngs, quantization=config.quantization)
        self.query = dense([embed], [heads, head_dim], stddev=q_stddev, use_bias=bias, product="qkv")
        self.key = dense([kv_embed], [kv_heads, head_dim], stddev=kv_stddev, use_bias=bias, product="qkv")
        self.value = dense([kv_embed], [kv_heads, head_dim], stddev=kv_stddev, use_bias=bias, product="qkv")
        self.out = dense([heads, head_dim], [embed], stddev=out_stddev, use_bias=config.use_bias)
        if config.qk_norm:
            self.query_norm, self.key_norm = Norm(config, head_dim), Norm(config, head_dim)
        if config.attention_gate:
            gate_stddev = config.d_model**-0.5
            self.gate = dense([embed], [heads, head_dim], stddev=gate_stddev, use_bias=bias, product="qkv")
        if config.norm_placement == "sub":
            self.out_norm = Norm(config, ("norm", config.num_heads * config.head_dim))

    def project(self, x_BxLxd: Array) -> tuple[Array, KeysValues]:
        """Return queries [B, L, H, h], and keys and values [B, L, G, h] for `position_keys`, of one sequence."""
        if hasattr(self, "fused"):
            query, key, value = self.fused(x_BxLxd)
            return query, (key, value)
        return self.query(x_BxLxd), (self.key(x_BxLxd), self.value(x_BxLxd))

    def gates(self, x_BxLxd: Array) -> Array | None:
        """Return the factors of the output before its projection, [B, L, H, h], if the stack has gates."""
        return activate(self.gate(x_BxLxd), "gelu") if hasattr(self, "gate") else None

    def _project_out(self, attended_BxQxHxh: Array, gates: Array | None) -> Array:
        """Return the output of attention, gated and normalized where the stack does so, and projected, [B, Q, d]."""
        x = attended_BxQxHxh if gates is None else attended_BxQxHxh * gates
        if hasattr(self, "out_norm"):
            x = self.out_norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
        return self.out(x)

    def fuse(self) -> None:
        """Replace the three products of `project` by one. The single projections are gone afterwards."""
        self.fused = FusedDense([self.query, self.key, self.value])
        del self.query, self.key, self.value

    def position_keys(self, keys_values: KeysValues, cos_sin: CosSin | None = None) -> KeysValues:
        """Return keys and values with the keys normalized and rotated, if the stack does so."""
        names = ("batch", "length", "kv_heads", "head_dim")
        key, value = keys_values
        # Norm before rotation, as in Qwen 3 and Gemma 3: after it, the norm's scale per dimension would make scores
        # depend on positions and not on distances alone.
        if self.config.qk_norm:
            key = self.key_norm(key)
        if cos_sin is not None:
            key = rotate(key, cos_sin)
        return constrain(key, names), constrain(value, names)

    def keys_values(self, x_BxKxd: Array) -> KeysValues:
        """Return keys and values of a sequence without positions, [B, K, G, h] each."""
        return self.position_keys((self.key(x_BxKxd), self.value(x_BxKxd)))

    def __call__(
        self,
        query_BxQxHxh: Array,
        keys_values: KeysValues | SeveralKeysValues,
        mask: Mask,
        *,
        backend: str,
        cos_sin: CosSin | None = None,
        distances: Distances | None = None,
        gates: Array | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:
        """Return the output of attention, [B, Q, d].

        Args:
          query_BxQxHxh: Queries as the projection returns them.
          keys_values: Keys and values after `position_keys`, of one or several sequences.
          mask: Mask that the backend has prepared.
          backend: Name of the attention backend.
          cos_sin: Rotary positions of the queries, or None.
          distances: Relative positions of disentangled attention, or None.
          gates: Result of `gates`.
          dropout_rng: Key of the dropout of probabilities; None: no dropout.
        """
        keys, values = keys_values
        if not (isinstance(mask, BlockwiseMask) and mask.split is not None and mask.split.length):
            # Each device computes the scores of its queries with all keys, which this constraint gathers along the
            # length. Backends with `gathers_keys` gather them themselves.
            whole = ("batch", None, "kv_heads", "head_dim")
            keys, values = jax.tree.map(lambda x: constrain(x, whole), (keys, values))
        # Queries are normalized and rotated here and keys in `position_keys`: keys enter the cache in their final form,
        # once.
        query, bias = self._position_query(query_BxQxHxh, cos_sin, distances, None if isinstance(keys, tuple) else keys)
        if bias is not None:
            assert isinstance(mask, DenseMask)
            mask = DenseMask(bias, mask.mask)
        attended_BxQxHxh = attention(
            query,
            keys,
            values,
            mask,
            scale=attention_scale(self.config),
            softcap=self.config.attention_softcap,
            dropout_rate=self.config.dropout_rate,
            dropout_rng=dropout_rng,
            dropout_broadcast_length=self.config.dropout_broadcast_length,
            backend=backend,
        )
        return self._project_out(constrain(attended_BxQxHxh, ("batch", "length", "heads", "head_dim")), gates)

    def attend_to_cache(
        self,
        query_BxTxHxh: Array,
        caches: Sequence[tuple[LayerCache, DenseMask]],
        *,
        cos_sin: CosSin | None = None,
        distances: Distances | None = None,
        gates: Array | None = None,
        beams: Array | None = None,
    ) -> Array:
        """Return the output of attention over cached keys and values, [B, T, d].

        Several caches share one softmax. `distances` belong to the first one. A cache may have one row for several rows
        of the queries, side by side, if T is 1: the beams of a prompt.

        Args:
          query_BxTxHxh: Queries as the projection returns them.
          caches: Keys and values with their masks; that of the first one is by row of the queries.
          cos_sin: Rotary positions of the queries, or None.
          distances: Relative positions of disentangled attention, or None.
          gates: Result of `gates`.
          beams: Table of the first cache in a beam search (`KVCache.beams`), or None.
        """
        # Only disentangled positions read the keys themselves; all others leave them in the cache's type.
        keys = None
        if distances is not None:
            keys = caches[0][0].dequantize(query_BxTxHxh.dtype)[0]
            if beams is not None:
                # Their bias depends on the keys themselves: those of each beam's own past.
                by_prompt = keys.reshape(*beams.shape, *keys.shape[2:])
                keys = jnp.take_along_axis(by_prompt, beams[..., None, None], axis=1).reshape(keys.shape)
        query, bias = self._position_query(query_BxTxHxh, cos_sin, distances, keys)
        shape = query.shape
        prompts = caches[-1][0].keys.shape[0] if beams is None else beams.shape[0]
        if prompts != shape[0]:
            # The beams of a prompt are queries of one row, which read the prompt's keys together.
            query = query.reshape(prompts, -1, *shape[2:])
        segments = [KVSegment(*cache, mask if bias is None else DenseMask(bias, mask.mask)) for cache, mask in caches]
        if beams is not None:
            segments[0] = segments[0]._replace(mask=_mask_of_beams(segments[0].mask, beams))
        config = self.config
        attended = attend(query, segments, scale=attention_scale(config), softcap=config.attention_softcap)
        return self._project_out(attended.reshape(shape), gates)

    def _position_query(
        self, query: Array, cos_sin: CosSin | None, distances: Distances | None, keys: Array | None
    ) -> tuple[Array, Array | None]:
        """Return normalized and rotated queries [B, Q, H, h], and the bias of disentangled positions or None."""
        bias = None
        if self.config.qk_norm:
            query = self.query_norm(query)
        if distances is not None:
            assert keys is not None
            bias = self._distance_bias(query, keys, distances)
        if cos_sin is not None:
            query = rotate(query, cos_sin)
        return constrain(query, ("batch", "length", "heads", "head_dim")), bias

    def _distance_bias(self, query_BxQxHxh: Array, key_BxKxGxh: Array, distances: Distances) -> Array:
        """Return the content-to-position and position-to-content scores, float32 [B, H, Q, K] (He et al. 2021, where
        the projections of the content also project the distances)."""
        states_1xRxd = distances.states[None]
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        # The same projections serve content and distances (DeBERTa's `share_att_key`), which is why `fuse` leaves them
        # apart.
        query_RxHxh = self.query(states_1xRxd)[0]
        key_RxHxh = jnp.repeat(self.key(states_1xRxd)[0], heads // kv_heads, axis=1)
        key_BxKxHxh = jnp.repeat(key_BxKxGxh, heads // kv_heads, axis=2)
        # Scores with all R distances, from which the bucket of each pair is taken: R is far smaller than Q * K.
        query_scores = jnp.einsum("bqhx,rhx->bhqr", query_BxQxHxh, key_RxHxh, preferred_element_type=jnp.float32)
        key_scores = jnp.einsum("bkhx,rhx->bhkr", key_BxKxHxh, query_RxHxh, preferred_element_type=jnp.float32)
        buckets = distances.buckets[:, None]
        # Content to position: entry (q, k) reads the query's score with the distance q - k.
        to_position = jnp.take_along_axis(query_scores, buckets, axis=3)
        # Position to content: the key's score with the same bucket, found in the transposed array [B, H, K, Q].
        from_position = jnp.take_along_axis(key_scores, jnp.swapaxes(buckets, 2, 3), axis=3)
        return attention_scale(self.config) * (to_position + jnp.swapaxes(from_position, 2, 3))


def _mask_of_beams(own: DenseMask, beams_RxBxK: Array) -> DenseMask:
    """Return the mask of the B beams of R prompts, as queries of a prompt, over the slots of all rows of the prompt.

    Args:
      own: Mask [R B, 1, 1, K] and bias [1 or R B, H, 1, K] of each beam over slots. The tokens in a slot have the same
        position in all rows of a prompt.
      beams_RxBxK: `KVCache.beams`.

    Returns:
      Mask [R B, 1, B, K] and bias [1 or R B, H, B, K]: rows of the cache, beams, slots.
    """
    prompts, count, slots = beams_RxBxK.shape
    seen_RxCxBxK = beams_RxBxK[:, None] == jnp.arange(count)[:, None, None]
    if own.mask is not None:
        seen_RxCxBxK &= jnp.broadcast_to(own.mask, (prompts * count, 1, 1, slots)).reshape(prompts, 1, count, slots)
    bias = own.bias
    if bias is not None and bias.shape[0] > 1:
        heads = bias.shape[1]
        by_prompt = jnp.swapaxes(bias.reshape(prompts, 1, count, heads, slots), 2, 3)
        bias = jnp.broadcast_to(by_prompt, (prompts, count, heads, count, slots)).reshape(-1, heads, count, slots)
    return DenseMask(bias, seen_RxCxBxK.reshape(-1, 1, count, slots))
