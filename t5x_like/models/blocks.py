"""The transformer block that every stack consists of."""

from __future__ import annotations

import dataclasses
from typing import assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.model import StackConfig
from t5x_like.kernels.attention_masks import DenseMask, Mask, MaskSpec, add_bias
from t5x_like.kernels.position_bias import RelativeBias
from t5x_like.models.attention import Attention, CosSin, Distances, SeveralKeysValues
from t5x_like.models.block_sums import sum_blocks
from t5x_like.models.depth_weights import DepthStates
from t5x_like.models.kv_cache import KeysValues, LayerCache
from t5x_like.models.layers import Embedding, Mlp, Norm, dropout, param
from t5x_like.models.moe import MixtureOfExperts, Routing
from t5x_like.models.remat import name_product
from t5x_like.sharding.constrain import constrain


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """Inputs of the blocks of a stack. `mask`, `cos_sin` and `is_first` may differ between layers.

    Attributes:
      mask: Mask of the self-attention, including the relative bias that all layers share. With merged attention it also
        covers the encoder's states, which come last (in a decoding step `cross_mask` covers them).
      spec: Description of that mask, for layers with their own table of relative bias.
      cos_sin: Rotary positions of x, or None.
      distances: Relative positions of disentangled attention, or None.
      backend: Name of the backend of the self-attention; None in a decoding step, which has an attention of its own.
      encoded: Encoder states [B, S, d] for cross-attention; None without an encoder, or if each layer's keys and values
        are computed already.
      cross_mask: Mask of the cross-attention.
      cross_backend: Name of the backend of the cross-attention; None without one, and in a decoding step.
      lengths: int32 [B], tokens of each row that are in the cache already, in a decoding step; else None.
      valid: bool [B, L], False for padding, which experts ignore; None: no padding.
      beams: Table of the self-attention's cache in a beam search (`KVCache.beams`), else None.
      is_first: bool scalar if the attention of the first layer has no norm before it, else None.
      blocks: int32 [B, L], block of each token for LongT5's sums of blocks (`TextBlocks.index`), else None.
    """

    mask: Mask
    spec: MaskSpec
    cos_sin: CosSin | None = None
    distances: Distances | None = None
    backend: str | None = None
    encoded: Array | None = None
    cross_mask: Mask | None = None
    cross_backend: str | None = None
    lengths: Array | None = None
    valid: Array | None = None
    beams: Array | None = None
    is_first: Array | None = None
    blocks: Array | None = None


