"""GPT-2."""

from __future__ import annotations

from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families.family import (
    TIED_LM,
    Family,
    Present,
    SpecialTokens,
    Values,
    activation_name,
)
from t5x_like.interop.huggingface.weight_map import dense_rules, norm_rules, table_rule
from t5x_like.models import presets

_TENSORS = "transformer.h.{layer}"
_PARAMS = "decoder/layers"
_RULES = [
    table_rule("transformer.wte.weight", "token_embedder"),
    table_rule("transformer.wpe.weight", "decoder/position_embedder"),
    *norm_rules("transformer.ln_f", "decoder/final_norm"),
    *norm_rules(f"{_TENSORS}.ln_1", f"{_PARAMS}/self_attention_norm"),
    *norm_rules(f"{_TENSORS}.ln_2", f"{_PARAMS}/mlp_norm"),
    *dense_rules(
        f"{_TENSORS}.attn.c_attn",
        tuple(f"{_PARAMS}/self_attention/{part}" for part in ("query", "key", "value")),
        form="in_out",
    ),
    *dense_rules(f"{_TENSORS}.attn.c_proj", f"{_PARAMS}/self_attention/out", form="in_out", inputs=2),
    *dense_rules(f"{_TENSORS}.mlp.c_fc", f"{_PARAMS}/mlp/wi", form="in_out"),
    *dense_rules(f"{_TENSORS}.mlp.c_proj", f"{_PARAMS}/mlp/wo", form="in_out"),
]


def read_gpt_2(fields: Fields, present: Present) -> ModelConfig:
    for name, value in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        fields.only(name, value)
    fields.only("add_cross_attention", False)
    width, heads = fields.integer("n_embd"), fields.integer("n_head")
    return ModelConfig(
        encoder=None,
        decoder=StackConfig(
            num_layers=fields.numbered("n_layer"),
            d_model=width,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // max(heads, 1),
            d_ff=fields.integer("n_inner", 4 * width),
            mlp_activation=fields.activation("activation_function", "gelu_new"),
            mlp_gated=False,
            norm="layernorm",
            norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
            use_bias=True,
            positions="learned",
            max_positions=fields.integer("n_positions", 1024),
            dropout_rate=fields.number("resid_pdrop", 0.1),
        ),
        vocab_size=fields.integer("vocab_size"),
        **TIED_LM,
    )


def write_gpt_2(model: ModelConfig) -> Values:
    stack = model.decoder
    assert stack is not None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": stack.d_model,
        "n_head": stack.num_heads,
        "n_inner": stack.d_ff,
        "n_layer": stack.num_layers,
        "n_positions": stack.max_positions,
        "activation_function": activation_name(stack.mlp_activation, tanh="gelu_new"),
        "layer_norm_epsilon": stack.norm_epsilon,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), stack.dropout_rate),
        "tie_word_embeddings": True,
        "vocab_size": model.vocab_size,
    }


GPT_2 = Family(
    model_type="gpt2",
    presets=(presets.gpt_2,),
    rules=_RULES,
    read=read_gpt_2,
    write=write_gpt_2,
    special_tokens=SpecialTokens(pad=None, start=50256, eos=50256),
    architecture="decoder",
    token_tables=("transformer.wte.weight",),
    prefix="transformer.",
)
