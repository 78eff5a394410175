"""The one transformer block, of which every stack is made."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.model import AttentionImplementation, StackConfig
from t5x_like.kernels.masks import Mask, MaskSpec, Prepared, RelativeBias, with_bias
from t5x_like.models.attention import Attention, CosSin, Distances, SeveralKeysValues
from t5x_like.models.cache import KeysValues, Slots
from t5x_like.models.experts import MixtureOfExperts, Routing
from t5x_like.models.layers import Embedding, Mlp, Norm, dropout, param
from t5x_like.partitioning.constrain import constrain


@dataclasses.dataclass(frozen=True)
class Shared:
    """What the blocks of a stack are given: all the same, or with own `mask`, `cos_sin` and `is_first`.

    Attributes:
      mask: Of the self-attention, with the relative bias in it; with merged attention also of the encoder's states,
        which come last (in a step of decoding they do not: `cross_mask` is theirs).
      spec: The description of that mask, for tables of relative bias that each layer has of its own.
      cos_sin: Rotary positions of x, or None.
      distances: Of disentangled positions, or None.
      encoded: [B, S, d] for cross-attention, or None: there is none, or each layer has its keys and values ready.
      cross_mask: Of the cross-attention.
      lengths: int32 [B], tokens of each row that are in the slots already, in a step of decoding; else None.
      valid: bool [B, L], False for padding, which experts do not count; None: none.
      is_first: bool scalar where the first layer's attention has no norm in front, else None.
    """

    mask: Mask
    spec: MaskSpec
    cos_sin: CosSin | None = None
    distances: Distances | None = None
    encoded: Array | None = None
    cross_mask: Mask | None = None
    lengths: Array | None = None
    valid: Array | None = None
    is_first: Array | None = None


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
        if config.relative_bias_per_layer and config.positions == "relative_bias":
            self.relative_bias = relative_bias_table(config, rngs=rngs)
        self.has_cross_attention = encoder_width is not None and config.cross_attention == "separate"
        self.is_merged = encoder_width is not None and config.cross_attention == "merged"
        if encoder_width is not None and self.has_cross_attention:
            self.cross_attention_norm = Norm(config)
            self.cross_attention = Attention(config, implementation, kv_width=encoder_width, rngs=rngs)
        self.mlp_norm = Norm(config)
        self.mlp = Mlp(config, rngs=rngs) if config.experts is None else MixtureOfExperts(config, rngs=rngs)
        if config.norm_placement == "both":
            self.self_attention_post_norm, self.mlp_post_norm = Norm(config), Norm(config)
            if self.has_cross_attention:
                self.cross_attention_post_norm = Norm(config)

    def __call__(
        self,
        x_BxLxd: Array,
        shared: Shared,
        *,
        dropout_rng: Array | None = None,
        cross_keys_values: KeysValues | None = None,
    ) -> tuple[Array, KeysValues, Routing | None]:
        """Args:
          cross_keys_values: Keys and values of the encoder's output, where they are computed already.

        Returns:
          x after the block, the keys and values of x, and where the tokens went if the block has experts.
        """
        rngs = [None] * 7 if dropout_rng is None else [jax.random.fold_in(dropout_rng, place) for place in range(7)]
        if cross_keys_values is None and shared.encoded is not None:
            cross_keys_values = self.encoder_keys_values(shared.encoded)

        inner = self._self_attention_input(x_BxLxd, shared)
        query, keys_values = self.self_attention.project(inner)
        new = seen = self.self_attention.placed(keys_values, shared.cos_sin)
        mask = self._with_own_bias(shared, inner.shape[1], inner.shape[1])
        attended: KeysValues | SeveralKeysValues = seen
        if self.is_merged:
            assert cross_keys_values is not None
            attended = tuple(  # type: ignore[assignment]
                (own, other.astype(own.dtype)) for own, other in zip(seen, cross_keys_values, strict=True)
            )
        branch = self.self_attention(
            query,
            attended,
            mask,
            cos_sin=shared.cos_sin,
            distances=self._dropped(shared.distances, rngs[6]),
            dropout_rng=rngs[0],
        )
        x_BxLxd = self._after(x_BxLxd, branch, "self_attention", rngs[1])

        if self.has_cross_attention:
            assert shared.cross_mask is not None and cross_keys_values is not None
            inner = self._before(x_BxLxd, self.cross_attention_norm)
            query = self.cross_attention.query(inner)
            branch = self.cross_attention(query, cross_keys_values, shared.cross_mask, dropout_rng=rngs[2])
            x_BxLxd = self._after(x_BxLxd, branch, "cross_attention", rngs[3])

        x_BxLxd, routing = self._mlp(x_BxLxd, shared, rngs[4], rngs[5])
        return x_BxLxd, new, routing

    def step(self, x_BxTxd: Array, shared: Shared, slots: Slots, cross: Slots | None) -> tuple[Array, Slots]:
        """The block on T more tokens of each row.

        Args:
          slots: This layer's, with the `shared.lengths` tokens before.
          cross: Keys and values of the encoder's output.

        Returns:
          x after the block, and the slots with the new tokens.
        """
        assert shared.lengths is not None
        inner = self._self_attention_input(x_BxTxd, shared)
        # Written before they are read: XLA then writes in place, where it would otherwise copy all slots.
        query, keys_values = self.self_attention.project(inner)
        slots = slots.written(self.self_attention.placed(keys_values, shared.cos_sin), shared.lengths)
        mask = self._with_own_bias(shared, inner.shape[1], slots.size)
        assert isinstance(mask, Prepared)
        parts = [(slots, mask)]
        if self.is_merged:
            assert cross is not None and isinstance(shared.cross_mask, Prepared)
            parts.append((cross, shared.cross_mask))
        branch = self.self_attention.over_slots(query, parts, cos_sin=shared.cos_sin, distances=shared.distances)
        x_BxTxd = self._after(x_BxTxd, branch, "self_attention", None)

        if self.has_cross_attention:
            assert cross is not None and isinstance(shared.cross_mask, Prepared)
            inner = self._before(x_BxTxd, self.cross_attention_norm)
            query = self.cross_attention.query(inner)
            branch = self.cross_attention.over_slots(query, [(cross, shared.cross_mask)])
            x_BxTxd = self._after(x_BxTxd, branch, "cross_attention", None)
        return self._mlp(x_BxTxd, shared, None, None)[0], slots

    def _self_attention_input(self, x: Array, shared: Shared) -> Array:
        inner = self._before(x, self.self_attention_norm)
        return inner if shared.is_first is None else jnp.where(shared.is_first, whole_rows(x), inner)

    def _mlp(
        self, x: Array, shared: Shared, inner_rng: Array | None, branch_rng: Array | None
    ) -> tuple[Array, Routing | None]:
        inner, routing = self._before(x, self.mlp_norm), None
        if isinstance(self.mlp, MixtureOfExperts):
            branch, routing = self.mlp(inner, valid=shared.valid)
        else:
            branch = self.mlp(inner, dropout_rng=inner_rng)
        return self._after(x, branch, "mlp", branch_rng), routing

    def join(self) -> None:
        """Makes one product of those on the same input, for decoding."""
        if not self.is_merged and self.config.positions != "disentangled":
            self.self_attention.join()
        if isinstance(self.mlp, Mlp):
            self.mlp.join()

    def encoder_keys_values(self, encoded_BxSxd: Array) -> KeysValues:
        """Keys and values of the encoder's states."""
        return (self.self_attention if self.is_merged else self.cross_attention).keys_values(encoded_BxSxd)

    def _with_own_bias(self, shared: Shared, q_length: int, kv_length: int) -> Mask:
        if not hasattr(self, "relative_bias"):
            return shared.mask
        bias = relative_bias_of(self.config, self.relative_bias)
        return with_bias(shared.mask, shared.spec, bias, q_length, kv_length)

    def _dropped(self, distances: Distances | None, dropout_rng: Array | None) -> Distances | None:
        if distances is None:
            return None
        return distances._replace(states=dropout(distances.states[None], self.config, dropout_rng)[0])

    def _before(self, x: Array, norm: Norm) -> Array:
        return whole_rows(x if self.config.norm_placement == "post" else norm(x))

    def _after(self, x: Array, branch: Array, name: str, dropout_rng: Array | None) -> Array:
        branch = split_rows(branch)
        if self.config.norm_placement == "both":
            branch = getattr(self, f"{name}_post_norm")(branch)
        x = x + dropout(branch, self.config, dropout_rng)
        x = getattr(self, f"{name}_norm")(x) if self.config.norm_placement == "post" else x
        return constrain(x, _SPLIT)


