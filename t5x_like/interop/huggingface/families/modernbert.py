"""ModernBERT, and the decoder of its build (Ettin)."""

from __future__ import annotations

import dataclasses

from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.interop.huggingface.config_reader import (
    Fields,
    write_layer_types,
    write_original_positions,
    write_rope,
)
from t5x_like.interop.huggingface.families.bert import bert_model, write_encoder
from t5x_like.interop.huggingface.families.family import (
    Family,
    Present,
    SpecialTokens,
    Values,
    activation_name,
)
from t5x_like.interop.huggingface.families.gemma import causal_window
from t5x_like.interop.huggingface.weight_map import Rule, dense_rules, norm_rules, table_rule
from t5x_like.models import presets

_TENSORS = "model.layers.{layer}"


def _rules(stack: str, *, is_fused: bool, head: str) -> list[Rule]:
    """Return the rules of a stack.

    Args:
      stack: Name of the stack.
      is_fused: One tensor holds the projections of queries, keys and values.
      head: Beginning of the names of the head's transform.
    """
    layers = f"{stack}/layers"
    parts = {name: f"{layers}/self_attention/{part}" for name, part in _PROJECTIONS.items()}
    projections = [rule for name, path in parts.items() for rule in dense_rules(f"{_TENSORS}.attn.{name}", path)]
    return [
        table_rule("model.embeddings.tok_embeddings.weight", "token_embedder"),
        *norm_rules("model.embeddings.norm", f"{stack}/embedding_norm"),
        *norm_rules(f"{_TENSORS}.attn_norm", f"{layers}/self_attention_norm", layers="after_first"),
        *(dense_rules(f"{_TENSORS}.attn.Wqkv", tuple(parts.values())) if is_fused else projections),
        *dense_rules(f"{_TENSORS}.attn.Wo", f"{layers}/self_attention/out", inputs=2),
        *norm_rules(f"{_TENSORS}.mlp_norm", f"{layers}/mlp_norm"),
        *dense_rules(f"{_TENSORS}.mlp.Wi", (f"{layers}/mlp/wi_0", f"{layers}/mlp/wi_1")),
        *dense_rules(f"{_TENSORS}.mlp.Wo", f"{layers}/mlp/wo"),
        *norm_rules("model.final_norm", f"{stack}/final_norm"),
        *dense_rules(f"{head}.dense", "head/transform"),
        *norm_rules(f"{head}.norm", "head/transform_norm"),
        Rule("decoder.bias", ("head/bias",)),
    ]


_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}


def read_modernbert(fields: Fields, present: Present) -> ModelConfig:
    for name in ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"):
        fields.only(name, False)
    fields.only("decoder_bias", True)
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    every = max(fields.integer("global_attn_every_n_layers", 3), 1)
    if isinstance(fields.values.get("rope_parameters"), dict):
        (base, scaling), (local_base, local_scaling) = (
            fields.rope(0.0, kind=kind) for kind in ("full_attention", "sliding_attention")
        )
    else:
        base, scaling = fields.number("global_rope_theta", 160_000.0), None
        local_base, local_scaling = fields.number("local_rope_theta", 10_000.0), None
    fields.unused(
        "sliding_window", "layer_norm_eps", "global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"
    )
    fields.unused("position_embedding_type")  # Published files have BERT's, which nothing reads.
    num_layers, half = fields.numbered("num_hidden_layers"), fields.integer("local_attention", 128) // 2
    activation = fields.activation("hidden_activation", "gelu")
    fields.only("classifier_activation", fields.values.get("hidden_activation", "gelu"), "gelu")
    stack = StackConfig(
        num_layers=num_layers,
        d_model=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // max(heads, 1),
        d_ff=fields.integer("intermediate_size"),
        mlp_activation=activation,
        norm="layernorm",
        norm_epsilon=fields.number("norm_eps", 1e-5),
        first_layer_attention_norm=False,
        positions="rope",
        rope_base=base,
        rope_scaling=scaling,
        local_rope_base=local_base,
        local_rope_scaling=local_scaling,
        layer_pattern=fields.layer_kinds(num_layers, full_every=every, first_full=0),
        sliding_window=(half, half),
        dropout_rate=fields.number("mlp_dropout", 0.0),
    )
    return bert_model(stack, fields, present)


def read_modernbert_decoder(fields: Fields, present: Present) -> ModelConfig:
    model = read_modernbert(fields, present)
    assert model.encoder is not None and model.encoder.sliding_window is not None
    # A query attends to half of `local_attention` tokens, including itself.
    left = max(model.encoder.sliding_window[0] - 1, 0)
    stack = dataclasses.replace(model.encoder, sliding_window=(left, left))
    return dataclasses.replace(model, encoder=None, decoder=stack, tie_embeddings=not present.head)


def write_modernbert(model: ModelConfig) -> Values:
    stack = model.encoder
    assert stack is not None
    local = stack.rope_base if stack.local_rope_base is None else stack.local_rope_base
    return {
        **write_encoder(model, "ModernBert"),
        "hidden_activation": activation_name(stack.mlp_activation),
        "norm_eps": stack.norm_epsilon,
        "layer_types": write_layer_types(stack.layer_kinds),
        "local_attention": 128 if stack.sliding_window is None else 2 * stack.sliding_window[0],
        "rope_parameters": {
            "full_attention": write_rope(stack.rope_base, stack.rope_scaling),
            "sliding_attention": write_rope(local, stack.local_rope_scaling),
        },
        **write_original_positions(stack.rope_scaling, stack.local_rope_scaling),
        **dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout"), stack.dropout_rate),
    }


def write_modernbert_decoder(model: ModelConfig) -> Values:
    stack = model.decoder
    assert stack is not None
    as_encoder = dataclasses.replace(model, encoder=stack, decoder=None)
    return {
        **write_modernbert(as_encoder),
        "architectures": ["ModernBertDecoderForCausalLM"],
        "local_attention": 2 * causal_window(stack),
        "tie_word_embeddings": model.tie_embeddings,
    }


MODERNBERT = Family(
    model_type="modernbert",
    presets=(presets.modernbert,),
    rules=_rules("encoder", is_fused=True, head="head"),
    read=read_modernbert,
    write=write_modernbert,
    special_tokens=SpecialTokens(pad=50283, start=0, eos=1),
    architecture="encoder",
    token_tables=("model.embeddings.tok_embeddings.weight",),
    lm_head="decoder.weight",
    masked_lm_head="head.dense.weight",
    prefix="model.",
    head_pattern=r"(head|decoder|classifier)\.",
)
MODERNBERT_DECODER = dataclasses.replace(
    MODERNBERT,
    model_type="modernbert-decoder",
    presets=(presets.modernbert_decoder,),
    rules=_rules("decoder", is_fused=False, head="lm_head"),
    read=read_modernbert_decoder,
    write=write_modernbert_decoder,
    special_tokens=SpecialTokens(pad=50283, start=50281, eos=50282),
    architecture="decoder",
    masked_lm_head="lm_head.dense.weight",
    head_pattern=r"(lm_head|decoder|classifier)\.",
)
