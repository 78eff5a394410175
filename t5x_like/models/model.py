"""The model: a token table, one or two stacks, a head. Which architecture it is follows from the stacks that are there.

How padding is known, in a batch without segment ids:
  Encoders hide the tokens with id 0, which is padding and nothing else.
  Decoders need no padding mask. Rows are padded on the right, a query sees what is on its left, and what
  `decoder_causal_attention` adds are cells of the prefix, which has no padding inside. So states at real positions do
  not depend on padding, and id 0 can be the start token, as it is in T5.
With segment ids, queries see the keys of their own segment, also across from decoder to encoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.errors import ConfigError, DataError
from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.config.sections import model_problems
from t5x_like.kernels.masks import MaskSpec
from t5x_like.kernels.matmul import matmul
from t5x_like.models.cache import Cache, Slots, empty_slots, stored
from t5x_like.models.experts import Routing, load_balancing_loss
from t5x_like.models.layers import Dense, Embedding, Norm, activate, param
from t5x_like.models.stacks import Stack
from t5x_like.outputs import Loss, Output
from t5x_like.partitioning.constrain import constrain


class Head(nnx.Module):
    """From a stack's states to logits: BERT's transform if asked for, then the token table or an own kernel, then a
    bias."""

    def __init__(self, config: ModelConfig, stack: StackConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.activation = stack.mlp_activation
        embed = ("embed", stack.d_model)
        stddev = stack.d_model**-0.5
        width = stack.d_model
        if config.head_transform:
            width = config.table_width
            self.transform = Dense([embed], [("mlp", width)], stddev=stddev, use_bias=stack.use_bias, rngs=rngs)
            self.transform_norm = Norm(stack, ("norm", width))
        if not config.tie_embeddings:
            shape = (width, config.vocab_size)
            self.kernel = param(width**-0.5 * jax.random.normal(rngs.params(), shape), ("embed", "vocab"))
        if config.head_bias:
            self.bias = param(jnp.zeros(config.vocab_size), ("vocab",))

    def __call__(self, x_BxLxd: Array, table_Vxd: Array) -> Array:
        """float32 [B, L, V]; the table is read if it is tied."""
        x = x_BxLxd
        if self.config.head_transform:
            x = self.transform_norm(activate(self.transform(x), self.activation))
        if self.config.scale_logits:
            x = x * x.shape[-1] ** -0.5
        kernel = table_Vxd.T if self.config.tie_embeddings else self.kernel[...]
        logits = matmul(x, kernel, 1, jnp.dtype(jnp.float32))
        if self.config.head_bias:
            logits = logits + self.bias[...]
        if self.config.logits_softcap is not None:
            logits = self.config.logits_softcap * jnp.tanh(logits / self.config.logits_softcap)
        return constrain(logits, ("batch", "length", "vocab"))


class Model(nnx.Module):
    """Maps a batch of features to logits; encodes; decodes through a cache."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Raises ConfigError where the configuration is no model; all its problems are listed."""
        problems = list(model_problems(config))
        if problems:
            raise ConfigError(problems)
        self.config = config
        self.dtype = jnp.dtype(config.dtype)
        output = next(reversed(config.stacks.values()))
        table = ("vocab", config.vocab_size), ("embed", config.table_width)
        self.token_embedder = Embedding(*table, stddev=config.embedding_stddev, rngs=rngs)
        if config.encoder is not None and config.separate_encoder_embeddings:
            table = ("vocab", config.vocab_size), ("embed", config.encoder.d_model)
            self.encoder_token_embedder = Embedding(*table, stddev=config.embedding_stddev, rngs=rngs)
        if config.unscaled_token is not None:
            self.unscaled_embedding = param(jnp.zeros(config.table_width), ("embed",))
        if config.encoder is not None:
            self.encoder = Stack(config.encoder, config, encoder_width=None, rngs=rngs)
        if config.decoder is not None:
            width = None if config.encoder is None else config.encoder.d_model
            self.decoder = Stack(config.decoder, config, encoder_width=width, rngs=rngs)
        self.head = self._make_head(output, rngs)

    def _make_head(self, stack: StackConfig, rngs: nnx.Rngs) -> nnx.Module:
        return Head(self.config, stack, rngs=rngs)

    def __call__(self, batch: Mapping[str, Array], *, dropout_rng: Array | None = None) -> Array:
        """The logits of `output`, float32 [B, T, V]."""
        return self.output(batch, dropout_rng=dropout_rng).logits

    def output(self, batch: Mapping[str, Array], *, dropout_rng: Array | None = None) -> Output:
        """What is trained: logits, float32 [B, T, V], of one sub-batch under seqio's feature names, and further losses.

        Reads `encoder_input_tokens` and `decoder_input_tokens` as far as there are such stacks; where present
        `*_segment_ids` and `*_positions` of packed rows, `*_token_types` and, in decoders, `decoder_causal_attention`.
        Positions restart in each segment and count its cells; learned and rotary positions read them, order and
        distance are those of the cells.

        Args:
          dropout_rng: Key; None for no dropout.

        Raises:
          DataError: a feature that the architecture needs is missing.
        """
        states, losses = self.states(batch, dropout_rng=dropout_rng)
        return Output(self._logits(states), losses)

    def states(self, batch: Mapping[str, Array], *, dropout_rng: Array | None = None) -> tuple[Array, dict[str, Loss]]:
        """What the head reads, [B, T, d], the states of the last stack, and the losses of its layers; see `output`."""
        rngs = (None, None) if dropout_rng is None else jax.random.split(dropout_rng)
        encoder_ids = batch.get("encoder_segment_ids")
        encoded, losses = None, dict[str, Loss]()
        if self.config.encoder is not None:
            encoded, routing = self._encode(
                feature(batch, "encoder_input_tokens", self.config),
                segment_ids=encoder_ids,
                positions=batch.get("encoder_positions"),
                token_types=batch.get("encoder_token_types"),
                dropout_rng=rngs[0],
            )
            losses = _balancing("encoder", self.config.encoder, routing)
        if self.config.decoder is None:
            assert encoded is not None
            return encoded, losses

        tokens = feature(batch, "decoder_input_tokens", self.config)
        decoder_ids = batch.get("decoder_segment_ids")
        prefix = batch.get("decoder_causal_attention")
        prefix = None if prefix is None else prefix != 0
        mask = MaskSpec(
            causal=True, q_segment_ids=decoder_ids, kv_segment_ids=decoder_ids, q_prefix=prefix, kv_prefix=prefix
        )
        cross_mask = None
        if self.config.encoder is not None:
            if encoder_ids is None or decoder_ids is None:
                inputs = batch["encoder_input_tokens"]
                valid = real(inputs, self.config.pad_id) if encoder_ids is None else encoder_ids
                cross_mask = MaskSpec(kv_segment_ids=valid.astype(jnp.int32))
            else:
                cross_mask = MaskSpec(q_segment_ids=decoder_ids, kv_segment_ids=encoder_ids)
        states, _, routing = self.decoder(
            self._embed(tokens),
            mask,
            positions=batch.get("decoder_positions"),
            token_types=batch.get("decoder_token_types"),
            valid=not_padding(tokens, self.config.pad_id) if decoder_ids is None else decoder_ids != 0,
            encoded=encoded,
            cross_mask=cross_mask,
            dropout_rng=rngs[1],
        )
        return states, losses | _balancing("decoder", self.config.decoder, routing)

    def encode(
        self,
        tokens_BxS: Array,
        *,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        token_types: Array | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:
        """The encoder's states [B, S, d]. Without segment ids, tokens with the model's `pad_id` are padding."""
        return self._encode(
            tokens_BxS, segment_ids=segment_ids, positions=positions, token_types=token_types, dropout_rng=dropout_rng
        )[0]

    def _encode(
        self,
        tokens_BxS: Array,
        *,
        segment_ids: Array | None,
        positions: Array | None,
        token_types: Array | None,
        dropout_rng: Array | None,
    ) -> tuple[Array, Routing | None]:
        separate = self.config.separate_encoder_embeddings
        states, _, routing = self.encoder(
            self._embed(tokens_BxS, self.encoder_token_embedder if separate else None),
            encoder_mask(tokens_BxS, segment_ids, self.config.pad_id),
            positions=positions,
            token_types=token_types,
            valid=real(tokens_BxS, self.config.pad_id) if segment_ids is None else segment_ids != 0,
            dropout_rng=dropout_rng,
        )
        return states, routing

    def init_cache(
        self,
        rows: int,
        length: int,
        *,
        encoder_length: int = 0,
        widest_step: int = 1,
        dtype: str | jnp.dtype | None = None,
    ) -> Cache:
        """An empty cache; with an encoder, `start_decoding` makes one that is ready.

        Args:
          length: Tokens per row, at most.
          widest_step: Tokens that `decode` is given at once, at most, and that are undone at once, at most.
          dtype: Of keys and values: the model's (None), another float type, or int8.
        """
        assert self.config.decoder is not None
        decoder, dtype = self.config.decoder, jnp.dtype(dtype or self.dtype)

        def slots(count: int) -> Slots:
            return empty_slots(rows, decoder.num_kv_heads, count, decoder.head_dim, dtype)

        counts = {"global": length + widest_step, "local": length + widest_step}
        if decoder.window is not None:
            counts["local"] = min(counts["local"], decoder.window[0] + widest_step)
        has_encoder = self.config.encoder is not None
        return Cache(
            lengths=constrain(jnp.zeros(rows, jnp.int32), ("batch",)),
            layers=tuple(slots(counts[kind]) for kind in decoder.layer_kinds),
            cross=tuple(slots(encoder_length) for _ in decoder.layer_kinds) if has_encoder else None,
            encoder_segment_ids=jnp.zeros((rows, encoder_length), jnp.int32) if has_encoder else None,
        )

    def start_decoding(
        self,
        encoded: Array | None,
        encoder_segment_ids: Array | None,
        rows: int,
        length: int,
        *,
        widest_step: int = 1,
        dtype: str | jnp.dtype | None = None,
    ) -> Cache:
        """A cache for `length` tokens per row, with each layer's cross-attention keys and values computed, once.

        Args:
          encoded: [B, S, d] from `encode`; None for a decoder alone.
          encoder_segment_ids: [B, S], 0 where the encoder's tokens are padding; None: no padding.
          rows, length, widest_step, dtype: As in `init_cache`.
        """
        encoder_length = 0 if encoded is None else encoded.shape[1]
        cache = self.init_cache(rows, length, encoder_length=encoder_length, widest_step=widest_step, dtype=dtype)
        if encoded is None:
            return cache
        if encoder_segment_ids is None:
            encoder_segment_ids = jnp.ones(encoded.shape[:2], jnp.int32)
        encoded = encoded.astype(self.dtype)
        keys_values = [block.encoder_keys_values(encoded) for block in self.decoder.blocks()]
        return cache._replace(
            cross=tuple(stored(one, cache.layers[0].dtype) for one in keys_values),
            encoder_segment_ids=encoder_segment_ids.astype(jnp.int32),
        )

    def prefill(
        self,
        tokens_BxT: Array,
        lengths_B: Array,
        cache: Cache,
        *,
        bidirectional: bool = False,
        all_logits: bool = False,
    ) -> tuple[Array, Cache]:
        """Reads the beginning of each row in one pass; what the cache's layers had is lost.

        Args:
          tokens_BxT: Padded on the right; T is at most the cache's length.
          lengths_B: int32, tokens of each row; a row of length 0 stays empty, and its logits mean nothing.
          bidirectional: The tokens see each other, as the prefix of a prefix-LM does.
          all_logits: Of each token, not of each row's last one alone.

        Returns:
          (float32 [B, V], or [B, T, V] with all_logits, and the cache with the tokens).
        """
        length = tokens_BxT.shape[1]
        valid = jnp.arange(length) < lengths_B[:, None]
        prefix = valid if bidirectional else None
        cross = None
        if cache.cross is not None:
            cross = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[one.floats(self.dtype) for one in cache.cross])
        states, new, _ = self.decoder(
            self._embed(tokens_BxT),
            MaskSpec(causal=True, kv_segment_ids=valid.astype(jnp.int32), q_prefix=prefix, kv_prefix=prefix),
            valid=valid,
            cross_mask=_cross_mask(cache),
            cross=cross,
        )
        layers = tuple(
            slots.filled(jax.tree.map(lambda leaf, n=number: leaf[n], new), lengths_B)
            for number, slots in enumerate(cache.layers)
        )
        if not all_logits:
            last_B = jnp.maximum(lengths_B - 1, 0)
            states = jnp.take_along_axis(states, last_B[:, None, None], axis=1)
        logits = self._logits(states)
        return logits if all_logits else logits[:, 0], cache._replace(lengths=lengths_B, layers=layers)

    def decode(self, tokens_BxT: Array, cache: Cache, *, counts_B: Array | None = None) -> tuple[Array, Cache]:
        """Logits of T more tokens per row, and the cache with them: a step (T = 1), or several tokens to be verified.

        Rows are of unequal length: a row's tokens follow those that it has. T is at most the cache's widest step.

        Args:
          counts_B: int32, how many of the T tokens a row really has, from the left; None: all. The rest leaves no
            trace, and its logits mean nothing.

        Returns:
          (float32 [B, T, V], cache).
        """
        length = tokens_BxT.shape[1]
        counts = jnp.full(cache.rows, length, jnp.int32) if counts_B is None else counts_B
        states, layers = self.decoder.step(
            self._embed(tokens_BxT),
            cache,
            valid=jnp.arange(length) < counts[:, None],
            cross_mask=_cross_mask(cache),
        )
        return self._logits(states), cache._replace(lengths=cache.lengths + counts, layers=layers)

    def _embed(self, tokens: Array, embedder: Embedding | None = None) -> Array:
        x = (embedder or self.token_embedder)(tokens, self.dtype)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(x.shape[-1]), x.dtype)
        if self.config.unscaled_token is not None:
            own = self.unscaled_embedding[...].astype(x.dtype)
            x = jnp.where((tokens == self.config.unscaled_token)[..., None], own, x)
        return constrain(x, ("batch", "residual_length", "embed"))

    def _logits(self, states: Array) -> Array:
        return self.head(states, self.token_embedder.embedding[...])


