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
    embedding_norm: bool = False
    """Normalise the embeddings (after positions are added), as BERT does."""
    head_transform: bool = False
    """BERT's masked-LM head: dense, activation, norm, before the output projection."""
    head_bias: bool = False
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
    def draws(self) -> bool:
        """Whether training draws random numbers inside the model."""
        return any(stack.dropout_rate > 0 for stack in self.stacks.values())
