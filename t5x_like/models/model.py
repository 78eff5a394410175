"""The model: token embeddings, one or two stacks and a head. The stacks decide the architecture.

Padding in a batch without segment ids:
  Encoders hide the tokens with the padding id, which must not occur in the text.
  Decoders need no padding mask. Rows are padded on the right, a query attends to keys on its left, and
  `decoder_causal_attention` adds positions of the prefix, which has no padding inside. States of tokens therefore do
  not depend on padding, and the padding id can be the start token, as it is in T5.
With segment ids, queries attend to the keys of their own segment, also from decoder to encoder.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.config.validation.model import model_problems
from t5x_like.errors import ConfigError, DataError
from t5x_like.kernels.attention_masks import MaskSpec
from t5x_like.model_output import AuxiliaryLoss, ModelOutput
from t5x_like.models.attention import attention_problems
from t5x_like.models.kv_cache import KVCache, LayerCache, empty_layer_cache, to_layer_cache
from t5x_like.models.layers import Embedding, LMHead, param, quantization_problems
from t5x_like.models.moe import Routing, router_losses
from t5x_like.models.stack import Stack
from t5x_like.sharding.constrain import constrain


class Model(nnx.Module):
    """Transformer over a batch of features: logits for training, encoding, and decoding with a cache."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Create the model.

        Raises:
          ConfigError: the configuration is not valid, or its attention backend does not support it; all problems are
            listed.
        """
        problems = [*model_problems(config), *attention_problems(config), *quantization_problems(config)]
        if problems:
            raise ConfigError(problems)
        self.config = config
        self.dtype = jnp.dtype(config.dtype)
        # The last stack has the head: the decoder where there is one.
        output = next(reversed(config.stacks.values()))
        # As wide as the head, which reads the same table if the embeddings are tied.
        make_table = functools.partial(
            Embedding,
            ("vocab", config.vocab_size),
            stddev=config.embedding_stddev,
            rngs=rngs,
            padding=config.vocab_padding_rows,
        )
        self.token_embedder = make_table(("embed", config.lm_head_width))
        if config.encoder is not None and config.separate_encoder_embeddings:
            self.encoder_token_embedder = make_table(("embed", config.encoder.d_model))
        if config.unscaled_embedding_token_id is not None:
            self.unscaled_embedding = param(jnp.zeros(config.lm_head_width), ("embed",))
        if config.encoder is not None:
            self.encoder = Stack(config.encoder, config, encoder_width=None, rngs=rngs)
        if config.decoder is not None:
            width = None if config.encoder is None else config.encoder.d_model
            self.decoder = Stack(config.decoder, config, encoder_width=width, rngs=rngs)
        self.head = self._make_head(output, rngs)

    def _make_head(self, stack: StackConfig, rngs: nnx.Rngs) -> nnx.Module:
        return LMHead(self.config, stack, rngs=rngs)

    def __call__(self, batch: Mapping[str, Array], *, dropout_rng: Array | None = None) -> Array:
        """Return the logits of `output`, float32 [B, T, V]."""
        return self.output(batch, dropout_rng=dropout_rng).logits

    def output(self, batch: Mapping[str, Array], *, dropout_rng: Array | None = None) -> ModelOutput:
        """Return the logits, float32 [B, T, V], of one sub-batch with seqio's feature names, and auxiliary losses.

        Reads `encoder_input_tokens` and `decoder_input_tokens` for the stacks that the model has. Optional features are
        `*_segment_ids` and `*_positions` of packed rows, `*_token_types` and, in decoders, `decoder_causal_attention`.
        Positions restart in each segment. Learned and rotary positions read them; masks and relative positions use the
        indices of the row. The decoder may have K rows for each row of the encoder, side by side: answers to the same
        inputs. In packed rows, the segments of all of them have the numbers of the encoder's.

        Args:
          batch: Features of the sub-batch, [B, L] each.
          dropout_rng: Key; None: no dropout.

        Raises:
          DataError: a feature that the architecture needs is missing.
        """
        states, losses = self.states(batch, dropout_rng=dropout_rng)
        # Models with another head have an `output` of their own.
        assert isinstance(self.head, LMHead)
        projection = self.head.projection(states, self.token_embedder.embedding[...])
        return ModelOutput(self.head.logits(projection), losses, projection=projection)

    def states(
        self, batch: Mapping[str, Array], *, dropout_rng: Array | None = None
    ) -> tuple[Array, dict[str, AuxiliaryLoss]]:
        """Return the states of the last stack, [B, T, d], which the head reads, and the layers' losses; see
        `output`."""
        # Keys of encoder and decoder.
        rngs = (None, None) if dropout_rng is None else jax.random.split(dropout_rng)
        encoder_ids = batch.get("encoder_segment_ids")
        encoded, losses = None, dict[str, AuxiliaryLoss]()
        if self.config.encoder is not None:
            encoded, routing = self._encode(
                feature(batch, "encoder_input_tokens", self.config),
                segment_ids=encoder_ids,
                positions=batch.get("encoder_positions"),
                token_types=batch.get("encoder_token_types"),
                dropout_rng=rngs[0],
            )
            losses = _router_losses("encoder", self.config.encoder, routing)
        if self.config.decoder is None:
            assert encoded is not None
            return encoded, losses

        tokens = feature(batch, "decoder_input_tokens", self.config)
        decoder_ids = batch.get("decoder_segment_ids")
        prefix = batch.get("decoder_causal_attention")
        # The same positions as queries and as keys: only pairs within the prefix are bidirectional.
        prefix = None if prefix is None else prefix != 0
        # Causal except within the prefix, and only within a segment.
        mask = MaskSpec(
            causal=True, q_segment_ids=decoder_ids, kv_segment_ids=decoder_ids, q_prefix=prefix, kv_prefix=prefix
        )
        cross_mask = None
        if encoded is not None:
            inputs = batch["encoder_input_tokens"]
            valid = non_padding_mask(inputs, self.config.pad_token_id) if encoder_ids is None else encoder_ids
            if (repeats := tokens.shape[0] // encoded.shape[0]) > 1:
                encoded, valid = (jnp.repeat(x, repeats, axis=0) for x in (encoded, valid))
            # Without segment ids on one side, all queries attend to all tokens of the encoder that are not padding.
            is_packed = encoder_ids is not None and decoder_ids is not None
            cross_mask = MaskSpec(
                q_segment_ids=decoder_ids if is_packed else None,
                kv_segment_ids=valid.astype(jnp.int32),
                padding_at_end=encoder_ids is None,
            )
        states, _, routing = self.decoder(
            self._embed(tokens),
            mask,
            positions=batch.get("decoder_positions"),
            token_types=batch.get("decoder_token_types"),
            valid=decoder_non_padding_mask(tokens, self.config.pad_token_id)
            if decoder_ids is None
            else decoder_ids != 0,
            encoded=encoded,
            cross_mask=cross_mask,
            dropout_rng=rngs[1],
        )
        return states, losses | _router_losses("decoder", self.config.decoder, routing)

    def encode(
        self,
        tokens_BxS: Array,
        *,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        token_types: Array | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:
        """Return the encoder's states [B, S, d]. Without segment ids, tokens with the model's `pad_token_id` are
        padding."""
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
            encoder_mask(tokens_BxS, segment_ids, self.config.pad_token_id),
            positions=positions,
            token_types=token_types,
            valid=non_padding_mask(tokens_BxS, self.config.pad_token_id) if segment_ids is None else segment_ids != 0,
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
    ) -> KVCache:
        """Return an empty cache. `start_decoding` also fills in the encoder's keys and values.

        Args:
          rows: Number of rows.
          length: Largest number of tokens per row.
          encoder_length: Number of encoder tokens per row.
          widest_step: Largest number of tokens that one `decode` adds and that `truncate` undoes at once.
          dtype: Type of keys and values: None for the model's, another float type, or int8.
        """
        assert self.config.decoder is not None
        decoder, dtype = self.config.decoder, jnp.dtype(dtype or self.dtype)

        def layer_cache(count: int) -> LayerCache:
            return empty_layer_cache(rows, decoder.num_kv_heads, count, decoder.head_dim, dtype)

        # A step writes before it reads, and speculative decoding undoes part of it: the cache needs room for one step
        # more.
        counts = {"global": length + widest_step, "local": length + widest_step}
        if decoder.sliding_window is not None:
            # The oldest key that the first token of a step attends to must survive the writes of the whole step.
            counts["local"] = min(counts["local"], decoder.sliding_window[0] + widest_step)
        has_encoder = self.config.encoder is not None
        return KVCache(
            lengths=constrain(jnp.zeros(rows, jnp.int32), ("batch",)),
            layers=tuple(layer_cache(counts[kind]) for kind in decoder.layer_kinds),
            cross=tuple(layer_cache(encoder_length) for _ in decoder.layer_kinds) if has_encoder else None,
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
    ) -> KVCache:
        """Return an empty cache with the cross-attention keys and values of each layer computed once.

        Args:
          encoded: Encoder states [B, S, d] from `encode`; None for a decoder alone.
          encoder_segment_ids: int32 [B, S], 0 where the encoder's tokens are padding; None: no padding.
          rows: See `init_cache`.
          length: See `init_cache`.
          widest_step: See `init_cache`.
          dtype: See `init_cache`.
        """
        encoder_length = 0 if encoded is None else encoded.shape[1]
        cache = self.init_cache(rows, length, encoder_length=encoder_length, widest_step=widest_step, dtype=dtype)
        if encoded is None:
            return cache
        if encoder_segment_ids is None:
            # As in `init_cache`: all caches of a model have one structure, so that rows of one can be inserted into
            # another.
            encoder_segment_ids = jnp.ones(encoded.shape[:2], jnp.int32)
        encoded = encoded.astype(self.dtype)
        # Once per text instead of once per token.
        keys_values = [block.encoder_keys_values(encoded) for block in self.decoder.blocks()]
        return cache._replace(
            cross=tuple(to_layer_cache(pair, cache.layers[0].dtype) for pair in keys_values),
            encoder_segment_ids=encoder_segment_ids.astype(jnp.int32),
        )

    def prefill(
        self,
        tokens_BxT: Array,
        lengths_B: Array,
        cache: KVCache,
        *,
        bidirectional: bool = False,
        all_logits: bool = False,
    ) -> tuple[Array, KVCache]:
        """Process the beginning of each row in one pass. Earlier contents of the cache's layers are discarded.

        Args:
          tokens_BxT: Tokens, padded on the right; T is at most the cache's length.
          lengths_B: int32, number of tokens of each row. A row of length 0 stays empty; its logits are undefined.
          cache: Cache from `init_cache` or `start_decoding`.
          bidirectional: The tokens attend to each other in both directions, as the prefix of a prefix-LM.
          all_logits: Return the logits of each token, not only of each row's last one.

        Returns:
          (logits float32 [B, V], or [B, T, V] with all_logits, and the cache with the tokens).
        """
        length = tokens_BxT.shape[1]
        valid = jnp.arange(length) < lengths_B[:, None]
        prefix = valid if bidirectional else None
        cross = None
        if cache.cross is not None:
            # The prefill runs the scan of training, which takes the keys and values of all layers as one array.
            cross = jax.tree.map(
                lambda *leaves: jnp.stack(leaves), *[layer.dequantize(self.dtype) for layer in cache.cross]
            )
        states, new, _ = self.decoder(
            self._embed(tokens_BxT),
            MaskSpec(
                causal=True,
                kv_segment_ids=valid.astype(jnp.int32),
                q_prefix=prefix,
                kv_prefix=prefix,
                padding_at_end=True,
            ),
            valid=valid,
            cross_mask=_cross_mask(cache),
            cross=cross,
        )
        layers = tuple(
            layer.prefill(jax.tree.map(lambda leaf, n=number: leaf[n], new), lengths_B)
            for number, layer in enumerate(cache.layers)
        )
        if not all_logits:
            # One position per row, before the head: logits of all positions would take [B, T, V].
            last_B = jnp.maximum(lengths_B - 1, 0)
            states = jnp.take_along_axis(states, last_B[:, None, None], axis=1)
        logits = self._logits(states)
        return logits if all_logits else logits[:, 0], cache._replace(lengths=lengths_B, layers=layers)

    def decode(self, tokens_BxT: Array, cache: KVCache, *, counts_B: Array | None = None) -> tuple[Array, KVCache]:
        """Process the next T tokens of each row: one step (T = 1), or several tokens that are verified at once.

        Rows may have different lengths; the tokens follow those in the cache. T is at most the cache's widest step.

        Args:
          tokens_BxT: Tokens.
          cache: Cache of the tokens before.
          counts_B: int32, number of valid tokens of each row, from the left; None: T. The others are not added to the
            cache, and their logits are undefined.

        Returns:
          (logits float32 [B, T, V], and the cache with the tokens).
        """
        length = tokens_BxT.shape[1]
        counts = jnp.full(cache.rows, length, jnp.int32) if counts_B is None else counts_B
        # All T tokens are written to the cache. Those beyond `counts` lie after the row's length: masks hide them, and
        # later tokens overwrite them.
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
            # The factor is rounded to the type of the states first, as in Gemma's own code: in bfloat16 the result
            # differs otherwise.
            x = x * jnp.asarray(math.sqrt(x.shape[-1]), x.dtype)
        if self.config.unscaled_embedding_token_id is not None:
            unscaled = self.unscaled_embedding[...].astype(x.dtype)
            x = jnp.where((tokens == self.config.unscaled_embedding_token_id)[..., None], unscaled, x)
        return constrain(x, ("batch", "residual_length", "embed"))

    def _logits(self, states: Array) -> Array:
        return self.head(states, self.token_embedder.embedding[...])


def _cross_mask(cache: KVCache) -> MaskSpec | None:
    return None if cache.cross is None else MaskSpec(kv_segment_ids=cache.encoder_segment_ids)


def _router_losses(name: str, stack: StackConfig, routing: Routing | None) -> dict[str, AuxiliaryLoss]:
    """Return the losses of a stack's routers if it has experts."""
    return {} if routing is None or stack.experts is None else router_losses(name, stack.experts, routing)


