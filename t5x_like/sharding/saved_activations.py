"""Activation model: the arrays that a training step saves for its backward pass, by formula.

The arrays that JAX saves follow from the code of the layers and from `remat`. This module states them by kind of array,
so that they can be counted for any model without tracing it; tests compare the formulas with the residuals of an
abstract trace. Three users share them: the memory estimate, the choice of a mesh, and the check that no mesh axis
splits an activation twice.

Per layer and sub-batch, in units of B x L token positions (rows x length; for the keys and values of cross-attention,
B x S with the source length S):

  remat   saved by a pre-norm layer                                            numbers per token position
  full    its input                                                            d
  offload nothing: its input is in host memory
  outputs its input, the output of attention                                   2 d
  qkv     its input, queries, keys, values                                     d + (H + 2 G) h
  attention its input; what outputs and qkv save                               2 d + (H + 2 G) h
  mlp     its input, both inner products of a gated MLP                        d + 2 f
  dots    its input; results of the products with parameters: what             2 d + (H + 2 G) h + 2 f
          attention and mlp save
  none    inputs and results of each operation: two branch inputs and their    4 d + (2 H + 2 G) h + 3 f
          normalized form, queries, keys, values, mixed values, both inner
          products and their elementwise product

with d = d_model, f = d_ff, h = head_dim, H = num_heads, G = num_kv_heads. Cross-attention of a decoder adds its own
arrays: 2 d + 2 H h with none, d with outputs, H h with qkv, and with none and qkv 2 G h per source position. Gates of
attention add 3 H h with none and H h with qkv. An MLP without a gate has one f less. Norms after a branch save their
inputs. Dropout that is not shared over the length saves its masks, one byte per number. Attention by "reference" never
saves scores, because it recomputes them; "xla" saves them unless the layer is recomputed. The carry of the scan over
layers is the input of each layer, which is counted above.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import assert_never

from t5x_like.config.batch_spec import REJECTED, ArraySpec, texts_of
from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.config.remat import Remat, kept_products
from t5x_like.kernels.attention import get_backend
from t5x_like.kernels.attention_backend import AttentionBackend
from t5x_like.kernels.auto_attention import choose
from t5x_like.kernels.expert_dispatch import SLACK
from t5x_like.sharding.attention_choice import attention_request
from t5x_like.sharding.rules import LogicalAxes

_FLOAT32 = 4
_BOOL = 1


@dataclasses.dataclass(frozen=True)
class SavedArray:
    """Arrays of one kind that are in memory at the same time.

    Attributes:
      name: Description of the kind.
      axes: Logical axis of each dimension, for the activation table.
      shape: Shape of one array, over all devices.
      itemsize: Bytes of an element.
      count: Number of arrays; a fraction if only a part of an array is saved.
    """

    name: str
    axes: LogicalAxes
    shape: tuple[int, ...]
    itemsize: int
    count: float = 1

    @property
    def nbytes(self) -> float:
        """Bytes over all devices."""
        return math.prod(self.shape) * self.itemsize * self.count

    def times(self, count: float) -> SavedArray:
        return dataclasses.replace(self, count=self.count * count)


@dataclasses.dataclass(frozen=True)
class StackInput:
    """Shape of the token positions that a stack computes on.

    Attributes:
      rows: Rows of the sub-batch.
      length: Length of the stack's own sequence.
      source_length: Length of the encoder's sequence, for a decoder beside an encoder; else 0.
      mask_per_row: Whether the attention mask differs between rows (padding, segments, a bidirectional prefix).
      platform: Platform of the devices, which decides on the backend of attention; None: not known.
    """

    rows: int
    length: int
    source_length: int
    mask_per_row: bool
    platform: str | None = None


def itemsize(config: ModelConfig) -> int:
    """Return the bytes of an activation element."""
    return {"float32": 4, "bfloat16": 2}[config.dtype]


def accumulation_part(features: Mapping[str, ArraySpec], parts: int) -> dict[str, ArraySpec]:
    """Return the features of a sub-batch in one of `parts` gradient accumulation steps.

    The further texts of a contrastive row, and the rejected answer of a preference pair, go through the model as
    additional rows.
    """
    texts = texts_of(features)
    rows = {name: texts + (f"{REJECTED}{name}" in features) for name in features}
    return {
        name: ArraySpec((array.shape[0] * rows[name] // parts, *array.shape[1:]), array.dtype)
        for name, array in features.items()
    }


def stack_inputs(
    config: ModelConfig, features: Mapping[str, ArraySpec], platform: str | None = None
) -> dict[str, StackInput]:
    """Return the input shape of each stack for a sub-batch, encoder first."""
    inputs = {}
    source_length = 0
    for name in config.stacks:
        rows, length = features[f"{name}_input_tokens"].shape
        # An encoder masks its padding, which differs by row; a causal mask alone is the same for all rows.
        per_row = name == "encoder" or "decoder_causal_attention" in features or "decoder_segment_ids" in features
        inputs[name] = StackInput(rows, length, source_length, per_row, platform)
        source_length = length
    return inputs


def saved_activations(
    config: ModelConfig, features: Mapping[str, ArraySpec], platform: str | None = None
) -> dict[str, list[SavedArray]]:
    """Return the arrays saved for the backward pass of a sub-batch, by stack. The logits are not among them."""
    saved = {}
    for name, stack, inputs in _stacks(config, features, platform):
        layers = [array.times(stack.num_layers) for array in layer_activations(config, stack, inputs, config.remat)]
        saved[name] = [*layers, *_outside_layers(config, stack, inputs)]
    return saved


def offloaded_activations(config: ModelConfig, features: Mapping[str, ArraySpec]) -> list[SavedArray]:
    """Return the arrays of a sub-batch that are kept in host memory for the backward pass: with the remat policy
    "offload" the inputs of all layers."""
    if config.remat != "offload":
        return []
    return [
        array.times(stack.num_layers)
        for _, stack, inputs in _stacks(config, features)
        for array in layer_activations(config, stack, inputs, "full")
    ]


def activation_kinds(config: ModelConfig, features: Mapping[str, ArraySpec]) -> dict[str, list[SavedArray]]:
    """Return one array of each kind that a sub-batch computes, by stack, whatever `remat` saves of them.

    "head" holds the logits.
    """
    policies: tuple[Remat, ...] = ("full", "none")
    kinds = {
        name: [array for remat in policies for array in layer_activations(config, stack, inputs, remat)]
        + list(_outside_layers(config, stack, inputs))
        for name, stack, inputs in _stacks(config, features)
    }
    if config.stacks and config.task_head is None:
        kinds["head"] = [logits(config, features, _FLOAT32)]
    return kinds


def _stacks(
    config: ModelConfig, features: Mapping[str, ArraySpec], platform: str | None = None
) -> Iterator[tuple[str, StackConfig, StackInput]]:
    inputs = stack_inputs(config, features, platform)
    for name, stack in config.stacks.items():
        yield name, stack, inputs[name]
    if config.generator is not None:
        # The generator reads the same token positions as the encoder.
        yield "generator", config.generator, inputs["encoder"]


def layer_activations(config: ModelConfig, stack: StackConfig, inputs: StackInput, remat: Remat) -> list[SavedArray]:
    """Return the arrays that one layer saves under a remat policy.

    For "none" these are also the arrays that a backward pass recomputes under the other policies.
    """
    size = itemsize(config)
    states = _saved(inputs, "states", ("embed", stack.d_model), size)
    between = dataclasses.replace(states, axes=("batch", "residual_length", "embed"))
    cross = inputs.source_length > 0 and stack.cross_attention == "separate"
    branches = 3 if cross else 2
    match remat:
        case "full":
            # The input of a layer is saved between blocks, where the length is split over "tensor" too.
            return [between]
        case "offload":
            return []
        case "dots" | "mlp" | "attention" | "qkv" | "outputs":
            kept = kept_products(remat)
            arrays = [between]
            if "outputs" in kept:
                # If norms follow the residual sum, the result of each branch is saved for them as well.
                last = 1 if stack.norm_placement in ("post", "both") else 0
                # "dots" keeps them before the sum over "tensor" splits them.
                arrays.append((states if remat == "dots" else between).times(branches - 1 + last))
            if "qkv" in kept:
                arrays += _attention(stack, inputs, size, cross, elementwise=False)
            if "mlp" in kept:
                products = _mlp(stack, inputs, size, elementwise=False)
                # The product of a router has no name: only "dots" keeps it.
                arrays += (array for array in products if remat == "dots" or array.name != "routing")
            return arrays
        case "none":
            # Norms on the branch input are counted with it; only a second norm after the branch saves one more array.
            norms = {"pre": 0, "post": 0, "both": 1, "normformer": 1, "sub": 1}[stack.norm_placement]
            arrays = [
                states.times((2 + norms) * branches),
                *_attention(stack, inputs, size, cross, elementwise=True),
                *_mlp(stack, inputs, size, elementwise=True),
            ]
        case _:
            assert_never(remat)
    if stack.dropout_rate > 0:
        arrays += _dropout(config, stack, inputs, branches)
    arrays += _scores(config, stack, inputs, saved=True)
    if stack.positions == "disentangled":
        shape = (inputs.rows, stack.num_heads, inputs.length, inputs.length)
        arrays.append(SavedArray("distance biases", ("batch", "heads", "length", None), shape, _FLOAT32))
    return arrays


def _saved(inputs: StackInput, name: str, last: tuple[str, int], size: int, length: int | None = None) -> SavedArray:
    shape = (inputs.rows, inputs.length if length is None else length, last[1])
    return SavedArray(name, ("batch", "length", last[0]), shape, size)


def _heads(inputs: StackInput, name: str, axis: str, heads: int, head_dim: int, size: int, length: int) -> SavedArray:
    axes = ("batch", "length", axis, "head_dim")
    return SavedArray(name, axes, (inputs.rows, length, heads, head_dim), size)


def _attention(
    stack: StackConfig, inputs: StackInput, size: int, cross: bool, *, elementwise: bool
) -> Iterator[SavedArray]:
    """Yield the arrays of attention: results of products and, if `elementwise`, what is computed from them."""

    def queries(count: int) -> SavedArray:
        return _heads(inputs, "queries", "heads", stack.num_heads, stack.head_dim, size, inputs.length).times(count)

    def keys_values(count: int, length: int) -> SavedArray:
        return _heads(inputs, "keys and values", "kv_heads", stack.num_kv_heads, stack.head_dim, size, length).times(
            count
        )

    # Merged attention has the keys and values of the source beside those of the decoder's own sequence.
    merged = inputs.source_length if stack.cross_attention == "merged" else stack.num_blocks(inputs.length)
    before_norm = 1 if stack.qk_norm and elementwise else 0
    # The mixed values, which have the shape of the queries, are saved with the elementwise results.
    # A gate, its activation, and the gated output.
    gates = stack.attention_gate * (3 if elementwise else 1)
    yield queries((2 if elementwise else 1) + before_norm + gates)
    yield keys_values(2 + before_norm, inputs.length + merged)
    if cross:
        yield queries((2 if elementwise else 1) + before_norm)
        yield keys_values(2 + before_norm, inputs.source_length)


def _mlp(stack: StackConfig, inputs: StackInput, size: int, *, elementwise: bool) -> Iterator[SavedArray]:
    """Yield the arrays of the MLP: results of products and, if `elementwise`, what is computed from them."""
    # Products with wi_0 and wi_1, or with wi alone.
    inner = 2 if stack.mlp_gated else 1
    mlp = _saved(inputs, "MLP", ("mlp", stack.d_ff), size).times(inner + elementwise)
    if stack.experts is None:
        yield mlp
        return
    # A layer saves the arrays of one or the other; the counts are the means over the layers.
    experts, share = stack.experts, len(stack.expert_layers) / stack.num_layers
    # The size of buffers if experts are split over devices; whether they are is not known here.
    choices = math.ceil(SLACK * inputs.length * experts.experts_per_token)
    # A remat policy that keeps products does not keep those of experts.
    if elementwise:
        shape = (inputs.rows, choices, stack.d_ff)
        # Elementwise results between the products are saved one by one: experts are not `recomputed` as an MLP is.
        yield SavedArray("experts", ("batch", "length", "mlp"), shape, size).times(share * (2 + 2 * inner))
        shape = (inputs.rows, choices, stack.d_model)
        yield SavedArray("tokens at experts", ("batch", "length", "embed"), shape, size).times(2 * share)
    shape = (inputs.rows, inputs.length, experts.num_experts)
    yield SavedArray("routing", ("batch", "length", None), shape, _FLOAT32).times(share)
    if experts.num_shared_experts:
        width = experts.num_shared_experts * stack.d_ff
        yield _saved(inputs, "MLP", ("mlp", width), size).times(share * (inner + elementwise))
    if share < 1:
        yield mlp.times(1 - share)


def _dropout(config: ModelConfig, stack: StackConfig, inputs: StackInput, branches: int) -> Iterator[SavedArray]:
    """Yield the dropout masks; those that are shared over the length are too small to count."""
    if stack.dropout_broadcast_length:
        if stack.num_heads == stack.num_kv_heads:
            length = inputs.length + inputs.source_length
            yield _heads(inputs, "dropped values", "kv_heads", stack.num_kv_heads, stack.head_dim, _BOOL, length)
        return
    yield _saved(inputs, "dropout", ("embed", stack.d_model), _BOOL).times(branches)
    yield _saved(inputs, "dropout", ("mlp", stack.d_ff), _BOOL)
    # A backend that works block by block draws the mask of the probabilities again.
    axes = ("batch", "heads", "length", None)
    for width, backend in _attentions(config, stack, inputs):
        if backend.materializes_scores:
            yield SavedArray("dropout", axes, (inputs.rows, stack.num_heads, inputs.length, width), _BOOL)


def _attentions(config: ModelConfig, stack: StackConfig, inputs: StackInput) -> Iterator[tuple[int, AttentionBackend]]:
    """Yield the number of keys and the backend of each attention of a layer."""
    blocks = stack.num_blocks(inputs.length)
    is_merged = blocks > 0 or (stack.cross_attention == "merged" and inputs.source_length > 0)
    for is_cross in (False, True) if inputs.source_length and not is_merged else (False,):
        request = attention_request(
            stack,
            config.dtype,
            q_length=inputs.length,
            source_length=blocks or inputs.source_length,
            is_cross=is_cross,
            is_merged=is_merged,
        )
        yield request.kv_length, get_backend(choose(config.attention, inputs.platform, request).backend)


def _scores(config: ModelConfig, stack: StackConfig, inputs: StackInput, *, saved: bool) -> list[SavedArray]:
    """Return the scores in float32 with the probabilities in the model's type of each attention that materializes them;
    if `saved`, of each one that keeps them for the backward pass."""
    axes = ("batch", "heads", "length", None)
    shape, size = (inputs.rows, stack.num_heads, inputs.length), _FLOAT32 + itemsize(config)
    return [
        SavedArray("attention scores", axes, (*shape, width), size)
        for width, backend in _attentions(config, stack, inputs)
        if backend.materializes_scores and not (saved and backend.recomputes_scores)
    ]


def attention_scores(config: ModelConfig, stack: StackConfig, inputs: StackInput) -> list[SavedArray]:
    """Return the scores of each attention of a layer whose backend materializes them.

    They are scores in float32 together with probabilities in the model's type.
    """
    return _scores(config, stack, inputs, saved=False)


def mlp_cotangents(config: ModelConfig, stack: StackConfig, inputs: StackInput) -> list[SavedArray]:
    """Return the cotangents of the inner arrays of a layer's MLP, the widest that its backward pass makes."""
    inner = list(_mlp(stack, inputs, itemsize(config), elementwise=True))
    # The count is replaced and not multiplied: three cotangents exist at once, whatever number of arrays is saved.
    return [inner[0].times(3 / inner[0].count)]


