"""A stack: positions, blocks run by `lax.scan`, a final norm. Encoder, decoder and language model are this class."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.errors import ConfigError, Problem
from t5x_like.config.model import LayerKind, ModelConfig, StackConfig
from t5x_like.kernels.masks import (
    Described,
    Mask,
    MaskSpec,
    Prepared,
    Split,
    after_another,
    disentangled_buckets,
    masks_together,
    of_kind,
    prepare,
)
from t5x_like.models.attention import CosSin, Distances
from t5x_like.models.blocks import (
    Block,
    Shared,
    layers_alike,
    relative_bias_of,
    relative_bias_table,
    single_blocks,
    stacked_blocks,
    whole_rows,
)
from t5x_like.models.cache import Cache, KeysValues, Slots, slot_positions
from t5x_like.models.experts import Routing
from t5x_like.models.layers import Dense, Embedding, Norm, dropout, rope, rope_frequencies
from t5x_like.partitioning.constrain import constrain, sequence_split


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
        if config.token_types:
            rows = ("positions", config.token_types)
            self.token_type_embedder = Embedding(rows, ("embed", width), stddev=model.embedding_stddev, rngs=rngs)
        if config.positions == "relative_bias" and not config.relative_bias_per_layer:
            self.relative_bias = relative_bias_table(config, rngs=rngs)
        if config.positions == "disentangled":
            rows = ("relative_buckets", 2 * config.relative_bias_buckets)
            self.distance_embedder = Embedding(rows, ("embed", d), stddev=model.embedding_stddev, rngs=rngs)
            self.distance_norm = Norm(config)
        if model.embedding_norm:
            self.embedding_norm = Norm(config, ("norm", width))
        if width != d:
            self.embedding_projection = Dense(
                [("embed", width)], [("mlp", d)], stddev=width**-0.5, use_bias=config.use_bias, rngs=rngs
            )
        self._is_merged = encoder_width is not None and config.cross_attention == "merged"
        self.layers: Block | nnx.List[Block] = stacked_blocks(
            config, model.attention, encoder_width=encoder_width, rngs=rngs
        )
        if config.norm_placement != "post":
            self.final_norm = Norm(config)

    def __call__(
        self,
        x_BxLxd: Array,
        mask: MaskSpec,
        *,
        positions: Array | None = None,
        token_types: Array | None = None,
        valid: Array | None = None,
        encoded: Array | None = None,
        cross_mask: MaskSpec | None = None,
        dropout_rng: Array | None = None,
        cross: KeysValues | None = None,
    ) -> tuple[Array, KeysValues, Routing | None]:
        """Args:
          x_BxLxd: Embedded tokens, as wide as the token table.
          mask: Of the self-attention of global layers; local ones add their window.
          positions: [B, L] for rotary and learned positions; None counts cells.
          token_types: [B, L]; None: all 0.
          valid: bool [B, L], False for padding, for experts; None: all are valid.
          encoded: [B, S, d] for cross-attention.
          cross_mask: Of the cross-attention.
          dropout_rng: None for no dropout.
          cross: Instead of `encoded`: the keys and values that each layer makes of it, [layers, B, S, G, h] each.

        Returns:
          The states [B, L, d], each layer's keys and values of x, [layers, B, L, G, h] each, and each layer's routing
          if it has experts.
        """
        config = self.config
        length = x_BxLxd.shape[1]
        rngs = [None] * 3 if dropout_rng is None else list(jax.random.split(dropout_rng, 3))
        if positions is None:
            positions = jnp.arange(length)[None]
        x = self._enter(x_BxLxd, positions, token_types, rngs[0])

        cross_length = 0
        if encoded is not None:
            cross_length = encoded.shape[1]
        elif cross is not None:
            cross_length = cross[0].shape[2]
        split = None
        if config.positions != "disentangled":
            lengths = [length, cross_length] if cross_length else [length]
            split = sequence_split(x.shape[0], lengths, config.num_heads, config.num_kv_heads)
        seen = None if cross_mask is None else _placed(prepare(cross_mask, None, length, cross_length, split))
        kinds = list(dict.fromkeys(config.layer_kinds))
        masks = [_placed(self._mask(self._windowed(kind, mask), length, length, split)) for kind in kinds]
        if self._is_merged:
            assert seen is not None
            masks = [after_another(one, length, seen, cross_length) for one in masks]
        shared = Shared(
            mask=masks[0],
            spec=mask,
            cos_sin=self._rope(kinds[0], positions),
            distances=self._distances(mask, length, length),
            encoded=encoded,
            cross_mask=seen,
            valid=valid,
        )
        by_kind = None
        if len(kinds) > 1:
            by_kind = _ByKind(
                masks_together(masks, length, length + (cross_length if self._is_merged else 0)),
                _stacked([self._rope(kind, positions) for kind in kinds]),
            )
        x, keys_values, routing = self._run_layers(x, shared, by_kind, rngs[1], cross)
        return whole_rows(dropout(self._leave(x), config, rngs[2])), keys_values, routing

    def step(
        self, x_BxTxd: Array, cache: Cache, *, valid: Array, cross_mask: MaskSpec | None
    ) -> tuple[Array, tuple[Slots, ...]]:
        """The states of T more tokens of each row, behind those that the cache has.

        Layers are run one by one, each on slots of its own: a scan would copy all slots and all parameters at each
        step, to have them in one array.

        Args:
          x_BxTxd: Embedded tokens.
          valid: bool [B, T], False for padding, for experts.
          cross_mask: Of the cross-attention.

        Returns:
          The states [B, T, d] and each layer's slots with the tokens.
        """
        length = x_BxTxd.shape[1]
        positions = cache.lengths[:, None] + jnp.arange(length)
        x = self._enter(x_BxTxd, positions)
        seen = None
        if cache.cross is not None:
            assert cross_mask is not None
            seen = prepare(cross_mask, None, length, cache.cross[0].size)
        kinds = self.config.layer_kinds
        of_kind = {}
        for kind, slots in zip(kinds, cache.layers, strict=True):
            if kind not in of_kind:
                of_kind[kind] = self._step_shared(kind, cache.lengths, positions, slots.size, valid, seen)
        layers = []
        for number, (block, kind, slots) in enumerate(zip(self.blocks(), kinds, cache.layers, strict=True)):
            shared = of_kind[kind]
            if not self.config.first_layer_attention_norm:
                shared = dataclasses.replace(shared, is_first=jnp.bool_(number == 0))
            x, slots = block.step(x, shared, slots, None if cache.cross is None else cache.cross[number])
            layers.append(slots)
        return whole_rows(self._leave(x)), tuple(layers)

    def blocks(self) -> Sequence[Block]:
        """The layers one by one."""
        return single_blocks(self.layers) if isinstance(self.layers, Block) else self.layers

    def take_apart(self) -> None:
        """Makes separate layers of the stacked ones. A loop that reads them would otherwise copy each out of the stack
        at each step."""
        self.layers = nnx.List(self.blocks())

    def _step_shared(
        self, kind: LayerKind, lengths_B: Array, positions_BxT: Array, slots: int, valid: Array, seen: Mask | None
    ) -> Shared:
        """What the layers of a kind share in a step: the new tokens are in the slots already when these are read."""
        length = positions_BxT.shape[1]
        kv_positions = slot_positions(lengths_B + length, slots)
        mask = MaskSpec(
            causal=True,
            q_positions=positions_BxT,
            kv_positions=kv_positions,
            kv_segment_ids=(kv_positions >= 0).astype(jnp.int32),
        )
        mask = self._windowed(kind, mask)
        return Shared(
            mask=self._mask(mask, length, slots),
            spec=mask,
            cos_sin=self._rope(kind, positions_BxT),
            distances=self._distances(mask, length, slots),
            cross_mask=seen,
            lengths=lengths_B,
            valid=valid,
        )

    def _enter(
        self, x: Array, positions: Array, token_types: Array | None = None, dropout_rng: Array | None = None
    ) -> Array:
        x = dropout(self.embed_positions(x, positions, token_types), self.config, dropout_rng)
        if hasattr(self, "embedding_projection"):
            x = self.embedding_projection(x)
        return constrain(x, ("batch", "residual_length", "embed"))

    def _leave(self, x: Array) -> Array:
        return self.final_norm(x) if self.config.norm_placement != "post" else x

    def _windowed(self, kind: LayerKind, mask: MaskSpec) -> MaskSpec:
        return dataclasses.replace(mask, window=self.config.window) if kind == "local" else mask

    def _mask(self, mask: MaskSpec, q_length: int, kv_length: int, split: Split | None = None) -> Mask:
        bias = relative_bias_of(self.config, self.relative_bias) if hasattr(self, "relative_bias") else None
        return prepare(mask, bias, q_length, kv_length, split)

    def _rope(self, kind: LayerKind, positions: Array) -> CosSin | None:
        if self.config.positions != "rope":
            return None
        return rope(positions, rope_frequencies(self.config, kind))

    def _distances(self, mask: MaskSpec, q_length: int, kv_length: int) -> Distances | None:
        config = self.config
        if config.positions != "disentangled":
            return None
        rows = disentangled_buckets(
            mask,
            q_length,
            kv_length,
            buckets=config.relative_bias_buckets,
            max_distance=config.relative_bias_max_distance,
        )
        rows = constrain(rows, ("batch", "length", None))
        return Distances(self.distance_norm(self.distance_embedder.embedding[...]), rows)

    def embed_positions(self, x: Array, positions: Array, token_types: Array | None = None) -> Array:
        """Embedded tokens with kinds of tokens and learned positions added and normalised, as far as the stack does."""
        if self.config.token_types:
            x = x + self.token_type_embedder(
                jnp.zeros(x.shape[:2], jnp.int32) if token_types is None else token_types, x.dtype
            )
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
        self,
        x: Array,
        shared: Shared,
        by_kind: _ByKind | None,
        dropout_rng: Array | None,
        cross: KeysValues | None,
    ) -> tuple[Array, KeysValues, Routing | None]:
        """All blocks, one after the other. Each has its own dropout key, made from its number. What differs between
        kinds of layers is computed once per kind and chosen by number, so that one compiled block serves all."""
        kinds = None
        if by_kind is not None:
            names = list(dict.fromkeys(self.config.layer_kinds))
            kinds = jnp.array([names.index(kind) for kind in self.config.layer_kinds])
        per_layer = (jnp.arange(self.config.num_layers), kinds, cross)

        def run(x: Array, layer: Any) -> tuple[Array, tuple[KeysValues, Routing | None]]:
            block, (number, kind, layer_cross) = layer
            own = shared
            if by_kind is not None:
                mask, cos_sin = jax.tree.map(lambda each: each[kind], (by_kind.masks, by_kind.cos_sin))
                own = dataclasses.replace(own, mask=of_kind(shared.mask, mask), cos_sin=cos_sin)
            if not self.config.first_layer_attention_norm:
                own = dataclasses.replace(own, is_first=number == 0)
            rng = None if dropout_rng is None else jax.random.fold_in(dropout_rng, number)
            x, new, routing = block(x, own, dropout_rng=rng, cross_keys_values=layer_cross)
            return x, (new, routing)

        match self.remat:
            case "dots":
                # Products of activations with parameters are kept; scores and all elementwise work is redone.
                policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
                run = jax.checkpoint(run, prevent_cse=not self.scan_layers, policy=policy)
            case "full":
                run = jax.checkpoint(run, prevent_cse=not self.scan_layers)
        if self.scan_layers and isinstance(self.layers, Block):
            x, (new_keys_values, routing) = jax.lax.scan(run, x, (layers_alike(self.layers), per_layer))
            return x, new_keys_values, routing
        collected = []
        for number, block in enumerate(self.blocks()):
            x, of_layer = run(x, (block, jax.tree.map(lambda leaf, n=number: leaf[n], per_layer)))
            collected.append(of_layer)
        new_keys_values, routing = jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)
        return x, new_keys_values, routing


class _ByKind(NamedTuple):
    """What differs between kinds of layers, with the kinds in front.

    Attributes:
      masks: Of `masks_together`.
      cos_sin: [kinds, 1 or B, L, 1, h / 2] each, or None.
    """

    masks: Array
    cos_sin: CosSin | None


def _placed(mask: Mask) -> Mask:
    """Of masks that are arrays, each device makes the part for its queries."""
    if isinstance(mask, Described):
        return mask
    return Prepared(
        bias=None if mask.bias is None else constrain(mask.bias, ("batch", "heads", "length", None)),
        mask=None if mask.mask is None else constrain(mask.mask, ("batch", None, "length", None)),
    )


def _stacked(trees: list[CosSin | None]) -> CosSin | None:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
