"""Architecture of a model. Every model family is a preset of these classes."""

from __future__ import annotations

from typing import Annotated, Literal, assert_never

import pydantic

from t5x_like.config.bounds import (
    ClosedUnitFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitFloatBelowOne,
)
from t5x_like.config.dataclass import config_dataclass
from t5x_like.config.remat import Remat

Architecture = Literal["encoder_decoder", "decoder", "encoder"]
Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
Norm = Literal["rmsnorm", "layernorm"]
NormPlacement = Literal["pre", "post", "both", "normformer", "sub"]
Positions = Literal["relative_bias", "rope", "learned", "disentangled", "none"]
LayerKind = Literal["global", "local"]
Dtype = Literal["float32", "bfloat16"]
Pooling = Literal["cls", "mean", "last"]
HeadKind = Literal["classification", "token_classification", "regression", "embedding"]

RotaryBase = Annotated[float, pydantic.Field(gt=1, allow_inf_nan=False)]


@config_dataclass
class RopeScalingConfig:
    """Scaling of the rotary frequencies, for rows longer than those of the original training."""

    kind: Literal["linear", "llama3", "yarn", "dynamic"]
    """linear: divide all frequencies by `factor` (Chen et al. 2023). llama3: divide only those whose wavelength is
    above original_max_positions / low_frequency_factor, keep those whose wavelength is below
    original_max_positions / high_frequency_factor, and interpolate between the two. yarn (Peng et al. 2023): the same
    with an interpolation that is linear in the index of the frequency, and cosines and sines are multiplied by
    `attention_factor`. dynamic: in rows longer than original_max_positions the base grows with the length of the row,
    so that the lowest frequency is divided by about factor * length / original_max_positions - (factor - 1)."""
    factor: PositiveFloat
    """Ratio of the new maximum length to that of the original training."""
    low_frequency_factor: PositiveFloat = 1.0
    """YaRN's beta_slow."""
    high_frequency_factor: float = 4.0
    """Must be above low_frequency_factor. YaRN's beta_fast, which its paper sets to 32."""
    original_max_positions: PositiveInt = 8192
    """Maximum length of a row in the original training."""
    attention_factor: PositiveFloat = 1.0
    """Factor of cosines and sines of YaRN, whose square is a factor of the scores. Its paper recommends
    0.1 ln(factor) + 1."""
    truncate: bool = True
    """Round the indices between which YaRN interpolates to whole numbers, as its own code does."""


@config_dataclass
class MoEConfig:
    """Mixture of experts in place of the MLP: a router sends each token to the experts that it scores highest."""

    num_experts: PositiveInt
    """Number of experts of each layer, without the shared ones."""
    experts_per_token: PositiveInt = 2
    """Number of experts that process each token. Their outputs are added, weighted by the router's scores."""
    layer_period: PositiveInt = 1
    """One of this many layers has experts, the second of each group, and the others have one MLP of width d_ff, as in
    Switch Transformers; 1: all layers have experts. Must divide the number of layers."""
    capacity: PositiveInt | None = None
    """Largest number of tokens of a text that an expert processes. The experts leave out later tokens that choose it,
    whose states pass the layer unchanged (Fedus et al. 2021). A decoding step counts its own tokens only. None: no
    token is left out, however many choose the same expert."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """Scores of the experts: the softmax of the router's logits, or the sigmoid of each logit (DeepSeek-V3)."""
    normalize_weights: bool = True
    """Divide the scores of a token's chosen experts by their sum, as Mixtral and DeepSeek-V3 do."""
    weight_scale: PositiveFloat = 1.0
    """Factor on the weights: DeepSeek-V3's `routed_scaling_factor`."""
    num_shared_experts: NonNegativeInt = 0
    """Number of further experts that all tokens take, computed as one MLP of their joint width."""
    bias_update_rate: NonNegativeFloat | None = None
    """Give each expert a bias that is added to its score when experts are chosen, and not to its weight. After each
    step the biases of experts with fewer tokens than the mean of their layer grow by this number, and the biases of
    experts with more tokens fall by it, so that the load is balanced without a loss (Wang et al. 2024; DeepSeek-V3 has
    0.001). Gradients and optimizers do not change biases, and adapters leave the biases of their base as they are.
    0: biases that stay as they are. None: no biases."""
    router_aux_loss_weight: ClosedUnitFloat = 0.001
    """Weight of the load-balancing loss (Fedus et al. 2021), which is experts_per_token for a uniform distribution of
    tokens over experts."""
    router_z_loss_weight: ClosedUnitFloat = 0.0
    """Weight of the mean of log(Z)**2 over tokens, with Z the normalizer of the softmax of the router's logits (Zoph et
    al. 2022): it keeps the logits small."""