def logits(config: ModelConfig, features: Mapping[str, ArraySpec], size: int) -> SavedArray:
    """Return the logits of a sub-batch, with `size` bytes per number."""
    stack = "encoder" if config.decoder is None else "decoder"
    rows, length = features[f"{stack}_input_tokens"].shape
    return SavedArray("logits", ("batch", "length", "vocab"), (rows, length, config.padded_vocab_size), size)


def _outside_layers(config: ModelConfig, stack: StackConfig, inputs: StackInput) -> Iterator[SavedArray]:
    """Yield the arrays that a stack saves once: around the layers, and those that all layers share."""
    size = itemsize(config)
    # States before and after the layers, around a norm of the embeddings, and inside BERT's head.
    around = 2
    if config.embedding_norm:
        around += 2
    elif stack.positions in ("learned", "disentangled"):
        around += 1
    if config.lm_head_transform and stack is (config.generator or next(reversed(config.stacks.values()))):
        around += 3
    yield _saved(inputs, "states around the layers", ("embed", stack.d_model), size).times(around)
    width, backend = next(_attentions(config, stack, inputs))
    if not backend.materializes_scores:
        # Backends that work block by block make masks and biases of one block at a time.
        return
    if stack.positions == "relative_bias" and not stack.relative_bias_per_layer:
        # The bias depends on distances only, so it has no dimension for rows.
        shape = (1, stack.num_heads, inputs.length, inputs.length)
        yield SavedArray("relative bias", (None, "heads", "length", None), shape, _FLOAT32)
    rows = inputs.rows if inputs.mask_per_row else 1
    kinds = len(set(stack.layer_kinds))
    axes = ("batch" if rows > 1 else None, None, "length", None)
    yield SavedArray("masks", axes, (rows, 1, inputs.length, width), _BOOL, kinds)