_SPLIT, _WHOLE = ("batch", "residual_length", "embed"), ("batch", "length", "embed")


def whole_rows(x_BxLxd: Array) -> Array:
    """States that lie as the sums between blocks do, gathered for products with parameters that are split over the same
    devices. Said from both sides: the gradient is added up over those devices and split again."""
    return constrain(constrain(x_BxLxd, _SPLIT), _WHOLE)


def split_rows(x_BxLxd: Array) -> Array:
    """The other way: what such products add to the sums between blocks."""
    return constrain(constrain(x_BxLxd, _WHOLE), _SPLIT)


def relative_bias_table(config: StackConfig, *, rngs: nnx.Rngs) -> Embedding:
    rows = ("relative_buckets", config.relative_bias_buckets)
    return Embedding(rows, ("heads", config.num_heads), stddev=config.d_model**-0.5, rngs=rngs)


def relative_bias_of(config: StackConfig, table: Embedding) -> RelativeBias:
    return RelativeBias(table.embedding[...], config.relative_bias_bidirectional, config.relative_bias_max_distance)


def stacked_blocks(
    config: StackConfig, implementation: AttentionImplementation, *, encoder_width: int | None, rngs: nnx.Rngs
) -> Block:
    """A Block whose parameters have the layers in front: num_layers blocks in one."""

    def make(key: Array) -> Block:
        return Block(config, implementation, encoder_width=encoder_width, rngs=nnx.Rngs(params=key))

    blocks = jax.vmap(make)(jax.random.split(rngs.params(), config.num_layers))
    if not config.first_layer_attention_norm:
        for name, parameter in _parameters(blocks.self_attention_norm):
            setattr(blocks.self_attention_norm, name, param(parameter[...][1:], parameter.get_metadata("logical")))
    return blocks


def layers_alike(blocks: Block) -> Block:
    """Stacked blocks with as many rows in each parameter: the norm that the first layer has not got is filled up."""
    if blocks.config.first_layer_attention_norm:
        return blocks
    layers = blocks.config.num_layers

    def filled(leaf: Array) -> Array:
        return leaf if leaf.shape[0] == layers else jnp.concatenate([jnp.zeros_like(leaf[:1]), leaf])

    return jax.tree.map(filled, blocks)


def single_blocks(blocks: Block) -> list[Block]:
    """Stacked blocks one by one."""
    alike = layers_alike(blocks)
    return [jax.tree.map(lambda leaf, n=number: leaf[n], alike) for number in range(blocks.config.num_layers)]


def _parameters(norm: Norm) -> list[tuple[str, nnx.Param]]:
    found = [("scale", norm.scale), ("bias", norm.bias)]
    return [(name, parameter) for name, parameter in found if parameter is not None]