def expert_layers(num_layers: int, period: int) -> tuple[int, ...]:
    """Return the numbers of the layers with experts: the second of each group of `period` layers."""
    return tuple(range(1 if period > 1 else 0, num_layers, period))


@config_dataclass
class TaskHeadConfig:
    """Head for a whole text, or for each of its tokens, in place of the language-model head."""

    kind: HeadKind
    """classification: one of `labels` for the text. token_classification: one of `labels` for each token. regression: a
    number. embedding: a vector, trained so that related texts have nearby vectors."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of the head's outputs."""
    pooling: Pooling = "mean"
    """Pooling of the tokens' hidden states: the first token's state, the mean, or the last token's state. In a decoder
    without bidirectional attention only the last token attends to the whole text."""
    transform: bool = False
    """Apply a dense layer and tanh before the output layer, as BERT's pooler does."""
    dropout_rate: UnitFloatBelowOne = 0.0
    """Dropout rate of the input of the output layer."""
    normalize: bool = True
    """Divide embeddings by their L2 norm, so that dot products are cosine similarities."""
    temperature: PositiveFloat = 0.05
    """Embeddings: divisor of the dot products in the contrastive loss."""
    matryoshka_dimensions: tuple[PositiveInt, ...] = ()
    """Embeddings: numbers of leading dimensions that are trained to be embeddings of their own, besides the whole
    vector (Kusupati et al. 2022). The contrastive loss of each prefix, normalized as the whole vector is, is added to
    that of the whole vector."""
    matryoshka_weights: tuple[PositiveFloat, ...] = ()
    """Factors of the losses of `matryoshka_dimensions`; empty: 1 for each. The loss of the whole vector has 1."""

    @property
    def outputs(self) -> int:
        """Width of the head's last dense layer; 0 if there is none, because the pooled states are the embeddings."""
        match self.kind:
            case "classification" | "token_classification":
                return len(self.labels)
            case "regression":
                return 1
            case "embedding":
                return 0
            case unknown:
                assert_never(unknown)

    @property
    def pools(self) -> bool:
        """True for one output per text, False for one output per token."""
        match self.kind:
            case "token_classification":
                return False
            case "classification" | "regression" | "embedding":
                return True
            case unknown:
                assert_never(unknown)


