"""T5 (and ByT5), mT5 and umT5, and their encoders alone, as sentence-T5 and image models use them."""

from __future__ import annotations

import dataclasses
import functools

from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.errors import DataError
from t5x_like.interop.huggingface.config_reader import ACTIVATIONS, Fields
from t5x_like.interop.huggingface.families.family import (
    Family,
    Present,
    SpecialTokens,
    Values,
    activation_name,
)
from t5x_like.interop.huggingface.weight_map import (
    Rule,
    attention_rules,
    dense_rules,
    head_rule,
    norm_rules,
    table_rule,
)
from t5x_like.models import presets


def t5_stack_rules(stack: str, mlp: int, attention: str = "SelfAttention") -> list[Rule]:
    """Return the rules of a stack; `mlp` is the number of the MLP among the sub-layers of a block, `attention` the name
    of the self-attention."""
    tensors, params = f"{stack}.block.{{layer}}.layer", f"{stack}/layers"
    bias, global_bias = f"{attention}.relative_attention_bias.weight", f"{stack}/global_relative_bias"
    rules = [
        # umT5 has one table in each layer; the others share one, which files store in the first layer.
        table_rule(f"{stack}.block.0.layer.0.{bias}", f"{stack}/relative_bias"),
        table_rule(f"{tensors}.0.{bias}", f"{params}/relative_bias"),
        *attention_rules(f"{tensors}.0.{attention}", f"{params}/self_attention", ("q", "k", "v", "o")),
        # LongT5's transient global tokens.
        table_rule(f"{stack}.block.0.layer.0.{attention}.global_relative_attention_bias.weight", global_bias),
        *norm_rules(f"{tensors}.0.{attention}.global_input_layer_norm", f"{params}/global_norm"),
        *norm_rules(f"{tensors}.0.layer_norm", f"{params}/self_attention_norm"),
        *norm_rules(f"{tensors}.{mlp}.layer_norm", f"{params}/mlp_norm"),
        *norm_rules(f"{stack}.final_layer_norm", f"{stack}/final_norm"),
    ]
    for part in ("wi", "wi_0", "wi_1", "wo"):
        rules += dense_rules(f"{tensors}.{mlp}.DenseReluDense.{part}", f"{params}/mlp/{part}")
    if stack == "decoder":
        rules += attention_rules(f"{tensors}.1.EncDecAttention", f"{params}/cross_attention", ("q", "k", "v", "o"))
        rules += norm_rules(f"{tensors}.1.layer_norm", f"{params}/cross_attention_norm")
    return rules


_RULES = [
    table_rule("shared.weight", "token_embedder"),
    head_rule(),
    *t5_stack_rules("encoder", 1),
    *t5_stack_rules("decoder", 2),
]


def read_t5(
    fields: Fields,
    present: Present,
    *,
    bias_per_layer: bool = False,
    may_scale_logits: bool = False,
    default: str = "gated-gelu",
) -> ModelConfig:
    """Return the model of a config.json of T5, mT5 or umT5.

    Args:
      fields: config.json.
      present: Facts from the tensors.
      bias_per_layer: Each layer has a table of relative bias.
      may_scale_logits: config.json decides whether the logits are scaled; otherwise they are not.
      default: `feed_forward_proj` that transformers assumes if config.json does not state it.
    """
    fields.unused("dense_act_fn", "is_gated_act")  # Both follow from `feed_forward_proj`.
    projection = _projection(fields, default)
    name = "gelu_new" if projection == "gated-gelu" else projection.removeprefix("gated-")
    if name not in ACTIVATIONS:
        raise fields.wrong("feed_forward_proj", f"gated- or not, then one of {', '.join(ACTIVATIONS)}")
    heads = fields.integer("num_heads")
    encoder = StackConfig(
        num_layers=fields.numbered("num_layers"),
        d_model=fields.integer("d_model"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=fields.integer("d_kv", 64),
        d_ff=fields.integer("d_ff"),
        mlp_activation=ACTIVATIONS[name],
        mlp_gated=projection.startswith("gated-"),
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-6),
        relative_bias_buckets=fields.integer("relative_attention_num_buckets", 32),
        relative_bias_max_distance=fields.integer("relative_attention_max_distance", 128),
        relative_bias_per_layer=bias_per_layer,
        attention_scale=1.0,
        dropout_rate=fields.number("dropout_rate", 0.1),
        dropout_broadcast_length=True,
    )
    scaled = fields.flag("scale_decoder_outputs", fields.flag("tie_word_embeddings", True))
    return ModelConfig(
        encoder=encoder,
        decoder=dataclasses.replace(
            encoder,
            num_layers=fields.numbered("num_decoder_layers", encoder.num_layers),
            relative_bias_bidirectional=False,
        ),
        vocab_size=fields.integer("vocab_size"),
        tie_embeddings=not present.head,
        # umT5 was trained without scaling; transformers 5 scales its logits nevertheless.
        scale_logits=may_scale_logits and scaled,
    )


