"""Which tensor of a file is which parameter: one table per family, read in both directions.

A rule names a tensor as files do, with `{layer}` and `{expert}` for numbers, and the parameters that are in it; those
have the dimensions of the numbers in front. The paths of parameters are those of `models`; rules for parameters that a
model has not got are without effect, so that one table serves a family in all its variants.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

Shape = tuple[int, ...]
Form = Literal["plain", "flat", "out_in", "in_out"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A kind of tensor.

    Attributes:
      theirs: Its name.
      ours: Paths of parameters; several lie one after the other along the tensor's output dimension.
      form: plain: as it is; flat: all dimensions in one; out_in: a matrix [outputs, inputs], as torch's Linear has it;
        in_out: [inputs, outputs].
      inputs: How many of a parameter's dimensions are inputs; for matrices.
      first: The number of the first layer that has one.
    """

    theirs: str
    ours: tuple[str, ...]
    form: Form = "plain"
    inputs: int = 1
    first: int = 0

    @property
    def numbered(self) -> int:
        """How many numbers the name has."""
        return self.theirs.count("{")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file: `index` are its layer and expert, counted as the parameters count them."""

    name: str
    shape: Shape
    rule: Rule
    index: tuple[int, ...]


def tensors(rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> Iterator[Tensor]:
    """All tensors of a model whose parameters have these shapes by path.

    Raises:
      ValueError: a parameter is in no rule, or in several.
    """
    used: list[str] = []
    for rule in rules:
        if not all(path in shapes for path in rule.ours):
            continue
        used += rule.ours
        parts = [shapes[path] for path in rule.ours]
        for index in itertools.product(*(range(n) for n in parts[0][: rule.numbered])):
            numbers = dict(zip(("layer", "expert"), index, strict=False))
            if rule.numbered:
                numbers["layer"] += rule.first
            inner = [part[rule.numbered :] for part in parts]
            yield Tensor(rule.theirs.format(**numbers), stored_shape(rule, inner), rule, index)
    missing = sorted(set(shapes) - set(used))
    twice = sorted({path for path in used if used.count(path) > 1})
    if missing or twice:
        raise ValueError(f"parameters without a name in files: {missing}; with several: {twice}")


def stored_shape(rule: Rule, parts: Sequence[Shape]) -> Shape:
    """Shape of the tensor that holds parameters of these shapes (without numbered dimensions)."""
    match rule.form:
        case "plain":
            return parts[0]
        case "flat":
            return (sum(map(math.prod, parts)),)
    inputs = math.prod(parts[0][: rule.inputs])
    outputs = sum(math.prod(part[rule.inputs :]) for part in parts)
    return (outputs, inputs) if rule.form == "out_in" else (inputs, outputs)


def _dense(theirs: str, ours: str | tuple[str, ...], *, form: Form = "out_in", inputs: int = 1) -> list[Rule]:
    """A weight and a bias, where there is one."""
    paths = (ours,) if isinstance(ours, str) else ours
    return [
        Rule(f"{theirs}.weight", tuple(f"{path}/kernel" for path in paths), form, inputs),
        Rule(f"{theirs}.bias", tuple(f"{path}/bias" for path in paths), "flat"),
    ]


def _norm(theirs: str, ours: str, *, first: int = 0) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", (f"{ours}/scale",), first=first),
        Rule(f"{theirs}.bias", (f"{ours}/bias",), first=first),
    ]


def _table(theirs: str, ours: str) -> Rule:
    return Rule(theirs, (f"{ours}/embedding",))


def _attention(theirs: str, ours: str, names: tuple[str, str, str, str]) -> list[Rule]:
    """`names` of query, key, value and output projection."""
    parts = zip(names, ("query", "key", "value", "out"), strict=True)
    return [
        rule
        for name, part in parts
        for rule in _dense(f"{theirs}.{name}", f"{ours}/{part}", inputs=2 if part == "out" else 1)
    ]


def _head(theirs: str = "lm_head.weight") -> Rule:
    return Rule(theirs, ("head/kernel",), "out_in")


def _t5_stack(stack: str, mlp: int) -> list[Rule]:
    theirs, ours = f"{stack}.block.{{layer}}.layer", f"{stack}/layers"
    bias = "SelfAttention.relative_attention_bias.weight"
    rules = [
        # umT5 has one in each layer, the others one for all, which files keep in the first.
        _table(f"{stack}.block.0.layer.0.{bias}", f"{stack}/relative_bias"),
        _table(f"{theirs}.0.{bias}", f"{ours}/relative_bias"),
        *_attention(f"{theirs}.0.SelfAttention", f"{ours}/self_attention", ("q", "k", "v", "o")),
        *_norm(f"{theirs}.0.layer_norm", f"{ours}/self_attention_norm"),
        *_norm(f"{theirs}.{mlp}.layer_norm", f"{ours}/mlp_norm"),
        *_norm(f"{stack}.final_layer_norm", f"{stack}/final_norm"),
    ]
    for part in ("wi", "wi_0", "wi_1", "wo"):
        rules += _dense(f"{theirs}.{mlp}.DenseReluDense.{part}", f"{ours}/mlp/{part}")
    if stack == "decoder":
        rules += _attention(f"{theirs}.1.EncDecAttention", f"{ours}/cross_attention", ("q", "k", "v", "o"))
        rules += _norm(f"{theirs}.1.layer_norm", f"{ours}/cross_attention_norm")
    return rules


T5 = [_table("shared.weight", "token_embedder"), _head(), *_t5_stack("encoder", 1), *_t5_stack("decoder", 2)]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _gated(theirs: str, ours: str) -> list[Rule]:
    names = {"gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo"}
    return [rule for name, part in names.items() for rule in _dense(f"{theirs}.{name}", f"{ours}/{part}")]


def _rotary_stack(theirs: str, ours: str, norms: Mapping[str, str]) -> list[Rule]:
    """A stack of Llama's build; `norms` are the norms' names by ours."""
    layer, layers = f"{theirs}.layers.{{layer}}", f"{ours}/layers"
    rules = _attention(f"{layer}.self_attn", f"{layers}/self_attention", _PROJECTIONS)
    rules += _norm(f"{layer}.self_attn.q_norm", f"{layers}/self_attention/query_norm")
    rules += _norm(f"{layer}.self_attn.k_norm", f"{layers}/self_attention/key_norm")
    rules += _gated(f"{layer}.mlp", f"{layers}/mlp")
    for own, name in norms.items():
        rules += _norm(f"{layer}.{name}", f"{layers}/{own}")
    return [*rules, *_norm(f"{theirs}.norm", f"{ours}/final_norm")]


_LLAMA_NORMS = {"self_attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "self_attention_norm": "input_layernorm",
    "self_attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_T5GEMMA_NORMS = {
    "self_attention_norm": "pre_self_attn_layernorm",
    "self_attention_post_norm": "post_self_attn_layernorm",
    "cross_attention_norm": "pre_cross_attn_layernorm",
    "cross_attention_post_norm": "post_cross_attn_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_DECODER_TABLES = [_table("model.embed_tokens.weight", "token_embedder"), _head()]

LLAMA = [*_DECODER_TABLES, *_rotary_stack("model", "decoder", _LLAMA_NORMS)]
GEMMA = [*_DECODER_TABLES, *_rotary_stack("model", "decoder", _GEMMA_NORMS)]

_MIXTRAL_MLP = "model.layers.{layer}.block_sparse_moe"
MIXTRAL = [
    *LLAMA,
    Rule(f"{_MIXTRAL_MLP}.gate.weight", ("decoder/layers/mlp/router/kernel",), "out_in"),
    *(
        Rule(f"{_MIXTRAL_MLP}.experts.{{expert}}.{name}.weight", (f"decoder/layers/mlp/{part}/kernel",), "out_in")
        for name, part in {"w1": "wi_0", "w3": "wi_1", "w2": "wo"}.items()
    ),
]
# The names of a dense MLP, which have a number less, would catch the experts' kernels.
MIXTRAL = [rule for rule in MIXTRAL if ".mlp." not in rule.theirs]

T5GEMMA = [
    _table("model.encoder.embed_tokens.weight", "encoder_token_embedder"),
    _table("model.decoder.embed_tokens.weight", "token_embedder"),
    _head("lm_head.out_proj.weight"),
    *_rotary_stack("model.encoder", "encoder", _T5GEMMA_NORMS),
    *_rotary_stack("model.decoder", "decoder", _T5GEMMA_NORMS),
    *_attention("model.decoder.layers.{layer}.cross_attn", "decoder/layers/cross_attention", _PROJECTIONS),
]
T5GEMMA_2 = [
    _table("model.encoder.embed_tokens.weight", "token_embedder"),
    Rule("model.encoder.embed_tokens.eoi_embedding", ("unscaled_embedding",)),
    _head("lm_head.out_proj.weight"),
    *_rotary_stack("model.encoder", "encoder", _T5GEMMA_NORMS),
    *_rotary_stack("model.decoder", "decoder", _T5GEMMA_NORMS),
]

_GPT_2 = "transformer.h.{layer}"
_GPT_2_LAYER = "decoder/layers"
GPT_2 = [
    _table("transformer.wte.weight", "token_embedder"),
    _table("transformer.wpe.weight", "decoder/position_embedder"),
    *_norm("transformer.ln_f", "decoder/final_norm"),
    *_norm(f"{_GPT_2}.ln_1", f"{_GPT_2_LAYER}/self_attention_norm"),
    *_norm(f"{_GPT_2}.ln_2", f"{_GPT_2_LAYER}/mlp_norm"),
    *_dense(
        f"{_GPT_2}.attn.c_attn",
        tuple(f"{_GPT_2_LAYER}/self_attention/{part}" for part in ("query", "key", "value")),
        form="in_out",
    ),
    *_dense(f"{_GPT_2}.attn.c_proj", f"{_GPT_2_LAYER}/self_attention/out", form="in_out", inputs=2),
    *_dense(f"{_GPT_2}.mlp.c_fc", f"{_GPT_2_LAYER}/mlp/wi", form="in_out"),
    *_dense(f"{_GPT_2}.mlp.c_proj", f"{_GPT_2_LAYER}/mlp/wo", form="in_out"),
]


def _bert(prefix: str, projections: tuple[str, str, str]) -> list[Rule]:
    """BERT and DeBERTa; `projections` are the names of query, key and value."""
    layer, layers = f"{prefix}.encoder.layer.{{layer}}", "encoder/layers"
    rules = [
        _table(f"{prefix}.embeddings.word_embeddings.weight", "token_embedder"),
        _table(f"{prefix}.embeddings.position_embeddings.weight", "encoder/position_embedder"),
        _table(f"{prefix}.embeddings.token_type_embeddings.weight", "encoder/token_type_embedder"),
        *_norm(f"{prefix}.embeddings.LayerNorm", "encoder/embedding_norm"),
        *_dense(f"{layer}.attention.output.dense", f"{layers}/self_attention/out", inputs=2),
        *_norm(f"{layer}.attention.output.LayerNorm", f"{layers}/self_attention_norm"),
        *_dense(f"{layer}.intermediate.dense", f"{layers}/mlp/wi"),
        *_dense(f"{layer}.output.dense", f"{layers}/mlp/wo"),
        *_norm(f"{layer}.output.LayerNorm", f"{layers}/mlp_norm"),
        *_dense("cls.predictions.transform.dense", "head/transform"),
        *_norm("cls.predictions.transform.LayerNorm", "head/transform_norm"),
        Rule("cls.predictions.bias", ("head/bias",)),
    ]
    for name, part in zip(projections, ("query", "key", "value"), strict=True):
        rules += _dense(f"{layer}.attention.self.{name}", f"{layers}/self_attention/{part}")
    return rules


BERT = _bert("bert", ("query", "key", "value"))
DEBERTA = [
    *_bert("deberta", ("query_proj", "key_proj", "value_proj")),
    _table("deberta.encoder.rel_embeddings.weight", "encoder/distance_embedder"),
    *_norm("deberta.encoder.LayerNorm", "encoder/distance_norm"),
]

_MODERNBERT = "model.layers.{layer}"
MODERNBERT = [
    _table("model.embeddings.tok_embeddings.weight", "token_embedder"),
    *_norm("model.embeddings.norm", "encoder/embedding_norm"),
    *_norm(f"{_MODERNBERT}.attn_norm", "encoder/layers/self_attention_norm", first=1),
    *_dense(
        f"{_MODERNBERT}.attn.Wqkv", tuple(f"encoder/layers/self_attention/{part}" for part in ("query", "key", "value"))
    ),
    *_dense(f"{_MODERNBERT}.attn.Wo", "encoder/layers/self_attention/out", inputs=2),
    *_norm(f"{_MODERNBERT}.mlp_norm", "encoder/layers/mlp_norm"),
    *_dense(f"{_MODERNBERT}.mlp.Wi", ("encoder/layers/mlp/wi_0", "encoder/layers/mlp/wi_1")),
    *_dense(f"{_MODERNBERT}.mlp.Wo", "encoder/layers/mlp/wo"),
    *_norm("model.final_norm", "encoder/final_norm"),
    *_dense("head.dense", "head/transform"),
    *_norm("head.norm", "head/transform_norm"),
    Rule("decoder.bias", ("head/bias",)),
]