class Block(nnx.Module):
    """Self-attention, cross-attention in a decoder beside an encoder, and an MLP, each on a residual branch.

    Dropout is applied where T5 applies it: to attention probabilities, inside the MLP and to each branch.

    Attributes:
      experts: Only in stacked blocks of which some have experts and others an MLP: a row for each block with experts.
    """

    experts: MixtureOfExperts

    def __init__(
        self,
        config: StackConfig,
        *,
        encoder_width: int | None,
        rngs: nnx.Rngs,
    ):
        """`encoder_width` is the width of the encoder's output; None: no cross-attention."""
        self.config = config
        self.self_attention_norm = Norm(config)
        self.self_attention = Attention(config, kv_width=config.d_model, rngs=rngs)
        if config.relative_bias_per_layer and config.positions == "relative_bias":
            self.relative_bias = relative_bias_table(config, rngs=rngs)
        self.has_cross_attention = encoder_width is not None and config.cross_attention == "separate"
        self.is_merged = encoder_width is not None and config.cross_attention == "merged"
        if encoder_width is not None and self.has_cross_attention:
            self.cross_attention_norm = Norm(config)
            self.cross_attention = Attention(config, kv_width=encoder_width, rngs=rngs)
        if config.global_block_size is not None:
            self.global_norm = Norm(config)
        self.mlp_norm = Norm(config)
        all_have_experts = config.experts is not None and config.experts.layer_period == 1
        self.mlp: Mlp | MixtureOfExperts = (MixtureOfExperts if all_have_experts else Mlp)(config, rngs=rngs)
        match config.norm_placement:
            case "pre" | "post" | "sub":  # The norms of "sub" are parts of attention and MLP.
                after_branch: tuple[str, ...] = ()
            case "normformer":
                after_branch = ("self_attention", "cross_attention")
            case "both":
                after_branch = ("self_attention", "cross_attention", "mlp")
            case unknown:
                assert_never(unknown)
        for name in after_branch:
            if name != "cross_attention" or self.has_cross_attention:
                has_parameters = config.norm_placement == "normformer" or config.norm_parameters
                setattr(self, f"{name}_post_norm", Norm(config, has_parameters=has_parameters))

    def __call__(
        self,
        x_BxLxd: Array,
        shared: LayerInputs,
        *,
        dropout_rng: Array | None = None,
        cross_keys_values: KeysValues | None = None,
        depth: DepthStates | None = None,
    ) -> tuple[Array, KeysValues, Routing | None, DepthStates | None]:
        """Run the block.

        Args:
          x_BxLxd: States.
          shared: Inputs of the layer besides the states.
          dropout_rng: Key; None: no dropout.
          cross_keys_values: Keys and values of the encoder's output, if they are computed already.
          depth: States after the branches of earlier layers, in a stack with weighted sums over them.

        Returns:
          x after the block, the keys and values of x, the routing of its tokens if the block has experts, and `depth`
          with the states after its branches.
        """
        # One key per point of dropout; the numbers are part of the random stream.
        rngs = [None] * 7 if dropout_rng is None else [jax.random.fold_in(dropout_rng, point) for point in range(7)]
        if cross_keys_values is None and shared.encoded is not None:
            cross_keys_values = self.encoder_keys_values(shared.encoded)

        assert shared.backend is not None
        inner = self._self_attention_input(x_BxLxd, shared)
        query, keys_values = self.self_attention.project(inner)
        own = self.self_attention.position_keys(keys_values, shared.cos_sin)
        mask = self._add_layer_bias(shared, inner.shape[1], inner.shape[1])
        attended: KeysValues | SeveralKeysValues = own
        further = cross_keys_values if self.is_merged else self._of_blocks(inner, shared.blocks)
        if further is not None:
            attended = tuple(  # type: ignore[assignment]
                # The stack's own keys first: the concatenated mask has the same order.
                (first, second.astype(first.dtype))
                for first, second in zip(own, further, strict=True)
            )
        # T5's order: attention, cross-attention, MLP, each a residual branch.
        branch = self.self_attention(
            query,
            attended,
            mask,
            backend=shared.backend,
            cos_sin=shared.cos_sin,
            distances=self._drop_distances(shared.distances, rngs[6]),
            gates=self.self_attention.gates(inner),
            dropout_rng=rngs[0],
        )
        x_BxLxd = self._add_branch(x_BxLxd, branch, "self_attention", rngs[1])
        if depth is not None:
            x_BxLxd, depth = depth.add(x_BxLxd)

        if self.has_cross_attention:
            assert shared.cross_mask is not None and shared.cross_backend is not None and cross_keys_values is not None
            inner = self._branch_input(x_BxLxd, self.cross_attention_norm)
            query = self.cross_attention.query(inner)
            branch = self.cross_attention(
                query, cross_keys_values, shared.cross_mask, backend=shared.cross_backend, dropout_rng=rngs[2]
            )
            x_BxLxd = self._add_branch(x_BxLxd, branch, "cross_attention", rngs[3])

        x_BxLxd, routing = self._mlp(x_BxLxd, shared, rngs[4], rngs[5])
        if depth is not None:
            x_BxLxd, depth = depth.add(x_BxLxd)
        return x_BxLxd, own, routing, depth

    def step(
        self,
        x_BxTxd: Array,
        shared: LayerInputs,
        cache: LayerCache,
        cross: LayerCache | None,
        depth: DepthStates | None = None,
    ) -> tuple[Array, LayerCache, DepthStates | None]:
        """Run the block on the next T tokens of each row.

        Args:
          x_BxTxd: States of the tokens.
          shared: Inputs of the layer besides the states, with dense masks.
          cache: This layer's keys and values of the `shared.lengths` tokens before.
          cross: Keys and values of the encoder's output.
          depth: See `__call__`.

        Returns:
          x after the block, the cache with the new tokens, and `depth` with the states after its branches.
        """
        assert shared.lengths is not None
        inner = self._self_attention_input(x_BxTxd, shared)
        # The cache is written before it is read: XLA then writes in place and does not copy the whole cache.
        query, keys_values = self.self_attention.project(inner)
        # Keys are rotated before they are stored, at their own position, and never again.
        cache = cache.append(self.self_attention.position_keys(keys_values, shared.cos_sin), shared.lengths)
        mask = self._add_layer_bias(shared, inner.shape[1], cache.size)
        assert isinstance(mask, DenseMask)
        caches = [(cache, mask)]
        if self.is_merged:
            assert cross is not None and isinstance(shared.cross_mask, DenseMask)
            caches.append((cross, shared.cross_mask))
        branch = self.self_attention.attend_to_cache(
            query,
            caches,
            cos_sin=shared.cos_sin,
            distances=shared.distances,
            gates=self.self_attention.gates(inner),
            beams=shared.beams,
        )
        x_BxTxd = self._add_branch(x_BxTxd, branch, "self_attention", None)
        if depth is not None:
            x_BxTxd, depth = depth.add(x_BxTxd)

        if self.has_cross_attention:
            assert cross is not None and isinstance(shared.cross_mask, DenseMask)
            inner = self._branch_input(x_BxTxd, self.cross_attention_norm)
            query = self.cross_attention.query(inner)
            branch = self.cross_attention.attend_to_cache(query, [(cross, shared.cross_mask)])
            x_BxTxd = self._add_branch(x_BxTxd, branch, "cross_attention", None)
        x_BxTxd = self._mlp(x_BxTxd, shared, None, None)[0]
        if depth is not None:
            x_BxTxd, depth = depth.add(x_BxTxd)
        return x_BxTxd, cache, depth

    def _of_blocks(self, x: Array, blocks: Array | None) -> KeysValues | None:
        """Return the keys and values of LongT5's sums of blocks, if the layer attends to them."""
        if blocks is None:
            return None
        assert self.config.global_block_size is not None
        sums = sum_blocks(x, blocks, x.shape[1] // self.config.global_block_size)
        return self.self_attention.keys_values(self.global_norm(sums))

    def _self_attention_input(self, x: Array, shared: LayerInputs) -> Array:
        inner = self._branch_input(x, self.self_attention_norm)
        # ModernBERT's first layer has no norm here, because its embeddings are normalized already.
        return inner if shared.is_first is None else jnp.where(shared.is_first, gather_states(x), inner)

    def _mlp(
        self, x: Array, shared: LayerInputs, inner_rng: Array | None, branch_rng: Array | None
    ) -> tuple[Array, Routing | None]:
        inner, routing = self._branch_input(x, self.mlp_norm), None
        if isinstance(self.mlp, MixtureOfExperts):
            branch, routing = self.mlp(inner, valid=shared.valid, segment_ids=shared.spec.q_segment_ids)
        else:
            branch = self.mlp(inner, dropout_rng=inner_rng)
        return self._add_branch(x, branch, "mlp", branch_rng), routing

    def fuse(self) -> None:
        """Fuse the products that read the same input, for decoding."""
        # Merged attention and sums of blocks project further states with the key and value kernels alone, disentangled
        # attention projects distances with the query and key kernels alone.
        apart = self.is_merged or self.config.global_block_size is not None or self.config.positions == "disentangled"
        if not apart:
            self.self_attention.fuse()
        if isinstance(self.mlp, Mlp):
            self.mlp.fuse()

    def encoder_keys_values(self, encoded_BxSxd: Array) -> KeysValues:
        """Return the keys and values of the encoder's states, [B, S, G, h] each."""
        return (self.self_attention if self.is_merged else self.cross_attention).keys_values(encoded_BxSxd)

    def _add_layer_bias(self, shared: LayerInputs, q_length: int, kv_length: int) -> Mask:
        if not hasattr(self, "relative_bias"):
            return shared.mask
        bias = relative_bias_of(self.config, self.relative_bias)
        return add_bias(shared.mask, shared.spec, bias, q_length, kv_length)

    def _drop_distances(self, distances: Distances | None, dropout_rng: Array | None) -> Distances | None:
        if distances is None:
            return None
        # DeBERTa's `pos_dropout`: the states of the distances are dropped anew in every layer.
        return distances._replace(states=dropout(distances.states[None], self.config, dropout_rng)[0])

    def _branch_input(self, x: Array, norm: Norm) -> Array:
        return gather_states(x if self.config.norm_placement == "post" else norm(x))

    def _add_branch(self, x: Array, branch: Array, name: str, dropout_rng: Array | None) -> Array:
        # pre: x + f(norm(x)). post: norm(x + f(x)), as in BERT. both: x + norm(f(norm(x))), as in Gemma 2.
        # Named after it is split, so that what is kept is split as the states between the layers are.
        branch = name_product(split_states(branch), "outputs")
        if hasattr(self, f"{name}_post_norm"):
            branch = getattr(self, f"{name}_post_norm")(branch)
        x = x + dropout(branch, self.config, dropout_rng)
        x = getattr(self, f"{name}_norm")(x) if self.config.norm_placement == "post" else x
        return constrain(x, _SPLIT)


_SPLIT, _WHOLE = ("batch", "residual_length", "embed"), ("batch", "length", "embed")


def gather_states(x_BxLxd: Array) -> Array:
    """Gather the residual states along their length for products with parameters that are split over the same devices.

    Both shardings are named, so that the gradient is reduced over those devices and split again (reduce-scatter).
    """
    return constrain(constrain(x_BxLxd, _SPLIT), _WHOLE)


def split_states(x_BxLxd: Array) -> Array:
    """Split the output of a branch along its length again, as the residual states are split."""
    return constrain(constrain(x_BxLxd, _WHOLE), _SPLIT)


def relative_bias_table(config: StackConfig, *, rngs: nnx.Rngs) -> Embedding:
    """Return a fresh table of T5's relative bias, [buckets, heads]."""
    rows = ("relative_buckets", config.relative_bias_buckets)
    return Embedding(rows, ("heads", config.num_heads), stddev=config.d_model**-0.5, rngs=rngs)


def relative_bias_of(config: StackConfig, table: Embedding) -> RelativeBias:
    """Return the description of a table's bias for the attention backend."""
    # In float32, in which the gradient of a bucket is added up over all pairs of tokens.
    values = table.embedding[...].astype(jnp.float32)
    return RelativeBias(values, config.relative_bias_bidirectional, config.relative_bias_max_distance)


def stacked_blocks(config: StackConfig, *, encoder_width: int | None, rngs: nnx.Rngs) -> Block:
    """Return a Block whose parameters have a leading dimension of layers: num_layers blocks in one."""

    def make(key: Array) -> Block:
        return Block(config, encoder_width=encoder_width, rngs=nnx.Rngs(params=key))

    # `vmap` over the constructor gives every parameter a leading dimension of layers, with initial values that differ
    # between layers, and compiles one constructor.
    blocks = jax.vmap(make)(jax.random.split(rngs.params(), config.num_layers))
    if config.experts is not None and config.experts.layer_period > 1:
        # Each of the two kinds of MLPs has a row for each layer that has it.
        count = len(config.expert_layers)
        without = jnp.array([number for number in range(config.num_layers) if number not in config.expert_layers])
        blocks.mlp = jax.tree.map(lambda leaf: leaf[without], blocks.mlp)
        blocks.experts = jax.vmap(lambda key: MixtureOfExperts(config, rngs=nnx.Rngs(params=key)))(
            jax.random.split(rngs.params(), count)
        )
    if not config.first_layer_attention_norm:
        # The first layer has no norm: drop its row from the stacked norm.
        for name, parameter in _parameters(blocks.self_attention_norm):
            setattr(blocks.self_attention_norm, name, param(parameter[...][1:], parameter.get_metadata("logical")))
    return blocks


def layer_groups(blocks: Block) -> tuple[Block, ...]:
    """Return stacked blocks for a scan over groups of layers: one stack of blocks for each place in a group.

    The blocks of one place have the same parameters. A stack has groups of one layer unless some of its layers have
    experts and others do not.
    """
    padded, config = pad_first_norm(blocks), blocks.config
    if config.experts is None or config.experts.layer_period == 1:
        return (padded,)
    period = config.experts.layer_period
    mlp, experts = padded.mlp, padded.experts
    common = jax.tree.map(lambda leaf: leaf, padded)
    del common.mlp, common.experts
    places = []
    for place in range(period):
        block = jax.tree.map(lambda leaf, place=place: leaf[place::period], common)
        if place == config.expert_layers[0]:
            block.mlp = experts
        else:
            # The second layer of a group has no row here.
            row = max(place - 1, 0)
            block.mlp = jax.tree.map(lambda leaf, row=row: leaf[row :: period - 1], mlp)
        places.append(block)
    return tuple(places)


def pad_first_norm(blocks: Block) -> Block:
    """Return stacked blocks with one row per layer in each parameter.

    The attention norm that the first layer does not have is filled with zeros, so that all layers have one structure.
    """
    if blocks.config.first_layer_attention_norm:
        return blocks

    def filled(leaf: Array) -> Array:
        # The filled row is never used: `is_first` selects the input without the norm.
        return jnp.concatenate([jnp.zeros_like(leaf[:1]), leaf])

    padded = jax.tree.map(lambda leaf: leaf, blocks)
    padded.self_attention_norm = jax.tree.map(filled, blocks.self_attention_norm)
    return padded


def unstack_blocks(blocks: Block) -> list[Block]:
    """Return stacked blocks as single ones."""
    places = layer_groups(blocks)
    numbers = (divmod(number, len(places)) for number in range(blocks.config.num_layers))
    return [jax.tree.map(lambda leaf, n=group: leaf[n], places[place]) for group, place in numbers]


def _parameters(norm: Norm) -> list[tuple[str, nnx.Param]]:
    parameters = [("scale", norm.scale), ("bias", norm.bias)]
    return [(name, parameter) for name, parameter in parameters if parameter is not None]
