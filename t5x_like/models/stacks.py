"""A stack: positions, blocks run by `lax.scan`, a final norm. Encoder, decoder and language model are this class."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.errors import ConfigError, Problem
from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.kernels.attention import MaskSpec, RelativeBias, prepare
from t5x_like.models.attention import KeysValues
from t5x_like.models.blocks import Block, Shared, stacked_blocks
from t5x_like.models.layers import Dense, Embedding, Norm, dropout, rope
from t5x_like.partitioning.constrain import constrain


class LayerCaches(NamedTuple):
    """Keys and values that all layers keep while decoding.

    Attributes:
      self_attention: [layers, B, K, G, h] each.
      cross_attention: [layers, B, S, G, h] each, or None without an encoder.
      next_slot: int32 scalar, the slot of the first new token.
    """

    self_attention: KeysValues
    cross_attention: KeysValues | None
    next_slot: Array


class Stack(nnx.Module):
    def __init__(self, config: StackConfig, model: ModelConfig, *, encoder_width: int | None, rngs: nnx.Rngs):
        """`encoder_width` is that of the encoder's output for a decoder beside an encoder, else None."""
        self.config = config
        self.remat = model.remat
        self.scan_layers = model.scan_layers
        d = config.d_model
        width = model.embedding_width or d
        if config.positions == "learned":
            rows = ("positions", config.max_positions)
            self.position_embedder = Embedding(rows, ("embed", width), stddev=model.embedding_stddev, rngs=rngs)
        if config.positions == "relative_bias":
            rows = ("relative_buckets", config.relative_bias_buckets)
            self.relative_bias = Embedding(rows, ("heads", config.num_heads), stddev=d**-0.5, rngs=rngs)
        if model.embedding_norm:
            self.embedding_norm = Norm(config, width)
        if width != d:
            self.embedding_projection = Dense(
                [("embed", width)], [("mlp", d)], stddev=width**-0.5, use_bias=config.use_bias, rngs=rngs
            )
        self.layers = stacked_blocks(config, model.attention, encoder_width=encoder_width, rngs=rngs)
        if config.norm_placement == "pre":
            self.final_norm = Norm(config)

    def __call__(
        self,
        x_BxLxd: Array,
        mask: MaskSpec,
        *,
        positions: Array | None = None,
        encoded: Array | None = None,
        cross_mask: MaskSpec | None = None,
        dropout_rng: Array | None = None,
        caches: LayerCaches | None = None,
    ) -> tuple[Array, KeysValues]:
        """Args:
          x_BxLxd: Embedded tokens, as wide as the token table.
          mask: Of the self-attention.
          positions: [B, L] for rotary and learned positions; None counts cells.
          encoded: [B, S, d] for cross-attention; with `caches` its keys and values are read from there.
          cross_mask: Of the cross-attention.
          dropout_rng: None for no dropout.
          caches: While decoding: the earlier keys and values.

        Returns:
          The states [B, L, d], and each layer's keys and values of x, [layers, B, L, G, h] each.
        """
        config = self.config
        length = x_BxLxd.shape[1]
        rngs = [None] * 3 if dropout_rng is None else list(jax.random.split(dropout_rng, 3))
        if positions is None:
            positions = jnp.arange(length)[None]
        x = dropout(self.embed_positions(x_BxLxd, positions), config, rngs[0])
        if hasattr(self, "embedding_projection"):
            x = self.embedding_projection(x)
        x = constrain(x, ("batch", "length", "embed"))

        kv_length = length if caches is None else caches.self_attention[0].shape[2]
        bias = None
        if config.positions == "relative_bias":
            table = self.relative_bias.embedding[...]
            bias = RelativeBias(table, config.relative_bias_bidirectional, config.relative_bias_max_distance)
        cross_length = 0
        if encoded is not None:
            cross_length = encoded.shape[1]
        elif caches is not None and caches.cross_attention is not None:
            cross_length = caches.cross_attention[0].shape[2]
        shared = Shared(
            mask=prepare(mask, bias, length, kv_length),
            cos_sin=rope(positions, config.head_dim, config.rope_base) if config.positions == "rope" else None,
            encoded=encoded,
            cross_mask=None if cross_mask is None else prepare(cross_mask, None, length, cross_length),
            cache_index=None if caches is None else caches.next_slot,
        )
        x, keys_values = self._run_layers(x, shared, rngs[1], caches)
        if config.norm_placement == "pre":
            x = self.final_norm(x)
        return dropout(x, config, rngs[2]), keys_values

    def embed_positions(self, x: Array, positions: Array) -> Array:
        """Embedded tokens with learned positions added and normalised, as far as the stack does either."""
        if self.config.positions == "learned":
            if x.shape[1] > self.config.max_positions:
                problem = Problem(
                    "model: max_positions",
                    f"{self.config.max_positions} learned positions for rows of {x.shape[1]} tokens",
                    f"max_positions of at least {x.shape[1]}",
                )
                raise ConfigError([problem])
            x = x + self.position_embedder(positions, x.dtype)
        return self.embedding_norm(x) if hasattr(self, "embedding_norm") else x

    def _run_layers(
        self, x: Array, shared: Shared, dropout_rng: Array | None, caches: LayerCaches | None
    ) -> tuple[Array, KeysValues]:
        """All blocks, one after the other. Each has its own dropout key, made from its number."""
        cache = None if caches is None else caches.self_attention
        cross = None if caches is None else caches.cross_attention
        layers = (self.layers, jnp.arange(self.config.num_layers), cache, cross)

        def run(x: Array, layer: tuple[Block, Array, KeysValues | None, KeysValues | None]) -> tuple[Array, KeysValues]:
            block, number, layer_cache, layer_cross = layer
            rng = None if dropout_rng is None else jax.random.fold_in(dropout_rng, number)
            x, new = block(x, shared, dropout_rng=rng, cache=layer_cache, cross_keys_values=layer_cross)
            return x, new

        match self.remat:
            case "dots":
                # Products of activations with parameters are kept; scores and all elementwise work is redone.
                policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
                run = jax.checkpoint(run, prevent_cse=not self.scan_layers, policy=policy)
            case "full":
                run = jax.checkpoint(run, prevent_cse=not self.scan_layers)
        if self.scan_layers:
            return jax.lax.scan(run, x, layers)
        collected = []
        for number in range(self.config.num_layers):
            x, new = run(x, jax.tree.map(lambda leaf, n=number: leaf[n], layers))
            collected.append(new)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)
