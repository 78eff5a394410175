"""The one transformer block, of which every stack is made."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jax import Array

from t5x_like.config.model import AttentionImplementation, StackConfig
from t5x_like.kernels.attention import Prepared
from t5x_like.models.attention import Attention, CosSin, KeysValues
from t5x_like.models.layers import Mlp, Norm, dropout
from t5x_like.partitioning.constrain import constrain


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all blocks of a stack are given alike.

    Attributes:
      mask: Of the self-attention, with the relative bias in it.
      cos_sin: Rotary positions of x, or None.
      encoded: [B, S, d] for cross-attention, or None: there is none, or each layer has its keys and values ready.
      cross_mask: Of the cross-attention.
      cache_index: Where the new keys and values go in the layers' caches; None without a cache.
    """

    mask: Prepared
    cos_sin: CosSin | None = None
    encoded: Array | None = None
    cross_mask: Prepared | None = None
    cache_index: Array | None = None


class Block(nnx.Module):
    """Self-attention, cross-attention if the stack has an encoder beside it, and an MLP, each on a residual branch.

    Dropout is where T5 has it: on attention probabilities, inside the MLP and on each branch.
    """

    def __init__(
        self,
        config: StackConfig,
        implementation: AttentionImplementation,
        *,
        encoder_width: int | None,
        rngs: nnx.Rngs,
    ):
        """`encoder_width` is that of the encoder's output; None for no cross-attention."""
        self.config = config
        self.self_attention_norm = Norm(config)
        self.self_attention = Attention(config, implementation, kv_width=config.d_model, rngs=rngs)
        self.has_cross_attention = encoder_width is not None
        if encoder_width is not None:
            self.cross_attention_norm = Norm(config)
            self.cross_attention = Attention(config, implementation, kv_width=encoder_width, rngs=rngs)
        self.mlp_norm = Norm(config)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self,
        x_BxLxd: Array,
        shared: Shared,
        *,
        dropout_rng: Array | None = None,
        cache: KeysValues | None = None,
        cross_keys_values: KeysValues | None = None,
    ) -> tuple[Array, KeysValues]:
        """Args:
          cache: This layer's cached keys and values, [B, K, G, h] each; those of x are put at `shared.cache_index`.
          cross_keys_values: Keys and values of the encoder's output, where they are computed already.

        Returns:
          x after the block, and the keys and values of x.
        """
        rngs = [None] * 6 if dropout_rng is None else [jax.random.fold_in(dropout_rng, place) for place in range(6)]

        inner = self._before(x_BxLxd, self.self_attention_norm)
        new = seen = self.self_attention.keys_values(inner, shared.cos_sin)
        if cache is not None:
            assert shared.cache_index is not None
            seen = tuple(  # type: ignore[assignment]
                jax.lax.dynamic_update_slice_in_dim(old, added.astype(old.dtype), shared.cache_index, axis=1)
                for old, added in zip(cache, new, strict=True)
            )
        branch = self.self_attention(inner, seen, shared.mask, cos_sin=shared.cos_sin, dropout_rng=rngs[0])
        x_BxLxd = self._after(x_BxLxd, branch, self.self_attention_norm, rngs[1])

        if self.has_cross_attention:
            assert shared.cross_mask is not None
            inner = self._before(x_BxLxd, self.cross_attention_norm)
            if cross_keys_values is None:
                assert shared.encoded is not None
                cross_keys_values = self.cross_attention.keys_values(shared.encoded)
            branch = self.cross_attention(inner, cross_keys_values, shared.cross_mask, dropout_rng=rngs[2])
            x_BxLxd = self._after(x_BxLxd, branch, self.cross_attention_norm, rngs[3])

        branch = self.mlp(self._before(x_BxLxd, self.mlp_norm), dropout_rng=rngs[4])
        return self._after(x_BxLxd, branch, self.mlp_norm, rngs[5]), new

    def _before(self, x: Array, norm: Norm) -> Array:
        return norm(x) if self.config.norm_placement == "pre" else x

    def _after(self, x: Array, branch: Array, norm: Norm, dropout_rng: Array | None) -> Array:
        x = x + dropout(branch, self.config, dropout_rng)
        x = norm(x) if self.config.norm_placement == "post" else x
        return constrain(x, ("batch", "length", "embed"))


def stacked_blocks(
    config: StackConfig, implementation: AttentionImplementation, *, encoder_width: int | None, rngs: nnx.Rngs
) -> Block:
    """A Block whose parameters have the layers in front: num_layers blocks in one."""

    def make(key: Array) -> Block:
        return Block(config, implementation, encoder_width=encoder_width, rngs=nnx.Rngs(params=key))

    return jax.vmap(make)(jax.random.split(rngs.params(), config.num_layers))