def _cross_mask(cache: Cache) -> MaskSpec | None:
    return None if cache.cross is None else MaskSpec(kv_segment_ids=cache.encoder_segment_ids)


def _balancing(name: str, stack: StackConfig, routing: Routing | None) -> dict[str, Loss]:
    """The loss that spreads a stack's tokens over its experts, if it has any."""
    if routing is None or stack.experts is None:
        return {}
    tokens = jnp.sum(routing.tokens) / stack.num_layers
    loss = Loss(load_balancing_loss(routing) * tokens, tokens, stack.experts.load_balancing)
    return {f"load_balancing/{name}": loss}


def real(tokens_BxL: Array, pad_id: int | None) -> Array:
    """The tokens that are no padding, bool [B, L]."""
    return jnp.ones(tokens_BxL.shape, bool) if pad_id is None else tokens_BxL != pad_id


def not_padding(tokens_BxL: Array, pad_id: int | None = 0) -> Array:
    """The same of a decoder; its first token may have the id of padding and be the start token."""
    return real(tokens_BxL, pad_id) | (jnp.arange(tokens_BxL.shape[1]) == 0)


def encoder_mask(tokens_BxS: Array, segment_ids: Array | None, pad_id: int | None = 0) -> MaskSpec:
    """What the queries of an encoder see."""
    if segment_ids is None:
        return MaskSpec(kv_segment_ids=real(tokens_BxS, pad_id).astype(jnp.int32))
    return MaskSpec(q_segment_ids=segment_ids, kv_segment_ids=segment_ids)


def feature(batch: Mapping[str, Array], name: str, config: ModelConfig) -> Array:
    """Raises DataError where the batch has no such feature."""
    if name not in batch:
        raise DataError(
            f"the batch has no feature {name!r}, which a model of architecture {config.architecture!r} reads; "
            f"found {sorted(batch)}; choose the data layout that belongs to the model"
        )
    return batch[name]
