"""The architecture of a model: one description that every family is a preset of."""

from __future__ import annotations

from typing import Literal

from t5x_like.config.base import configuration

Architecture = Literal["encoder_decoder", "decoder", "encoder"]
Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
Norm = Literal["rmsnorm", "layernorm"]
Positions = Literal["relative_bias", "rope", "learned", "disentangled", "none"]
LayerKind = Literal["global", "local"]
Dtype = Literal["float32", "bfloat16"]
AttentionImplementation = Literal["reference", "xla", "cudnn"]
Remat = Literal["none", "dots", "full"]
Pooling = Literal["cls", "mean", "last"]
HeadKind = Literal["classification", "token_classification", "regression", "embedding"]


@configuration
class RopeScaling:
    """Rotary frequencies changed for rows longer than those of the first training."""

    kind: Literal["linear", "llama3"]
    """linear: all frequencies divided by `factor` (Chen et al. 2023). llama3: only those whose wavelength is above
    original_max_positions / low_frequency_factor; those below original_max_positions / high_frequency_factor stay, and
    between the two lies a blend."""
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192


@configuration
class Experts:
    """A mixture of experts in the place of the MLP: a router sends each token to the experts that it scores highest."""

    num_experts: int
    experts_per_token: int = 2
    """Their outputs are added, weighted by the router's softmax over all experts, renormalised over the chosen."""
    capacity_factor: float | None = None
    """Each expert takes capacity_factor * tokens * experts_per_token / num_experts tokens of a row at most, first come
    first served; what is left out passes on the residual branch alone (Switch Transformer). None: nothing is left out,
    by computing all experts for all tokens, which costs num_experts / experts_per_token times the work."""
    load_balancing: float = 0.001
    """Factor on the loss that spreads tokens over experts (Fedus et al. 2021), which is 1 when they are spread."""


@configuration
class TaskHead:
    """What a model says of a whole text, or of each of its tokens, in the place of a head over the vocabulary."""

    kind: HeadKind
    """classification: one of `labels` for the text. token_classification: one for each token. regression: a number.
    embedding: a vector, trained so that texts that belong together are near each other."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of the head's outputs."""
    pooling: Pooling = "mean"
    """How the states of a text's tokens become one: the first token's, their mean, or the last token's. A decoder
    without bidirectional attention has read the whole text at the last token only."""
    transform: bool = False
    """A dense layer and tanh before the outputs: BERT's pooler."""
    dropout_rate: float = 0.0
    """Of what the outputs are made from."""
    normalize: bool = True
    """Embeddings are divided by their length, so that their products are cosines."""
    temperature: float = 0.05
    """Embeddings: their products are divided by it in the contrastive loss."""

    @property
    def outputs(self) -> int:
        """Numbers that come out of the head's last dense layer; 0: there is none, states are the embeddings."""
        return {"regression": 1, "embedding": 0}.get(self.kind, len(self.labels))


@configuration
class StackConfig:
    """A stack of transformer blocks of one structure. A decoder stack beside an encoder also has cross-attention."""

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
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """Pre-norm stacks end in a final norm; post-norm stacks normalise after each residual addition. Both: pre-norm, and
    each branch is normalised once more before it is added, as in Gemma 2."""
    norm_epsilon: float = 1e-6
    norm_scale_from_zero: bool = False
    """The norms multiply by 1 + scale, as in Gemma, so that scale starts at (and weight decay draws it to) 0."""
    first_layer_attention_norm: bool = True
    """False: the first layer's attention has no norm in front, as in ModernBERT, whose embeddings have just been
    normalised. That norm's parameters then have one row less."""
    qk_norm: bool = False
    """Normalise queries and keys over head_dim, before they are rotated."""
    use_bias: bool = False
    """Biases in the projections and in LayerNorm."""
    positions: Positions = "relative_bias"
    relative_bias_buckets: int = 32
    """With disentangled positions: buckets to each side; DeBERTa-v3 has 256, and a maximal distance of 512."""
    relative_bias_max_distance: int = 128
    relative_bias_bidirectional: bool = True
    """Half of the buckets for keys to the right. False only for stacks that never look right (a causal decoder)."""
    relative_bias_per_layer: bool = False
    """Each layer has a table of its own, as in umT5; otherwise all share one."""
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    """Of the global layers."""
    max_positions: int = 512
    """Rows of the table of learned positions; used by `positions="learned"` only."""
    token_types: int = 0
    """Rows of a table of kinds of tokens, added to the embeddings: BERT's segments A and B. The batch says which
    (`encoder_token_types`, `decoder_token_types`); without, all are of kind 0."""
    layer_pattern: tuple[LayerKind, ...] = ("global",)
    """Kinds of layers, repeated over the stack. Local layers see a window and may have a rotary base of their own."""
    window: tuple[int, int] | None = None
    """How many cells to the left and to the right a query of a local layer sees. In a causal decoder the right holds
    within a bidirectional prefix only. Cross-attention has no window."""
    local_rope_base: float | None = None
    """Rotary base of local layers; None: `rope_base`."""
    cross_attention: Literal["separate", "merged"] = "separate"
    """Of a decoder beside an encoder. Merged, as in T5Gemma 2: self-attention's own projections read the encoder's
    states too, and one softmax goes over both; those keys have no positions."""
    experts: Experts | None = None
    """A mixture of experts instead of one MLP; each expert is an MLP of width d_ff."""
    attention_softcap: float | None = None
    """Attention scores s become c tanh(s / c) with this c."""
    attention_scale: float | None = None
    """Factor on the attention scores; None means head_dim**-0.5. T5 uses 1.0 (it is folded into the initialiser)."""
    dropout_rate: float = 0.0
    dropout_broadcast_length: bool = False
    """Share one dropout mask over the length dimension, as T5 does: far fewer random numbers."""

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return tuple(self.layer_pattern[number % len(self.layer_pattern)] for number in range(self.num_layers))


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
    pad_id: int | None = 0
    """Id that stands for no token, where a batch does not say by segment ids which cells are none; None: no id does."""
    start_id: int = 0
    """Id that the inputs of a decoder begin with. Runs here are trained with 0; imported models bring theirs."""
    eos_ids: tuple[int, ...] = (1,)
    """Ids that end generated text."""
    tie_embeddings: bool = False
    """The head uses the token table (the decoder's, where there are two)."""
    separate_encoder_embeddings: bool = False
    """The encoder has a token table of its own, as in T5Gemma; the stacks may then differ in width."""
    scale_embeddings: bool = False
    """Multiply the embeddings by d_model**0.5, as Gemma does."""
    unscaled_token: int | None = None
    """Id of a token whose embedding is a parameter of its own and is not scaled: T5Gemma 2's end of an image."""
    scale_logits: bool = False
    """Multiply the head's input by d_model**-0.5, as T5 1.0 does with its tied table."""
    logits_softcap: float | None = None
    """Logits l become c tanh(l / c) with this c."""
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
    task_head: TaskHead | None = None
    """In the place of the head over the vocabulary: of an encoder, or of a decoder alone."""
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
        of_head = self.task_head is not None and self.task_head.dropout_rate > 0
        return self.generator is not None or of_head or any(stack.dropout_rate > 0 for stack in self.stacks.values())