@config_dataclass
class StackConfig:
    """Stack of transformer blocks of one structure. A decoder stack beside an encoder also has cross-attention."""

    num_layers: PositiveInt
    """Number of transformer blocks."""
    d_model: PositiveInt
    """Width of the residual states."""
    num_heads: PositiveInt
    """Number of query heads of attention."""
    num_kv_heads: PositiveInt
    """Number of key and value heads: num_heads for multi-head attention, 1 for multi-query attention, a divisor of
    num_heads for grouped-query attention."""
    head_dim: PositiveInt
    """Width of each head; num_heads * head_dim may differ from d_model."""
    d_ff: PositiveInt
    """Width of the hidden layer of the MLP, or of each expert."""
    mlp_activation: Activation = "gelu_tanh"
    """Activation function of the MLP. gelu is the exact function, gelu_tanh its approximation by tanh."""
    mlp_gated: bool = True
    """Gated: activation(x wi_0) * (x wi_1); plain: activation(x wi)."""
    norm: Norm = "rmsnorm"
    """rmsnorm: divide by the root mean square (Zhang and Sennrich 2019). layernorm: subtract the mean as well."""
    norm_placement: NormPlacement = "pre"
    """pre: pre-norm, with a final norm after the last layer. post: normalize after each residual addition. both:
    pre-norm, and each branch is normalized once more before it is added, as in Gemma 2. normformer: pre-norm, and norms
    of the output of attention and of the hidden units of the MLP (Shleifer et al. 2021), as in LTG-BERT. sub: pre-norm,
    and norms before the output projections of attention and MLP (Wang et al. 2022), as in GPT-BERT."""
    norm_epsilon: PositiveFloat = 1e-6
    """Number that the norms add to the mean square, or to the variance, before the root."""
    norm_parameters: bool = True
    """False: norms have neither a scale nor a bias, as in LTG-BERT. Exceptions are the norm of the output of attention
    (normformer) and the norm of the states of relative positions."""
    norm_scale_plus_one: bool = False
    """Multiply by 1 + scale in the norms, as in Gemma, so that scale is initialized to 0 and weight decay pulls it to
    0."""
    first_layer_attention_norm: bool = True
    """False: the attention of the first layer has no pre-norm, as in ModernBERT, whose embeddings are already
    normalized. The stacked parameters of that norm then have one row less."""
    qk_norm: bool = False
    """Normalize queries and keys over head_dim, before the rotary embedding."""
    use_bias: bool = False
    """Add biases to the projections and to LayerNorm."""
    mlp_bias: bool | None = None
    """Add biases to the projections of the MLP; None: as `use_bias` says."""
    attention_gate: bool = False
    """Multiply the output of self-attention, before its projection, by the GELU of a projection of its input, as in
    GPT-BERT."""
    depth_weights: bool = False
    """After each branch, replace the states by a weighted sum of the embeddings and of the states after every branch so
    far; the weights are parameters (Pagliardini et al. 2024, DenseFormer; GPT-BERT). The layers are then unrolled,
    whatever `scan_layers` says."""
    qkv_bias: bool = False
    """Add biases to the query, key and value projections of a stack without `use_bias`, as Qwen 2 does."""
    positions: Positions = "relative_bias"
    """Source of position information. relative_bias: T5's bias on the attention scores. rope: rotary embedding of
    queries and keys (Su et al. 2021). learned: a table that is added to the token embeddings. disentangled: DeBERTa's
    products of contents with relative positions. none: only the mask of a causal decoder tells the order."""
    relative_bias_buckets: int = 32
    """Number of buckets. With disentangled positions: buckets on each side; DeBERTa-v3 has 256, with a maximum distance
    of 512."""
    relative_bias_max_distance: int = 128
    """Distance in tokens from which on all keys share the last bucket."""
    relative_bias_bidirectional: bool = True
    """Use half of the buckets for keys to the right. False only for stacks that never attend to the right (a causal
    decoder)."""
    relative_bias_per_layer: bool = False
    """Give each layer its own table, as in umT5; otherwise all layers share one."""
    rope_base: RotaryBase = 10_000.0
    """Rotary base: the wavelengths of the dimensions grow geometrically from 2 pi to nearly 2 pi times this number."""
    rope_scaling: RopeScalingConfig | None = None
    """Scaling of the rotary frequencies of global layers."""
    max_positions: PositiveInt = 512
    """Number of learned positions; used with `positions="learned"` only."""
    position_offset: NonNegativeInt = 0
    """Rows of the table of learned positions before that of the first position: 2 in RoBERTa and BART, whose rows begin
    at their padding id plus one."""
    num_token_types: NonNegativeInt = 0
    """Rows of a table of token types that is added to the embeddings: BERT's segments A and B. The batch states the
    types (`encoder_token_types`, `decoder_token_types`); without these features all tokens have type 0."""
    layer_pattern: Annotated[tuple[LayerKind, ...], pydantic.Field(min_length=1)] = ("global",)
    """Kinds of layers, repeated over the stack. Local layers attend within a window and may have their own rotary
    base."""
    sliding_window: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """Number of positions to the left and to the right that a query of a local layer attends to. In a causal decoder
    the right side applies within a bidirectional prefix only. Cross-attention has no window."""
    global_block_size: PositiveInt | None = None
    """LongT5's transient global tokens (Guo et al. 2022): each layer adds up the states of every block of this many
    tokens of a text and normalizes the sum, and all tokens attend to these sums beside their window. Tokens after the
    last whole block belong to it. The sums have a table of relative bias of their own, whose distances are counted in
    blocks. None: no such tokens."""
    local_rope_base: RotaryBase | None = None
    """Rotary base of local layers; None: `rope_base`."""
    local_rope_scaling: RopeScalingConfig | None = None
    """Scaling of the rotary frequencies of local layers."""
    cross_attention: Literal["separate", "merged"] = "separate"
    """Cross-attention of a decoder beside an encoder. merged, as in T5Gemma 2: the projections of self-attention are
    also applied to the encoder's states, and one softmax covers both; the encoder's keys have no positions."""
    experts: MoEConfig | None = None
    """Mixture of experts instead of one MLP; each expert is an MLP of width d_ff."""
    attention_softcap: PositiveFloat | None = None
    """Replace the attention scores s by c tanh(s / c), with this value as c."""
    attention_scale: PositiveFloat | None = None
    """Factor on the attention scores; None means head_dim**-0.5. T5 uses 1.0 (the factor is folded into the
    initializer)."""
    output_init_scale: NonNegativeFloat = 1.0
    """Factor on the initial values of the kernels that write to the residual states: `out` of attention and `wo` of
    MLPs and experts. GPT-2 has (2 num_layers)**-0.5; 0: each block begins as the identity."""
    quantization: Literal["int8", "float8"] | None = None
    """Round the operands of the products of attention projections and MLPs to 8 bits, in training and wherever the
    model is used, by qwix (extra `quantization`): each token and each output of a kernel has a scale. The gradients of
    kernels are computed from unrounded operands. int8: integers. float8: e4m3, and e5m2 for gradients. Heads,
    embeddings, norms and attention scores are not rounded, and parameters are kept as they are. None: no rounding."""
    dropout_rate: UnitFloatBelowOne = 0.0
    """Dropout rate of embeddings, attention probabilities, hidden units of the MLP, and outputs of branches and
    stack."""
    dropout_broadcast_length: bool = False
    """Share one dropout mask over the length dimension, as T5 does, which needs far fewer random numbers."""

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kind of each layer."""
        return tuple(self.layer_pattern[number % len(self.layer_pattern)] for number in range(self.num_layers))

    def num_blocks(self, length: int) -> int:
        """Return the number of blocks of `global_block_size` in a row; 0 without such blocks."""
        return 0 if self.global_block_size is None else length // self.global_block_size

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with experts."""
        return () if self.experts is None else expert_layers(self.num_layers, self.experts.layer_period)


