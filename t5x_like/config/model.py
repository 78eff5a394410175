"""The architecture of a model: one description that every family is a preset of."""

from __future__ import annotations

from typing import Literal

from t5x_like.config.base import configuration

Architecture = Literal["encoder_decoder", "decoder", "encoder"]
Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
Norm = Literal["rmsnorm", "layernorm"]
Positions = Literal["relative_bias", "rope", "learned", "none"]
Dtype = Literal["float32", "bfloat16"]
AttentionImplementation = Literal["reference", "xla", "cudnn"]
Remat = Literal["none", "dots", "full"]


@configuration
class StackConfig:
    """A stack of identical transformer blocks. A decoder stack beside an encoder also has cross-attention."""

    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    """Key and value heads: equal to num_heads for multi-head, 1 for multi-query, between them for grouped attention."""
    head_dim: int
    d_ff: int
    mlp_activation: Activation = "gelu_tanh"
    mlp_gated: bool = True
    """Gated: activation(x wi_0) * (x wi_1); plain: activation(x wi)."""
    norm: Norm = "rmsnorm"
    norm_placement: Literal["pre", "post"] = "pre"
    """Pre-norm stacks end in a final norm; post-norm stacks normalise after each residual addition."""
    norm_epsilon: float = 1e-6
    use_bias: bool = False
    """Biases in the projections and in LayerNorm."""
    positions: Positions = "relative_bias"
    relative_bias_buckets: int = 32
    relative_bias_max_distance: int = 128
    relative_bias_bidirectional: bool = True
    """Half of the buckets for keys to the right. False only for stacks that never look right (a causal decoder)."""
    rope_base: float = 10_000.0
    max_positions: int = 512
    """Rows of the table of learned positions; used by `positions="learned"` only."""
    attention_scale: float | None = None
    """Factor on the attention scores; None means head_dim**-0.5. T5 uses 1.0 (it is folded into the initialiser)."""
    dropout_rate: float = 0.0
    dropout_broadcast_length: bool = False
    """Share one dropout mask over the length dimension, as T5 does: far fewer random numbers."""


@configuration
class ModelConfig:
    """One or two stacks between a token table and a head over the vocabulary.

    encoder and decoder: an encoder-decoder; decoder alone: a causal or prefix language model (which one is a mask that
    comes with the batch); encoder alone: a masked language model.
    """

    encoder: StackConfig | None
    decoder: StackConfig | None
    vocab_size: int
    """Rows of the token table: the tokenizer's ids, mostly rounded up for the hardware."""
    tie_embeddings: bool = False
    """The head uses the token table."""
    scale_logits: bool = False
    """Multiply the head's input by d_model**-0.5, as T5 1.0 does with its tied table."""
    embedding_stddev: float = 1.0
    """Standard deviation of the token table at the start."""
    embedding_width: int | None = None
    """Columns of the token table, of learned positions and of the embeddings' norm, where these are not d_model wide:
    each stack then begins with a projection."""
    embedding_norm: bool = False
    """Normalise the embeddings (after positions are added), as BERT does."""
    head_transform: bool = False
    """BERT's masked-LM head: dense, activation, norm, before the output projection. The dense layer goes to the token
    table's width."""
    head_bias: bool = False
    generator: StackConfig | None = None
    """ELECTRA (Clark et al. 2020): a smaller encoder, a quarter to half as wide, that is trained to fill in the masked
    tokens. The model's own encoder then reads the text with samples of it in their place and says of each token whether
    it was replaced. The head over the vocabulary is the generator's; the embeddings are shared, and learned positions
    with them. After training the encoder is the model."""
    discriminator_loss_weight: float = 50.0
    """Of the mean over all tokens of the discriminator's cross-entropy; the generator's, over masked tokens, has 1."""
    dtype: Dtype = "float32"
    """Type of activations and matrix products. Parameters are always float32."""
    attention: AttentionImplementation = "reference"
    scan_layers: bool = True
    """Run the stacked layers by `lax.scan`; False unrolls them, which is for debugging. Same parameters either way."""
    remat: Remat = "none"
    """What the backward pass recomputes per layer: nothing, all but matrix products, or everything."""

    @property
    def architecture(self) -> Architecture:
        if self.encoder is not None and self.decoder is not None:
            return "encoder_decoder"
        return "decoder" if self.encoder is None else "encoder"

    @property
    def stacks(self) -> dict[str, StackConfig]:
        """The stacks that are there, by name, encoder first."""
        named = {"encoder": self.encoder, "decoder": self.decoder}
        return {name: stack for name, stack in named.items() if stack is not None}

    @property
    def table_width(self) -> int:
        """Columns of the token table that the head sees."""
        return self.embedding_width or next(reversed(self.stacks.values())).d_model

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers inside the model: dropout, or a generator's samples."""
        return self.generator is not None or any(stack.dropout_rate > 0 for stack in self.stacks.values())
