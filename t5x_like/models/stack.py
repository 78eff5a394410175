"""Transformer stack: positions, blocks run by `lax.scan`, a final norm. Encoders and decoders are this one class."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.model import LayerKind, ModelConfig, StackConfig
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.kernels.attention_masks import Mask, MaskSpec, concat_masks, materialize, select_mask, stack_masks
from t5x_like.kernels.position_bias import RelativeBias, disentangled_buckets
from t5x_like.models.attention import Distances, PlannedAttention, plan_attention
from t5x_like.models.block_sums import text_blocks
from t5x_like.models.blocks import (
    Block,
    LayerInputs,
    gather_states,
    layer_groups,
    relative_bias_of,
    relative_bias_table,
    stacked_blocks,
    unstack_blocks,
)
from t5x_like.models.depth_weights import DepthStates, initial_weights
from t5x_like.models.kv_cache import KeysValues, KVCache, LayerCache, slot_positions
from t5x_like.models.layers import Dense, Embedding, Norm, dropout, param
from t5x_like.models.moe import Routing
from t5x_like.models.remat import name_layer_input, recompute
from t5x_like.models.rotary import CosSin, rope
from t5x_like.sharding.constrain import constrain

Carry = tuple[Array, DepthStates | None]
"""States between two layers, and those before them that further sums read."""


class Stack(nnx.Module):
    """Stack of blocks of one structure, from embedded tokens to states."""

    def __init__(self, config: StackConfig, model: ModelConfig, *, encoder_width: int | None, rngs: nnx.Rngs):
        """`encoder_width` is the width of the encoder's output for a decoder beside an encoder, else None."""
        self.config = config
        self.remat = model.remat
        self.scan_layers = model.scan_layers
        self.attention = model.attention
        self.dtype = model.dtype
        d = config.d_model
        width = model.embedding_dim or d
        if config.positions == "learned":
            rows = ("positions", config.max_positions + config.position_offset)
            self.position_embedder = Embedding(rows, ("embed", width), stddev=model.embedding_stddev, rngs=rngs)
        if config.num_token_types:
            rows = ("positions", config.num_token_types)
            self.token_type_embedder = Embedding(rows, ("embed", width), stddev=model.embedding_stddev, rngs=rngs)
        if config.positions == "relative_bias" and not config.relative_bias_per_layer:
            self.relative_bias = relative_bias_table(config, rngs=rngs)
        if config.global_block_size is not None:
            self.global_relative_bias = relative_bias_table(config, rngs=rngs)
        if config.positions == "disentangled":
            rows = ("relative_buckets", 2 * config.relative_bias_buckets)
            self.distance_embedder = Embedding(rows, ("embed", d), stddev=model.embedding_stddev, rngs=rngs)
            self.distance_norm = Norm(config, has_parameters=True)
        if config.depth_weights:
            self.depth_weights = param(initial_weights(2 * config.num_layers), ("norm",))
        if model.embedding_norm:
            self.embedding_norm = Norm(config, ("norm", width))
        if width != d:
            self.embedding_projection = Dense(
                [("embed", width)], [("mlp", d)], stddev=width**-0.5, use_bias=config.use_bias, rngs=rngs
            )
        self._is_merged = encoder_width is not None and config.cross_attention == "merged"
        self.layers: Block | nnx.List[Block] = stacked_blocks(config, encoder_width=encoder_width, rngs=rngs)
        # Post-norm layers end in a norm already; the residual stream of the other placements is never normalized
        # otherwise.
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
        """Run the stack.

        Args:
          x_BxLxd: Embedded tokens, as wide as the token table.
          mask: Mask of the self-attention of global layers; local layers add their window.
          positions: int32 [B, L] for rotary and learned positions; None counts token positions from 0.
          token_types: int32 [B, L]; None: type 0 for all tokens.
          valid: bool [B, L], False for padding, which experts ignore; None: all tokens are valid.
          encoded: Encoder states [B, S, d] for cross-attention, or None.
          cross_mask: Mask of the cross-attention.
          dropout_rng: Key; None: no dropout.
          cross: Keys and values of the encoder states for each layer, [layers, B, S, G, h] each, in place of `encoded`.

        Returns:
          The states [B, L, d], the keys and values of x of each layer, [layers, B, L, G, h] each, and the routing of
          each layer if the stack has experts.
        """
        config = self.config
        length = x_BxLxd.shape[1]
        # Keys of the embeddings, the layers and the output.
        rngs = [None] * 3 if dropout_rng is None else list(jax.random.split(dropout_rng, 3))
        # [1, L] and not [B, L]: rotary angles and learned positions are then computed once for all rows.
        if positions is None:
            positions = jnp.arange(length)[None]
        x = self._embed_inputs(x_BxLxd, positions, token_types, rngs[0])

        cross_length = 0
        if encoded is not None:
            cross_length = encoded.shape[1]
        elif cross is not None:
            cross_length = cross[0].shape[2]

        blocks = None
        if config.global_block_size is not None and length >= config.global_block_size:
            ids = jnp.ones(x.shape[:2], jnp.int32) if mask.kv_segment_ids is None else mask.kv_segment_ids
            blocks = text_blocks(ids, config.global_block_size)

        def planned(mask: MaskSpec, *, is_cross: bool = False) -> PlannedAttention:
            return plan_attention(
                config,
                self.attention,
                self.dtype,
                mask,
                rows=x.shape[0],
                length=length,
                source_length=cross_length if blocks is None else blocks.count,
                is_cross=is_cross,
                is_merged=self._is_merged or blocks is not None,
            )

        own = planned(mask)
        cross_attention, prepared_cross_mask = None, None
        if cross_mask is not None:
            # In merged attention one softmax covers both sequences of keys, so that one backend reads both masks.
            cross_attention = own if self._is_merged else planned(cross_mask, is_cross=True)
            prepared_cross_mask = cross_attention.prepare_mask(cross_mask, None, length, cross_length)
        # Local and global layers differ in mask and rotary base only. Both are prepared once per kind, whatever the
        # number of layers.
        kinds = list(dict.fromkeys(config.layer_kinds))
        masks = [own.prepare_mask(self._add_window(kind, mask), self._shared_bias(), length, length) for kind in kinds]
        if self._is_merged:
            # One softmax over the decoder's own keys and, after them, those of the encoder.
            assert prepared_cross_mask is not None
            masks = [concat_masks(each, length, prepared_cross_mask, cross_length) for each in masks]
        if blocks is not None:
            bias = relative_bias_of(config, self.global_relative_bias)
            of_blocks = own.prepare_mask(blocks.mask, bias, length, blocks.count)
            masks = [concat_masks(each, length, of_blocks, blocks.count) for each in masks]
        # Everything that a layer reads besides its states and parameters. A scan closes over it, so that it is not
        # stacked per layer.
        shared = LayerInputs(
            mask=masks[0],
            spec=mask,
            cos_sin=self._rope(kinds[0], positions, valid),
            distances=self._distances(mask, length, length),
            backend=own.backend,
            encoded=encoded,
            cross_mask=prepared_cross_mask,
            cross_backend=None if cross_attention is None else cross_attention.backend,
            valid=valid,
            blocks=None if blocks is None else blocks.index,
        )
        by_kind = None
        if len(kinds) > 1:
            further = cross_length if self._is_merged else 0 if blocks is None else blocks.count
            by_kind = _KindInputs(
                stack_masks(masks, length, length + further),
                _stack_trees([self._rope(kind, positions, valid) for kind in kinds]),
            )
        x, keys_values, routing = self._run_layers(x, shared, by_kind, rngs[1], cross)
        return gather_states(dropout(self._final_norm(x), config, rngs[2])), keys_values, routing

    def step(
        self, x_BxTxd: Array, cache: KVCache, *, valid: Array, cross_mask: MaskSpec | None
    ) -> tuple[Array, tuple[LayerCache, ...]]:
        """Run the stack on the next T tokens of each row, after those in the cache.

        Layers are run one by one, each on its own cache: a scan would copy all caches and all parameters into one array
        at every step.

        Args:
          x_BxTxd: Embedded tokens.
          cache: Keys and values of the tokens before.
          valid: bool [B, T], False for padding, which experts ignore.
          cross_mask: Mask of the cross-attention.

        Returns:
          The states [B, T, d] and the cache of each layer with the new tokens.
        """
        length = x_BxTxd.shape[1]
        # Rows have different lengths, so the tokens of a step have positions of their own in each row.
        positions = cache.lengths[:, None] + jnp.arange(length)
        x = self._embed_inputs(x_BxTxd, positions)
        dense_cross_mask = None
        if cache.cross is not None:
            assert cross_mask is not None
            dense_cross_mask = materialize(cross_mask, None, length, cache.cross[0].size)
        kinds = self.config.layer_kinds
        inputs_of_kind = {}
        for kind, layer_cache in zip(kinds, cache.layers, strict=True):
            if kind not in inputs_of_kind:
                inputs_of_kind[kind] = self._step_inputs(
                    kind, cache.lengths, positions, layer_cache.size, valid, dense_cross_mask
                )
                if cache.beams is not None:
                    beams = cache.beams[layer_cache.size]
                    inputs_of_kind[kind] = dataclasses.replace(inputs_of_kind[kind], beams=beams)
        layers, depth = [], self._depth_states(x)
        for number, (block, kind, layer_cache) in enumerate(zip(self.blocks(), kinds, cache.layers, strict=True)):
            inputs = inputs_of_kind[kind]
            if not self.config.first_layer_attention_norm:
                inputs = dataclasses.replace(inputs, is_first=jnp.bool_(number == 0))
            cross = None if cache.cross is None else cache.cross[number]
            x, layer_cache, depth = block.step(x, inputs, layer_cache, cross, depth)
            layers.append(layer_cache)
        return gather_states(self._final_norm(x)), tuple(layers)

    def blocks(self) -> Sequence[Block]:
        """Return the layers as single blocks."""
        return unstack_blocks(self.layers) if isinstance(self.layers, Block) else self.layers

    def unstack(self) -> None:
        """Replace the stacked layers by separate ones. A decoding loop would otherwise copy each layer out of the stack
        at every step."""
        self.layers = nnx.List(self.blocks())

    def _step_inputs(
        self,
        kind: LayerKind,
        lengths_B: Array,
        positions_BxT: Array,
        num_slots: int,
        valid: Array,
        cross_mask: Mask | None,
    ) -> LayerInputs:
        """Return the inputs that the layers of a kind share in a decoding step."""
        length = positions_BxT.shape[1]
        # The new tokens are written into the cache before it is read, so its rows are longer by `length`.
        kv_positions = slot_positions(lengths_B + length, num_slots)
        mask = MaskSpec(
            causal=True,
            q_positions=positions_BxT,
            kv_positions=kv_positions,
            # Empty slots have positions below 0, and segment id 0 hides them.
            kv_segment_ids=(kv_positions >= 0).astype(jnp.int32),
        )
        mask = self._add_window(kind, mask)
        return LayerInputs(
            mask=materialize(mask, self._shared_bias(), length, num_slots),
            spec=mask,
            cos_sin=self._rope(kind, positions_BxT, valid),
            distances=self._distances(mask, length, num_slots),
            cross_mask=cross_mask,
            lengths=lengths_B,
            valid=valid,
        )

    def _embed_inputs(
        self, x: Array, positions: Array, token_types: Array | None = None, dropout_rng: Array | None = None
    ) -> Array:
        x = dropout(self.embed_positions(x, positions, token_types), self.config, dropout_rng)
        if hasattr(self, "embedding_projection"):
            x = self.embedding_projection(x)
        return constrain(x, ("batch", "residual_length", "embed"))

    def _depth_states(self, x: Array) -> DepthStates | None:
        """Return the states before the first layer of a stack with weighted sums over its depth."""
        return DepthStates((x,), self.depth_weights[...]) if self.config.depth_weights else None

    def _final_norm(self, x: Array) -> Array:
        return self.final_norm(x) if self.config.norm_placement != "post" else x

    def _add_window(self, kind: LayerKind, mask: MaskSpec) -> MaskSpec:
        return dataclasses.replace(mask, window=self.config.sliding_window) if kind == "local" else mask

    def _shared_bias(self) -> RelativeBias | None:
        """Return the relative bias that all layers share, if there is one."""
        return relative_bias_of(self.config, self.relative_bias) if hasattr(self, "relative_bias") else None

    def _rope(self, kind: LayerKind, positions: Array, valid: Array | None) -> CosSin | None:
        return rope(self.config, kind, positions, valid) if self.config.positions == "rope" else None

    def _distances(self, mask: MaskSpec, q_length: int, kv_length: int) -> Distances | None:
        config = self.config
        if config.positions != "disentangled":
            return None
        buckets = disentangled_buckets(
            q_length,
            kv_length,
            q_positions=mask.q_positions,
            kv_positions=mask.kv_positions,
            buckets=config.relative_bias_buckets,
            max_distance=config.relative_bias_max_distance,
        )
        buckets = constrain(buckets, ("batch", "length", None))
        return Distances(self.distance_norm(self.distance_embedder.embedding[...].astype(jnp.float32)), buckets)

    def embed_positions(self, x: Array, positions: Array, token_types: Array | None = None) -> Array:
        """Return embedded tokens with token types and learned positions added and normalized, where the stack has them.

        Raises:
          ConfigError: the rows are longer than the table of learned positions.
        """
        if self.config.num_token_types:
            x = x + self.token_type_embedder(
                jnp.zeros(x.shape[:2], jnp.int32) if token_types is None else token_types, x.dtype
            )
        if self.config.positions == "learned":
            if x.shape[1] > self.config.max_positions:
                problem = ConfigProblem(
                    "model: max_positions",
                    f"{self.config.max_positions} learned positions for rows of {x.shape[1]} tokens",
                    f"max_positions of at least {x.shape[1]}",
                )
                raise ConfigError([problem])
            x = x + self.position_embedder(positions + self.config.position_offset, x.dtype)
        return self.embedding_norm(x) if hasattr(self, "embedding_norm") else x

    def _run_layers(
        self,
        x: Array,
        shared: LayerInputs,
        by_kind: _KindInputs | None,
        dropout_rng: Array | None,
        cross: KeysValues | None,
    ) -> tuple[Array, KeysValues, Routing | None]:
        """Run all blocks in order.

        Each layer's dropout key is derived from its number. Inputs that differ between kinds of layers are computed
        once per kind and selected by the kind's number, so that one compiled block serves all layers.
        """
        kinds = None
        if by_kind is not None:
            names = list(dict.fromkeys(self.config.layer_kinds))
            kinds = jnp.array([names.index(kind) for kind in self.config.layer_kinds])
        per_layer = (jnp.arange(self.config.num_layers), kinds, cross)

        def run(carry: Carry, layer: Any) -> tuple[Carry, tuple[KeysValues, Routing | None]]:
            x, depth = carry
            x = name_layer_input(x, self.remat)
            block, (number, kind, layer_cross) = layer
            inputs = shared
            if by_kind is not None:
                mask, cos_sin = jax.tree.map(lambda each: each[kind], (by_kind.masks, by_kind.cos_sin))
                # Indexed by the layer's kind, an array: the scanned block is compiled once for all kinds.
                inputs = dataclasses.replace(inputs, mask=select_mask(shared.mask, mask), cos_sin=cos_sin)
            # As an array and not a Python condition: all layers of a scan run the same program.
            if not self.config.first_layer_attention_norm:
                inputs = dataclasses.replace(inputs, is_first=number == 0)
            # Folded in by number, so that scanned and unrolled layers draw the same masks.
            rng = None if dropout_rng is None else jax.random.fold_in(dropout_rng, number)
            x, new, routing, depth = block(x, inputs, dropout_rng=rng, cross_keys_values=layer_cross, depth=depth)
            return (x, depth), (new, routing)

        scans = self.scan_layers and isinstance(self.layers, Block) and not self.config.depth_weights
        run = recompute(run, self.remat, is_scanned=scans)
        carry: Carry = (x, self._depth_states(x))
        if scans:
            assert isinstance(self.layers, Block)
            places = layer_groups(self.layers)
            count = len(places)
            if count == 1:
                (x, _), (new_keys_values, routing) = jax.lax.scan(run, carry, (places[0], per_layer))
                return x, new_keys_values, routing

            def run_group(carry: Carry, group: Any) -> tuple[Carry, tuple[KeysValues, Routing | None]]:
                new, routings = [], []
                for layer in zip(*group, strict=True):
                    carry, (keys_values, routing) = run(carry, layer)
                    new.append(keys_values)
                    routings.append(routing)
                return carry, (_stack(new), _stack_of_experts(routings))

            inputs = [jax.tree.map(lambda leaf, n=place: leaf[n::count], per_layer) for place in range(count)]
            (x, _), result = jax.lax.scan(run_group, carry, (places, tuple(inputs)))
            # [groups, layers of a group, ...] to [layers, ...].
            new_keys_values, routing = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), result)
            return x, new_keys_values, routing
        new, routings = [], []
        for number, block in enumerate(self.blocks()):
            layer = (block, jax.tree.map(lambda leaf, n=number: leaf[n], per_layer))
            carry, (keys_values, layer_routing) = run(carry, layer)
            new.append(keys_values)
            routings.append(layer_routing)
        return carry[0], _stack(new), _stack_of_experts(routings)


class _KindInputs(NamedTuple):
    """Inputs that differ between kinds of layers, with the kinds as first dimension.

    Attributes:
      masks: Result of `stack_masks`.
      cos_sin: [kinds, 1 or B, L, 1, h / 2] each, or None.
    """

    masks: Array
    cos_sin: CosSin | None


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _stack_of_experts(routings: Sequence[Routing | None]) -> Routing | None:
    """Return the routing of the layers with experts, stacked; None without such layers."""
    found = [routing for routing in routings if routing is not None]
    return _stack(found) if found else None


def _stack_trees(trees: list[CosSin | None]) -> CosSin | None:
    # Dynamic frequencies differ between rows, others have one row for all.
    return jax.tree.map(lambda *leaves: jnp.stack(jnp.broadcast_arrays(*leaves)), *trees)