def non_padding_mask(tokens_BxL: Array, pad_id: int | None) -> Array:
    """Return bool [B, L], True for tokens other than padding; all True without a padding id."""
    return jnp.ones(tokens_BxL.shape, bool) if pad_id is None else tokens_BxL != pad_id


def decoder_non_padding_mask(tokens_BxL: Array, pad_id: int | None) -> Array:
    """Return `non_padding_mask` of a decoder, whose first token is the start token and may have the padding id."""
    return non_padding_mask(tokens_BxL, pad_id) | (jnp.arange(tokens_BxL.shape[1]) == 0)


def encoder_mask(tokens_BxS: Array, segment_ids: Array | None, pad_id: int | None) -> MaskSpec:
    """Return the mask of an encoder's self-attention."""
    if segment_ids is None:
        # Rows are padded at their end, as seqio's features are.
        return MaskSpec(kv_segment_ids=non_padding_mask(tokens_BxS, pad_id).astype(jnp.int32), padding_at_end=True)
    return MaskSpec(q_segment_ids=segment_ids, kv_segment_ids=segment_ids)


def feature(batch: Mapping[str, Array], name: str, config: ModelConfig) -> Array:
    """Return a feature of the batch.

    Raises:
      DataError: the batch has no such feature.
    """
    if name not in batch:
        raise DataError(
            f"the batch has no feature {name!r}, which a model of architecture {config.architecture!r} reads; "
            f"found {sorted(batch)}; choose a data configuration for this architecture"
        )
    return batch[name]
