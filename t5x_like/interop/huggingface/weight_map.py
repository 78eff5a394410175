"""Rules that map tensors of Hugging Face checkpoints to parameters, in both directions.

A rule names a tensor as files do, with `{layer}` and `{expert}` as placeholders for numbers, and the parameters that
the tensor contains. The parameters have a leading dimension for each placeholder. Rules for parameters that a model
does not have are ignored, so that one list serves all variants of a family.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, assert_never

from t5x_like.config.model import expert_layers

Shape = tuple[int, ...]
Form = Literal["plain", "flat", "row", "out_in", "in_out", "by_head"]
Layers = Literal["all", "after_first", "with_experts", "without_experts"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Mapping of one kind of tensor.

    Attributes:
      tensor: Name of the tensor with placeholders.
      paths: Paths of its parameters; several are concatenated along the tensor's output dimension.
      form: plain: same shape; flat: all dimensions in one; row: a vector as a matrix of one
        row; out_in: a matrix [outputs, inputs], as in torch's Linear;
        in_out: a matrix [inputs, outputs]; by_head: a matrix [outputs, inputs] with the query, key and value of
        one head after another, whose rotated pairs are neighbours, as in Meta's code of Llama.
      inputs: Number of a parameter's dimensions that are inputs; for matrices.
      layers: Layers that have the tensor. If only some layers of a stack have experts, there is a rule for the layers
        with experts and another one for the layers without.
    """

    tensor: str
    paths: tuple[str, ...]
    form: Form = "plain"
    inputs: int = 1
    layers: Layers = "all"

    @property
    def numbered(self) -> int:
        """Number of placeholders in the name."""
        return self.tensor.count("{")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Tensor of a file. `index` is its layer and expert, as indices of the parameters' leading dimensions."""

    name: str
    shape: Shape
    rule: Rule
    index: tuple[int, ...]


def tensors(rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> Iterator[Tensor]:
    """Yield all tensors of a model whose parameters have these shapes by path.

    Raises:
      ValueError: a parameter is covered by no rule, or by several.
    """
    used: list[str] = []
    for rule in rules:
        if not all(path in shapes for path in rule.paths) or not _applies(rule, shapes):
            continue
        used += rule.paths
        parts = [shapes[path] for path in rule.paths]
        layers = _layer_numbers(rule, shapes) if rule.numbered else []
        for index in itertools.product(*(range(n) for n in parts[0][: rule.numbered])):
            numbers = dict(zip(("layer", "expert"), index, strict=False))
            if rule.numbered:
                numbers["layer"] = layers[numbers["layer"]]
            inner = [part[rule.numbered :] for part in parts]
            yield Tensor(rule.tensor.format(**numbers), stored_shape(rule, inner), rule, index)
    missing = sorted(set(shapes) - set(used))
    twice = sorted({path for path in used if used.count(path) > 1})
    if missing or twice:
        raise ValueError(f"parameters without a tensor: {missing}; with several tensors: {twice}")


def _applies(rule: Rule, shapes: Mapping[str, Shape]) -> bool:
    """Return whether a rule is for parameters of these shapes: MLPs and experts can have the same paths."""
    shape = shapes[rule.paths[0]]
    if rule.layers == "without_experts":
        return shape[0] < _depth(rule, shapes)
    return rule.form not in ("out_in", "in_out") or len(shape) > rule.numbered + rule.inputs


def _depth(rule: Rule, shapes: Mapping[str, Shape]) -> int:
    """Return the number of layers of a rule's stack: the rows of the parameters that each layer has."""
    stack = rule.paths[0].partition("/layers/")[0] + "/layers/"
    return max(shape[0] for path, shape in shapes.items() if path.startswith(stack))


def _layer_numbers(rule: Rule, shapes: Mapping[str, Shape]) -> list[int]:
    """Return the number of the layer of each row of a rule's parameters."""
    rows = shapes[rule.paths[0]][0]
    depth = _depth(rule, shapes) if rule.layers in ("with_experts", "without_experts") else rows
    match rule.layers:
        case "all":
            return list(range(rows))
        case "after_first":
            return list(range(1, rows + 1))
        case "with_experts":
            return list(expert_layers(depth, depth // rows))
        case "without_experts":
            return [number for number in range(depth) if number not in expert_layers(depth, depth // (depth - rows))]
        case unknown:
            assert_never(unknown)


def stored_shape(rule: Rule, parts: Sequence[Shape]) -> Shape:
    """Return the shape of the tensor for parameters of these shapes, given without the numbered dimensions."""
    match rule.form:
        case "plain":
            return parts[0]
        case "flat":
            return (sum(map(math.prod, parts)),)
        case "row":
            return (1, *parts[0])
        case "out_in" | "in_out" | "by_head":
            pass
        case unknown:
            assert_never(unknown)
    inputs = math.prod(parts[0][: rule.inputs])
    outputs = sum(math.prod(part[rule.inputs :]) for part in parts)
    return (inputs, outputs) if rule.form == "in_out" else (outputs, inputs)


def dense_rules(tensor: str, params: str | tuple[str, ...], *, form: Form = "out_in", inputs: int = 1) -> list[Rule]:
    """Return the rules of the weight and the bias of a linear layer; several layers may share one tensor."""
    paths = (params,) if isinstance(params, str) else params
    return [
        Rule(f"{tensor}.weight", tuple(f"{path}/kernel" for path in paths), form, inputs),
        Rule(f"{tensor}.bias", tuple(f"{path}/bias" for path in paths), "flat"),
    ]


def norm_rules(tensor: str, params: str, *, layers: Layers = "all") -> list[Rule]:
    """Return the rules of the scale and the bias of a norm."""
    return [
        Rule(f"{tensor}.weight", (f"{params}/scale",), layers=layers),
        Rule(f"{tensor}.bias", (f"{params}/bias",), layers=layers),
    ]


def table_rule(tensor: str, params: str) -> Rule:
    """Return the rule of an embedding table."""
    return Rule(tensor, (f"{params}/embedding",))


def attention_rules(tensors: str, params: str, names: tuple[str, str, str, str]) -> list[Rule]:
    """Return the rules of an attention; `names`: names of query, key, value and output projection."""
    parts = zip(names, ("query", "key", "value", "out"), strict=True)
    return [
        rule
        for name, part in parts
        for rule in dense_rules(f"{tensors}.{name}", f"{params}/{part}", inputs=2 if part == "out" else 1)
    ]


def head_rule(tensor: str = "lm_head.weight") -> Rule:
    """Return the rule of a head over the vocabulary."""
    return Rule(tensor, ("head/kernel",), "out_in")
