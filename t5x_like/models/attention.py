"""Multi-head attention: projections around the kernel."""

from __future__ import annotations

from flax import nnx
from jax import Array

from t5x_like.config.model import AttentionImplementation, StackConfig
from t5x_like.kernels.attention import Prepared, attention
from t5x_like.models.layers import Dense, attention_scale, attention_stddevs, rotate
from t5x_like.partitioning.constrain import constrain

KeysValues = tuple[Array, Array]
"""[B, K, G, h] each."""
CosSin = tuple[Array, Array]


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

    def keys_values(self, x_BxKxd: Array, cos_sin: CosSin | None = None) -> KeysValues:
        """Keys (rotated, with cos_sin) and values of a sequence, [B, K, G, h] each."""
        names = ("batch", "length", "kv_heads", "head_dim")
        key, value = self.key(x_BxKxd), self.value(x_BxKxd)
        if cos_sin is not None:
            key = rotate(key, cos_sin)
        return constrain(key, names), constrain(value, names)

    def __call__(
        self,
        x_BxQxd: Array,
        keys_values: KeysValues,
        mask: Prepared,
        *,
        cos_sin: CosSin | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:
        query = self.query(x_BxQxd)
        if cos_sin is not None:
            query = rotate(query, cos_sin)
        mixed_BxQxHxh = attention(
            constrain(query, ("batch", "length", "heads", "head_dim")),
            *keys_values,
            mask,
            scale=attention_scale(self.config),
            dropout_rate=self.config.dropout_rate,
            dropout_rng=dropout_rng,
            dropout_broadcast_length=self.config.dropout_broadcast_length,
            implementation=self.implementation,
        )
        return self.out(mixed_BxQxHxh)
