"""Which activations a training step keeps for its backward pass, as a formula.

What JAX saves follows from the code of the layers and from `remat`; here it is written down by kind of array, so that
it can be counted for any model without tracing one. Tests hold it against the residuals of an abstract trace.

Per layer and sub-batch, in units of B x L cells (rows x length, for cross-attention's keys and values B x S):

  remat   kept of a pre-norm layer                                             numbers per cell
  full    its input                                                            d
  dots    its input; results of the products with parameters: attention's      2 d + (H + 2 G) h + 2 f
          output, queries, keys, values, both inner ones of a gated MLP
  none    inputs and results of each: two inputs of branches and their         4 d + (2 H + 2 G) h + 3 f
          normalised form, queries, keys, values, mixed values, inner ones
          and their product

A decoder's cross-attention adds its own: with none 2 d + 2 H h, with dots d + H h, and with both 2 G h per cell of the
source. An MLP without a gate has one f less. Norms behind a branch keep their inputs. Dropout that is not shared over
the length keeps its masks, one byte a number. Attention by "reference" never keeps scores: it computes them again;
"xla" keeps them unless the layer is computed again. The carry of the scan over layers is each layer's input, counted
above.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from t5x_like.config.batch import ArraySpec
from t5x_like.config.model import ModelConfig, StackConfig

Axes = tuple[str | None, ...]

_FLOAT32 = 4
_BOOL = 1


@dataclasses.dataclass(frozen=True)
class Held:
    """Arrays of one kind that are in memory together.

    Attributes:
      name: What they are.
      axes: Logical axis of each dimension, for the table of activations.
      shape: Of one array, over all devices.
      itemsize: Bytes of a number.
      count: How many; a fraction where only part of them is.
    """

    name: str
    axes: Axes
    shape: tuple[int, ...]
    itemsize: int
    count: float = 1

    @property
    def nbytes(self) -> float:
        """Over all devices."""
        return math.prod(self.shape) * self.itemsize * self.count

    def times(self, count: float) -> Held:
        return dataclasses.replace(self, count=self.count * count)


@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells that a stack computes on.

    Attributes:
      rows, length: Of its own stream.
      source: Length of the encoder's stream beside a decoder, else 0.
      masked_by_row: Whether the mask differs from row to row (padding, segments, a bidirectional prefix).
    """

    rows: int
    length: int
    source: int
    masked_by_row: bool


def itemsize(config: ModelConfig) -> int:
    return {"float32": 4, "bfloat16": 2}[config.dtype]


def cells_of(config: ModelConfig, features: Mapping[str, ArraySpec]) -> dict[str, Cells]:
    """By stack, encoder first, of a sub-batch."""
    found = {}
    source = 0
    for name in config.stacks:
        rows, length = features[f"{name}_input_tokens"].shape
        by_row = name == "encoder" or "decoder_causal_attention" in features or "decoder_segment_ids" in features
        found[name] = Cells(rows, length, source, by_row)
        source = length
    return found


def saved(config: ModelConfig, features: Mapping[str, ArraySpec]) -> dict[str, list[Held]]:
    """What the backward pass of a sub-batch finds kept, by stack; without the logits."""
    found = {}
    for name, cells in cells_of(config, features).items():
        stack = config.stacks[name]
        layers = [held.times(stack.num_layers) for held in layer(config, stack, cells, config.remat)]
        found[name] = [*layers, *_of_stack(config, stack, cells)]
    if config.generator is not None:
        # It reads the same cells as the encoder.
        cells = cells_of(config, features)["encoder"]
        layers = layer(config, config.generator, cells, config.remat)
        found["generator"] = [
            *(held.times(config.generator.num_layers) for held in layers),
            *_of_stack(config, config.generator, cells),
        ]
    return found


def layer(config: ModelConfig, stack: StackConfig, cells: Cells, remat: str) -> list[Held]:
    """What one layer keeps under a remat policy. With "none" that is also what a backward pass computes again."""
    size = itemsize(config)
    states = _kept(cells, "states", ("embed", stack.d_model), size)
    if remat == "full":
        return [dataclasses.replace(states, axes=("batch", "residual_length", "embed"))]
    cross = cells.source > 0 and stack.cross_attention == "separate"
    norms = {"pre": 0, "post": 0, "both": 1}[stack.norm_placement]
    branches = 3 if cross else 2
    # Of a stack whose norms come after the sum, the branch's result is kept for them, too.
    last = 0 if stack.norm_placement == "pre" else 1
    if remat == "dots":
        return [
            states.times(branches + last),
            *_attention(stack, cells, size, cross, remat),
            *_mlp(stack, cells, size, remat),
        ]
    found = [
        states.times((2 + norms) * branches),
        *_attention(stack, cells, size, cross, remat),
        *_mlp(stack, cells, size, remat),
    ]
    if stack.dropout_rate > 0:
        found += _dropout(stack, cells, branches)
    if config.attention == "xla":
        found += scores(config, stack, cells)
    if stack.positions == "disentangled":
        heads = (cells.rows, stack.num_heads, cells.length, cells.length)
        found.append(Held("biases of distances", ("batch", "heads", "length", None), heads, _FLOAT32))
    return found


def _kept(cells: Cells, name: str, last: tuple[str, int], size: int, length: int | None = None) -> Held:
    shape = (cells.rows, cells.length if length is None else length, last[1])
    return Held(name, ("batch", "length", last[0]), shape, size)