def _projection(fields: Fields, default: str) -> str:
    """Return the activation, after "gated-" if the MLP is gated.

    Some files state it by `dense_act_fn` and `is_gated_act` only, which transformers derives from `feed_forward_proj`.

    Raises:
      DataError: the fields contradict each other.
    """
    stated = fields.values.get("feed_forward_proj")
    if stated is None and fields.has("dense_act_fn"):
        return ("gated-" if fields.flag("is_gated_act", False) else "") + str(fields.values["dense_act_fn"])
    projection = default if stated is None else str(stated)
    gated = projection.startswith("gated-")
    if fields.flag("is_gated_act", gated) != gated:
        fixed = projection.removeprefix("gated-") if gated else f"gated-{projection}"
        raise fields.wrong("feed_forward_proj", f"{fixed!r}, since is_gated_act is {str(not gated).lower()}")
    return projection


def write_t5(model: ModelConfig, *, architecture: str) -> Values:
    """Return the fields of config.json; `architecture` is the class name in transformers."""
    encoder, decoder = model.encoder, model.decoder or model.encoder
    assert encoder is not None and decoder is not None
    activation = activation_name(encoder.mlp_activation, tanh="gelu" if encoder.mlp_gated else "gelu_new")
    if encoder.mlp_gated and encoder.mlp_activation == "gelu":
        raise DataError("a gated MLP with GELU by the error function has no name in T5's config.json")
    return {
        "architectures": [architecture],
        "is_encoder_decoder": model.decoder is not None,
        "d_model": encoder.d_model,
        "d_kv": encoder.head_dim,
        "d_ff": encoder.d_ff,
        "num_layers": encoder.num_layers,
        "num_decoder_layers": decoder.num_layers,
        "num_heads": encoder.num_heads,
        "feed_forward_proj": f"gated-{activation}" if encoder.mlp_gated else activation,
        "layer_norm_epsilon": encoder.norm_epsilon,
        "relative_attention_num_buckets": encoder.relative_bias_buckets,
        "relative_attention_max_distance": encoder.relative_bias_max_distance,
        "dropout_rate": encoder.dropout_rate,
        "tie_word_embeddings": model.tie_embeddings,
        "scale_decoder_outputs": model.scale_logits,
        "vocab_size": model.vocab_size,
    }


def read_t5_encoder(fields: Fields, present: Present, *, bias_per_layer: bool = False) -> ModelConfig:
    model = read_t5(fields, present, bias_per_layer=bias_per_layer)
    return dataclasses.replace(model, decoder=None, tie_embeddings=True)


T5 = Family(
    model_type="t5",
    presets=(presets.t5_1_1, presets.t5_1_0, presets.byt5, presets.ul2_20b),
    rules=_RULES,
    read=functools.partial(read_t5, may_scale_logits=True, default="relu"),
    write=functools.partial(write_t5, architecture="T5ForConditionalGeneration"),
    special_tokens=SpecialTokens(pad=0, start=0, eos=1),
    architecture="encoder_decoder",
    token_tables=("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
)
MT5 = dataclasses.replace(
    T5,
    model_type="mt5",
    presets=(presets.mt5, presets.mt5_base),
    read=read_t5,
    write=functools.partial(write_t5, architecture="MT5ForConditionalGeneration"),
)
UMT5 = dataclasses.replace(
    T5,
    model_type="umt5",
    presets=(presets.umt5,),
    read=functools.partial(read_t5, bias_per_layer=True),
    write=functools.partial(write_t5, architecture="UMT5ForConditionalGeneration"),
    unstated_fields=("scale_logits",),
    # Old files do not name their family; no other family has a table of relative bias in the second layer.
    signature="encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
)
T5_ENCODER = dataclasses.replace(
    T5,
    model_type="t5_encoder",
    variant_of="t5",
    presets=(presets.t5_encoder,),
    rules=[table_rule("shared.weight", "token_embedder"), *t5_stack_rules("encoder", 1)],
    read=read_t5_encoder,
    write=functools.partial(write_t5, architecture="T5EncoderModel"),
    architecture="encoder",
    token_tables=("shared.weight", "encoder.embed_tokens.weight"),
)
MT5_ENCODER = dataclasses.replace(
    T5_ENCODER,
    model_type="mt5_encoder",
    variant_of="mt5",
    write=functools.partial(write_t5, architecture="MT5EncoderModel"),
)
UMT5_ENCODER = dataclasses.replace(
    T5_ENCODER,
    model_type="umt5_encoder",
    variant_of="umt5",
    presets=(functools.partial(presets.t5_encoder, vocab_size=256_384, bias_per_layer=True),),
    read=functools.partial(read_t5_encoder, bias_per_layer=True),
    write=functools.partial(write_t5, architecture="UMT5EncoderModel"),
)