@config_dataclass
class ModelConfig:
    """One or two stacks between a token embedding table and a language-model head.

    encoder and decoder: an encoder-decoder. decoder alone: a causal or prefix language model (the attention mask of the
    batch decides which). encoder alone: a masked language model.
    """

    encoder: StackConfig | None
    """Encoder; None: the model is a decoder alone."""
    decoder: StackConfig | None
    """Decoder; None: the model is an encoder alone."""
    vocab_size: PositiveInt
    """Number of token ids that the model has logits for: at least those of the tokenizer."""
    pad_vocab_to_multiple_of: PositiveInt = 1
    """Add rows of zeros to the token tables and to the output projection until their number is a multiple of this one:
    of the tensor degree, which must divide it, or of 128 for fast products on accelerators. These rows stay zero, have
    no logits and are no part of an exported model, so that the model computes the same with and without them. Only
    Adafactor and AdamW with `rms_scaled` differ slightly: they divide mean squares by the number of all rows."""
    pad_token_id: int | None = 0
    """Padding id, used when the batch has no segment ids. None: the model has no padding id."""
    decoder_start_token_id: int = 0
    """Id that decoder inputs begin with. Models trained here use 0; imported models have their own."""
    eos_ids: tuple[int, ...] = (1,)
    """Ids that end generated text."""
    tie_embeddings: bool = False
    """Use the token embedding table (the decoder's, if there are two) as the head's output projection."""
    separate_encoder_embeddings: bool = False
    """Give the encoder its own token embedding table, as in T5Gemma; the stacks may then differ in width."""
    scale_embeddings: bool = False
    """Multiply the embeddings by d_model**0.5, as Gemma does."""
    unscaled_embedding_token_id: int | None = None
    """Id of a token whose embedding is a separate parameter that is not scaled: T5Gemma 2's end-of-image token."""
    scale_logits: bool = False
    """Multiply the head's input by d_model**-0.5, as T5 1.0 does with its tied table."""
    logits_softcap: PositiveFloat | None = None
    """Replace the logits l by c tanh(l / c), with this value as c."""
    embedding_stddev: PositiveFloat = 1.0
    """Standard deviation of the initial token embedding table."""
    head_init_scale: NonNegativeFloat = 1.0
    """Factor on the initial values of an untied output projection, whose standard deviation is width**-0.5."""
    embedding_dim: PositiveInt | None = None
    """Width of the token embedding table, of learned positions and of the embedding norm, if it is not d_model: each
    stack then begins with a projection."""
    embedding_norm: bool = False
    """Normalize the embeddings (after positions are added), as BERT does."""
    lm_head_transform: bool = False
    """BERT's masked-LM head: dense layer, activation and norm before the output projection. The dense layer projects to
    the width of the token embedding table."""
    lm_head_activation: Activation | None = None
    """Activation function of `lm_head_transform`; None: that of the MLP."""
    head_bias: bool = False
    """Add a bias to the logits of the language-model head."""
    task_head: TaskHeadConfig | None = None
    """Head in place of the language-model head, for an encoder alone or a decoder alone."""
    generator: StackConfig | None = None
    """ELECTRA (Clark et al. 2020): a smaller encoder, a quarter to half as wide, that is trained to fill in the masked
    tokens. The model's encoder then reads the text with samples of the generator in their place and predicts for each
    token if it was replaced. The language-model head belongs to the generator; token embeddings and learned positions
    are shared. After training the encoder is the model."""
    discriminator_loss_weight: PositiveFloat = 50.0
    """Weight of the discriminator's cross-entropy, averaged over all tokens. The generator's loss, averaged over the
    masked tokens, has weight 1."""
    dtype: Dtype = "float32"
    """Type of activations and matrix products. That of the parameters is `training.parameter_type`."""
    attention: str = "auto"
    """Name of an attention backend: reference, xla, cudnn (NVIDIA), blockwise, flash and splash (TPU), flash_gpu, or
    one of a plug-in. auto chooses by platform, length and features from the table of `kernels.auto_attention`. The name
    is checked when the model is built."""
    scan_layers: bool = True
    """Run the stacked layers by `lax.scan`. False unrolls them, for debugging; the parameters are the same."""
    remat: Remat = "none"
    """Rematerialization policy of the layers. "none" saves all activations. "dots" saves the results of products with
    parameters, except those of routed experts, and recomputes the others in the backward pass. "mlp", "attention",
    "qkv" and "outputs" save some of these results (`config.remat`). "full" saves the inputs of the layers only, and
    "offload" keeps these in the memory of the host."""

    @property
    def architecture(self) -> Architecture:
        if self.encoder is not None and self.decoder is not None:
            return "encoder_decoder"
        return "decoder" if self.encoder is None else "encoder"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token tables: `vocab_size`, and the rows of zeros of `pad_vocab_to_multiple_of`."""
        return -(-self.vocab_size // self.pad_vocab_to_multiple_of) * self.pad_vocab_to_multiple_of

    @property
    def vocab_padding_rows(self) -> int:
        """Rows of zeros among the `padded_vocab_size` rows."""
        return self.padded_vocab_size - self.vocab_size

    @property
    def stacks(self) -> dict[str, StackConfig]:
        """Stacks of the model by name, encoder first."""
        named = {"encoder": self.encoder, "decoder": self.decoder}
        return {name: stack for name, stack in named.items() if stack is not None}

    @property
    def lm_head_width(self) -> int:
        """Input width of the head's output projection."""
        return self.embedding_dim or next(reversed(self.stacks.values())).d_model

    @property
    def uses_rng(self) -> bool:
        """True if training draws random numbers inside the model: dropout, or a generator's samples."""
        of_head = self.task_head is not None and self.task_head.dropout_rate > 0
        return self.generator is not None or of_head or any(stack.dropout_rate > 0 for stack in self.stacks.values())
