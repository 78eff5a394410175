"""Which array of a T5X checkpoint is which parameter: one table.

The names are those of T5X's own networks (examples/t5, scalable_t5, decoder_only), which Flaxformer's T5s share. Layers
are arrays of their own, `encoder/layers_0/...`, or lie in one array for each kind, `encoder/encoder/...`, with the
layers as second dimension ("scanned"). Kernels of attention have heads and head_dim in one dimension or in two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Shape = tuple[int, ...]
Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A kind of array.

    Attributes:
      theirs: Its path below `target`, with `{layer}` for the layer.
      ours: The path of the parameter.
      inputs: How many of a kernel's dimensions are inputs, which may be in one, as may the outputs.
      transposed: The table of relative positions is [heads, buckets] there, [buckets, heads] here.
    """

    theirs: str
    ours: str
    inputs: int = 1
    transposed: bool = False

    @property
    def by_layer(self) -> bool:
        return "{layer}" in self.theirs


def _norm(theirs: str, ours: str) -> Rule:
    return Rule(f"{theirs}/scale", f"{ours}/scale")


def _stack(stack: str, attentions: Mapping[str, str]) -> list[Rule]:
    """`attentions`: their name and ours; the norm in front is called after it."""
    theirs, ours = f"{stack}/{{layer}}", f"{stack}/layers"
    rules = [
        Rule(f"{stack}/relpos_bias/rel_embedding", f"{stack}/relative_bias/embedding", transposed=True),
        Rule(f"{theirs}/relpos_bias/rel_embedding", f"{ours}/relative_bias/embedding", transposed=True),
        _norm(f"{theirs}/pre_mlp_layer_norm", f"{ours}/mlp_norm"),
        _norm(f"{stack}/{stack}_norm", f"{stack}/final_norm"),
    ]
    for name, own in attentions.items():
        before = name.replace("encoder_decoder", "cross")
        rules.append(_norm(f"{theirs}/pre_{before}_layer_norm", f"{ours}/{own}_norm"))
        for part in ("query", "key", "value", "out"):
            inputs = 2 if part == "out" else 1
            rules.append(Rule(f"{theirs}/{name}/{part}/kernel", f"{ours}/{own}/{part}/kernel", inputs))
    return rules + [Rule(f"{theirs}/mlp/{part}/kernel", f"{ours}/mlp/{part}/kernel") for part in _MLP]


_MLP = ("wi", "wi_0", "wi_1", "wo")
RULES: tuple[Rule, ...] = (
    Rule("token_embedder/embedding", "token_embedder/embedding"),
    Rule("decoder/logits_dense/kernel", "head/kernel"),
    *_stack("encoder", {"attention": "self_attention"}),
    *_stack("decoder", {"self_attention": "self_attention", "encoder_decoder_attention": "cross_attention"}),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array that a model needs.

    Attributes:
      path: Its path below `target`.
      shapes: Those that it may have.
      layer: Number of its layer, None if it is for all or for none.
      axis: The dimension that counts layers, or None.
    """

    path: str
    shapes: tuple[Shape, ...]
    rule: Rule
    layer: int | None = None
    axis: int | None = None

    def ours(self, stored: Array, shape: Shape) -> Array:
        """The array as a parameter (or the layer of one) of this shape; a view of it."""
        if self.axis is not None:
            stored = np.moveaxis(stored, self.axis, 0)
        if self.rule.transposed:
            stored = np.swapaxes(stored, -1, -2)
        return stored.reshape(shape)


def scan_axis(paths: Mapping[str, Shape], layers: Mapping[str, int]) -> int | None:
    """The dimension that counts layers where a checkpoint has all layers in one array, else None.

    Args:
      paths: Shapes of its arrays by path below `target`.
      layers: Number of layers of each stack.
    """
    for stack, count in layers.items():
        shape = paths.get(f"{stack}/{stack}/pre_mlp_layer_norm/scale")
        if shape is not None:
            return 0 if len(shape) == 2 and shape[1] != count and shape[0] == count else 1
    return None


def tensors(shapes: Mapping[str, Shape], axis: int | None) -> Iterator[Tensor]:
    """All arrays of a model whose parameters have these shapes by path.

    Args:
      axis: See `scan_axis`.

    Raises:
      ValueError: T5X's networks have no such parameter; the paths are listed.
    """
    left = set(shapes)
    for rule in RULES:
        if rule.ours not in shapes:
            continue
        left.remove(rule.ours)
        shape = shapes[rule.ours]
        # A model without an encoder keeps its tokens in the decoder.
        alone = rule.theirs == "token_embedder/embedding" and not any(path.startswith("encoder/") for path in shapes)
        theirs = f"decoder/{rule.theirs}" if alone else rule.theirs
        if not rule.by_layer:
            yield Tensor(theirs, _stored(rule, shape), rule)
        elif axis is None:
            for layer in range(shape[0]):
                yield Tensor(theirs.format(layer=f"layers_{layer}"), _stored(rule, shape[1:]), rule, layer)
        else:
            stacked = tuple((*one[:axis], shape[0], *one[axis:]) for one in _stored(rule, shape[1:]))
            yield Tensor(theirs.format(layer=theirs.partition("/")[0]), stacked, rule, axis=axis)
    if left:
        raise ValueError(", ".join(sorted(left)))


def _stored(rule: Rule, shape: Sequence[int]) -> tuple[Shape, ...]:
    """The shapes that an array for a parameter of this shape may have, without layers."""
    whole = tuple(shape)
    if rule.transposed:
        return (whole[::-1],)
    if len(whole) < 3:
        return (whole,)
    return (math.prod(whole[: rule.inputs]), math.prod(whole[rule.inputs :])), whole