def _heads(cells: Cells, name: str, axis: str, heads: int, head_dim: int, size: int, length: int) -> Held:
    axes = ("batch", "length", axis, "head_dim")
    return Held(name, axes, (cells.rows, length, heads, head_dim), size)


def _attention(stack: StackConfig, cells: Cells, size: int, cross: bool, remat: str) -> Iterator[Held]:
    def queries(count: int) -> Held:
        return _heads(cells, "queries", "heads", stack.num_heads, stack.head_dim, size, cells.length).times(count)

    def keys_values(count: int, length: int) -> Held:
        return _heads(cells, "keys and values", "kv_heads", stack.num_kv_heads, stack.head_dim, size, length).times(
            count
        )

    merged = cells.source if stack.cross_attention == "merged" else 0
    before_norm = 1 if stack.qk_norm and remat == "none" else 0
    # With "none", the mixed values as well.
    yield queries((1 if remat == "dots" else 2) + before_norm)
    yield keys_values(2 + before_norm, cells.length + merged)
    if cross:
        yield queries((1 if remat == "dots" else 2) + before_norm)
        yield keys_values(2 + before_norm, cells.source)


def _mlp(stack: StackConfig, cells: Cells, size: int, remat: str) -> Iterator[Held]:
    inner = 2 if stack.mlp_gated else 1
    if stack.experts is None:
        yield _kept(cells, "MLP", ("mlp", stack.d_ff), size).times(inner + (remat == "none"))
        return
    experts = stack.experts
    count = experts.num_experts
    router = Held("routing", ("batch", "length", None), (cells.rows, cells.length, count), _FLOAT32)
    if experts.capacity_factor is None:
        axes: Axes = ("expert_batch", "length", "experts", "mlp")
        hidden = Held("experts", axes, (cells.rows, cells.length, count, stack.d_ff), size)
        # Elementwise results between the products are kept one by one: experts are not `recomputed` as an MLP is.
        yield hidden.times(2 if remat == "dots" else 7)
        yield router
        return
    slots = experts.capacity_factor * cells.length * experts.experts_per_token / count
    room = min(cells.length, math.ceil(slots))
    axes = ("expert_batch", "experts", "capacity", "mlp")
    yield Held("experts", axes, (cells.rows, count, room, stack.d_ff), size).times(2 if remat == "dots" else 6)
    yield Held("tokens at experts", (*axes[:3], "embed"), (cells.rows, count, room, stack.d_model), size)
    places = Held("places", ("batch", "length", None, None), (cells.rows, cells.length, count, room), size)
    yield places.times(2 if remat == "dots" else 4)
    yield router


def _dropout(stack: StackConfig, cells: Cells, branches: int) -> Iterator[Held]:
    """Masks; those that are shared over the length are too small to count."""
    if stack.dropout_broadcast_length:
        if stack.num_heads == stack.num_kv_heads:
            length = cells.length + cells.source
            dropped = _heads(cells, "dropped values", "kv_heads", stack.num_kv_heads, stack.head_dim, _BOOL, length)
            yield dropped
        return
    yield _kept(cells, "dropout", ("embed", stack.d_model), _BOOL).times(branches)
    yield _kept(cells, "dropout", ("mlp", stack.d_ff), _BOOL)
    axes = ("batch", "heads", "length", None)
    for length in (cells.length, *((cells.source,) if branches == 3 else ())):
        yield Held("dropout", axes, (cells.rows, stack.num_heads, cells.length, length), _BOOL)


def scores(config: ModelConfig, stack: StackConfig, cells: Cells) -> list[Held]:
    """Attention scores of a layer where a backend materialises them: float32, and probabilities in the type of the
    model; of the widest of its attentions."""
    if config.attention not in ("reference", "xla"):
        return []
    width = max(cells.length, cells.source)
    if stack.cross_attention == "merged":
        width = cells.length + cells.source
    shape = (cells.rows, stack.num_heads, cells.length, width)
    return [Held("attention scores", ("batch", "heads", "length", None), shape, _FLOAT32 + itemsize(config))]


def cotangents(config: ModelConfig, stack: StackConfig, cells: Cells) -> list[Held]:
    """Of the inner arrays of a layer's MLP: the widest that its backward pass makes."""
    kept = list(_mlp(stack, cells, itemsize(config), "none"))
    return [kept[0].times(3 / kept[0].count)]


def _of_stack(config: ModelConfig, stack: StackConfig, cells: Cells) -> Iterator[Held]:
    """Once per stack: around the layers, and what all of them share."""
    size = itemsize(config)
    # Before and after the layers; around a norm of the embeddings; and inside BERT's head.
    around = 2
    if config.embedding_norm:
        around += 2
    elif stack.positions in ("learned", "disentangled"):
        around += 1
    if config.head_transform and stack is (config.generator or next(reversed(config.stacks.values()))):
        around += 3
    yield _kept(cells, "states around the layers", ("embed", stack.d_model), size).times(around)
    width = cells.length + (cells.source if stack.cross_attention == "merged" else 0)
    if stack.positions == "relative_bias" and not stack.relative_bias_per_layer:
        shape = (1, stack.num_heads, cells.length, cells.length)
        yield Held("relative bias", (None, "heads", "length", None), shape, _FLOAT32)
    rows = cells.rows if cells.masked_by_row else 1
    kinds = len(set(stack.layer_kinds))
    yield Held(
        "masks", ("batch" if rows > 1 else None, None, "length", None), (rows, 1, cells.length, width), _BOOL, kinds
    )
