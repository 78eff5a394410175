"""Rules that map arrays of T5X checkpoints to parameters.

T5X's own networks (examples/t5, scalable_t5, decoder_only) and Flaxformer's T5s use these names. Each
layer has its own arrays, `encoder/layers_0/...`, or all layers share one array, `encoder/encoder/...`, with the layers
as second dimension ("scanned"). Kernels of attention have heads and head_dim in one dimension or in two.
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
    """Mapping of one kind of array.

    Attributes:
      array: Path of the array below `target`, with `{layer}` for the layer.
      param: Path of the parameter.
      inputs: Number of a kernel's dimensions that are inputs. They may be merged into one, and so may the outputs.
      transposed: The relative-bias table is [heads, buckets] in T5X and [buckets, heads] here.
    """

    array: str
    param: str
    inputs: int = 1
    transposed: bool = False

    @property
    def by_layer(self) -> bool:
        """True if each layer has its own array."""
        return "{layer}" in self.array


def _norm(array: str, param: str) -> Rule:
    return Rule(f"{array}/scale", f"{param}/scale")


def _stack(stack: str, attentions: Mapping[str, str]) -> list[Rule]:
    """Return the rules of a stack; `attentions` maps T5X's names to ours. The norm before each is named after it."""
    array, param = f"{stack}/{{layer}}", f"{stack}/layers"
    rules = [
        Rule(f"{stack}/relpos_bias/rel_embedding", f"{stack}/relative_bias/embedding", transposed=True),
        Rule(f"{array}/relpos_bias/rel_embedding", f"{param}/relative_bias/embedding", transposed=True),
        _norm(f"{array}/pre_mlp_layer_norm", f"{param}/mlp_norm"),
        _norm(f"{stack}/{stack}_norm", f"{stack}/final_norm"),
    ]
    for name, attention in attentions.items():
        before = name.replace("encoder_decoder", "cross")
        rules.append(_norm(f"{array}/pre_{before}_layer_norm", f"{param}/{attention}_norm"))
        for part in ("query", "key", "value", "out"):
            inputs = 2 if part == "out" else 1
            rules.append(Rule(f"{array}/{name}/{part}/kernel", f"{param}/{attention}/{part}/kernel", inputs))
    return rules + [Rule(f"{array}/mlp/{part}/kernel", f"{param}/mlp/{part}/kernel") for part in _MLP]


_MLP = ("wi", "wi_0", "wi_1", "wo")
RULES: tuple[Rule, ...] = (
    Rule("token_embedder/embedding", "token_embedder/embedding"),
    Rule("decoder/logits_dense/kernel", "head/kernel"),
    *_stack("encoder", {"attention": "self_attention"}),
    *_stack("decoder", {"self_attention": "self_attention", "encoder_decoder_attention": "cross_attention"}),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Array that a model needs.

    Attributes:
      path: Path below `target`.
      shapes: Shapes that it may have.
      rule: Mapping to the parameter.
      layer: Index of its layer; None if it holds all layers or belongs to none.
      axis: Dimension that counts layers, or None.
    """

    path: str
    shapes: tuple[Shape, ...]
    rule: Rule
    layer: int | None = None
    axis: int | None = None

    def to_param(self, stored: Array, shape: Shape) -> Array:
        """Return the array as a parameter, or one layer of a parameter, of this shape; a view of the array."""
        if self.axis is not None:
            stored = np.moveaxis(stored, self.axis, 0)
        if self.rule.transposed:
            stored = np.swapaxes(stored, -1, -2)
        return stored.reshape(shape)


def scan_axis(paths: Mapping[str, Shape], layers: Mapping[str, int]) -> int | None:
    """Return the dimension that counts layers if a checkpoint has all layers in one array, else None.

    Args:
      paths: Shapes of the checkpoint's arrays by path below `target`.
      layers: Number of layers of each stack.
    """
    for stack, count in layers.items():
        shape = paths.get(f"{stack}/{stack}/pre_mlp_layer_norm/scale")
        if shape is not None:
            # T5X scans over axis 1 by default. Axis 0 is taken only if the shape excludes axis 1.
            return 0 if len(shape) == 2 and shape[1] != count and shape[0] == count else 1
    return None


def tensors(shapes: Mapping[str, Shape], axis: int | None) -> Iterator[Tensor]:
    """Yield all arrays of a model whose parameters have these shapes by path.

    Args:
      shapes: Shapes of the parameters by path.
      axis: See `scan_axis`.

    Raises:
      ValueError: T5X's networks do not have some of the parameters; the message lists their paths.
    """
    unmapped = set(shapes)
    for rule in RULES:
        if rule.param not in shapes:
            continue
        unmapped.remove(rule.param)
        shape = shapes[rule.param]
        # A model without an encoder has its token table in the decoder.
        in_decoder = rule.array == "token_embedder/embedding" and not any(
            path.startswith("encoder/") for path in shapes
        )
        path = f"decoder/{rule.array}" if in_decoder else rule.array
        if not rule.by_layer:
            yield Tensor(path, _stored(rule, shape), rule)
        elif axis is None:
            for layer in range(shape[0]):
                yield Tensor(path.format(layer=f"layers_{layer}"), _stored(rule, shape[1:]), rule, layer)
        else:
            stacked = tuple((*stored[:axis], shape[0], *stored[axis:]) for stored in _stored(rule, shape[1:]))
            yield Tensor(path.format(layer=path.partition("/")[0]), stacked, rule, axis=axis)
    if unmapped:
        raise ValueError(", ".join(sorted(unmapped)))


def _stored(rule: Rule, shape: Sequence[int]) -> tuple[Shape, ...]:
    """Return the shapes that an array for a parameter of this shape may have, without layers."""
    whole = tuple(shape)
    if rule.transposed:
        return (whole[::-1],)
    if len(whole) < 3:
        return (whole,)
    # T5X stores a kernel [embed, heads, head_dim] as a matrix or with all of its dimensions, depending on the network.
    return (math.prod(whole[: rule.inputs]), math.prod(whole[rule.inputs :])), whole
