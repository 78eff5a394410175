"""Multi-head attention: projections around the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.model import AttentionImplementation, StackConfig
from t5x_like.kernels.attention import attention
from t5x_like.kernels.masks import Mask, Prepared
from t5x_like.kernels.slots import Part, attend
from t5x_like.models.cache import KeysValues, Slots
from t5x_like.models.layers import Dense, Joined, Norm, attention_scale, attention_stddevs, rotate
from t5x_like.partitioning.constrain import constrain

SeveralKeysValues = tuple[tuple[Array, ...], tuple[Array, ...]]
"""Keys and values of several sequences."""
CosSin = tuple[Array, Array]


class Distances(NamedTuple):
    """Of disentangled attention: a state for each bucket of distances, and the bucket of each query and key.

    Attributes:
      states: [R, d].
      rows: int32 [1 or B, Q, K], numbers of states.
    """

    states: Array
    rows: Array


class Attention(nnx.Module):
    """Queries from one sequence, keys and values from the same or another."""

    def __init__(self, config: StackConfig, implementation: AttentionImplementation, *, kv_width: int, rngs: nnx.Rngs):
        """`kv_width` is the width of the sequence that keys and values come from."""
        self.config = config
        self.implementation = implementation
        bias = config.use_bias
        heads, kv_heads = ("heads", config.num_heads), ("kv_heads", config.num_kv_heads)
        embed, kv_embed, head_dim = ("embed", config.d_model), ("embed", kv_width), ("head_dim", config.head_dim)
        q_stddev, kv_stddev, out_stddev = attention_stddevs(config)
        self.query = Dense([embed], [heads, head_dim], stddev=q_stddev, use_bias=bias, rngs=rngs)
        self.key = Dense([kv_embed], [kv_heads, head_dim], stddev=kv_stddev, use_bias=bias, rngs=rngs)
        self.value = Dense([kv_embed], [kv_heads, head_dim], stddev=kv_stddev, use_bias=bias, rngs=rngs)
        self.out = Dense([heads, head_dim], [embed], stddev=out_stddev, use_bias=bias, rngs=rngs)
        if config.qk_norm:
            self.query_norm, self.key_norm = Norm(config, head_dim), Norm(config, head_dim)

    def project(self, x_BxLxd: Array) -> tuple[Array, KeysValues]:
        """Queries [B, L, H, h] and keys and values [B, L, G, h] of the same sequence, as `placed` takes them."""
        if hasattr(self, "joined"):
            query, key, value = self.joined(x_BxLxd)
            return query, (key, value)
        return self.query(x_BxLxd), (self.key(x_BxLxd), self.value(x_BxLxd))

    def join(self) -> None:
        """Makes one product of the three of `project`, where nothing else reads them alone."""
        self.joined = Joined([self.query, self.key, self.value])
        del self.query, self.key, self.value

    def placed(self, keys_values: KeysValues, cos_sin: CosSin | None = None) -> KeysValues:
        """Keys normalised and rotated, as far as they are."""
        names = ("batch", "length", "kv_heads", "head_dim")
        key, value = keys_values
        if self.config.qk_norm:
            key = self.key_norm(key)
        if cos_sin is not None:
            key = rotate(key, cos_sin)
        return constrain(key, names), constrain(value, names)

    def keys_values(self, x_BxKxd: Array) -> KeysValues:
        """Keys and values of a sequence without positions, [B, K, G, h] each."""
        return self.placed((self.key(x_BxKxd), self.value(x_BxKxd)))

    def __call__(
        self,
        query_BxQxHxh: Array,
        keys_values: KeysValues | SeveralKeysValues,
        mask: Mask,
        *,
        cos_sin: CosSin | None = None,
        distances: Distances | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:
        """What queries, as they come from the projection, read of placed keys and values, [B, Q, d]."""
        keys, values = keys_values
        if isinstance(mask, Prepared):
            # Each device has the scores of its queries with all keys.
            whole = ("batch", None, "kv_heads", "head_dim")
            keys, values = jax.tree.map(lambda x: constrain(x, whole), (keys, values))
        query, bias = self._placed_query(query_BxQxHxh, cos_sin, distances, None if isinstance(keys, tuple) else keys)
        if bias is not None:
            assert isinstance(mask, Prepared)
            mask = Prepared(bias, mask.mask)
        mixed_BxQxHxh = attention(
            query,
            keys,
            values,
            mask,
            scale=attention_scale(self.config),
            softcap=self.config.attention_softcap,
            dropout_rate=self.config.dropout_rate,
            dropout_rng=dropout_rng,
            dropout_broadcast_length=self.config.dropout_broadcast_length,
            implementation=self.implementation,
        )
        return self.out(constrain(mixed_BxQxHxh, ("batch", "length", "heads", "head_dim")))

    def over_slots(
        self,
        query_BxTxHxh: Array,
        slots: Sequence[tuple[Slots, Prepared]],
        *,
        cos_sin: CosSin | None = None,
        distances: Distances | None = None,
    ) -> Array:
        """The same over keys and values in slots; of several, all under one softmax. `distances` are of the first."""
        keys = None if distances is None else slots[0][0].floats(query_BxTxHxh.dtype)[0]
        query, bias = self._placed_query(query_BxTxHxh, cos_sin, distances, keys)
        parts = [Part(*one, prepared if bias is None else Prepared(bias, prepared.mask)) for one, prepared in slots]
        config = self.config
        return self.out(attend(query, parts, scale=attention_scale(config), softcap=config.attention_softcap))

    def _placed_query(
        self, query: Array, cos_sin: CosSin | None, distances: Distances | None, keys: Array | None
    ) -> tuple[Array, Array | None]:
        """Queries [B, Q, H, h], and the bias of disentangled positions over these keys, if there are any."""
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
        """What a query makes of a key's distance and the key of the query's, [B, H, Q, K] (He et al. 2021, with keys
        and queries of distances made by the projections of the content)."""
        states_1xRxd = distances.states[None]
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        query_RxHxh = self.query(states_1xRxd)[0]
        key_RxHxh = jnp.repeat(self.key(states_1xRxd)[0], heads // kv_heads, axis=1)
        key_BxKxHxh = jnp.repeat(key_BxKxGxh, heads // kv_heads, axis=2)
        of_query = jnp.einsum("bqhx,rhx->bhqr", query_BxQxHxh, key_RxHxh, preferred_element_type=jnp.float32)
        of_key = jnp.einsum("bkhx,rhx->bhkr", key_BxKxHxh, query_RxHxh, preferred_element_type=jnp.float32)
        rows = distances.rows[:, None]
        to_position = jnp.take_along_axis(of_query, rows, axis=3)
        from_position = jnp.take_along_axis(of_key, jnp.swapaxes(rows, 2, 3), axis=3)
        return attention_scale(self.config) * (to_position + jnp.swapaxes(from_position, 2, 3))
