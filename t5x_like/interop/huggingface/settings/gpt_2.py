"""GPT-2: config.json to ModelConfig and back."""

from __future__ import annotations

from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.interop.huggingface.fields import Fields
from t5x_like.interop.huggingface.settings.common import TIED_LM, Present, Values, activation_name


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


def write_gpt_2(model: ModelConfig, kind: str) -> Values:
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
