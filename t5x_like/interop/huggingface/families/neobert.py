"""NeoBERT: a stack of Llama's build that attends in both directions.

transformers has no class for it: its repository on the hub holds the code (`trust_remote_code`).
"""

from __future__ import annotations

from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.errors import DataError
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families.bert import TOKENS
from t5x_like.interop.huggingface.families.family import Family, Present, Values
from t5x_like.interop.huggingface.weight_map import Rule, dense_rules, norm_rules, table_rule
from t5x_like.models import presets

_LAYER, _PARAMS = "model.transformer_encoder.{layer}", "encoder/layers"
_PROJECTIONS = tuple(f"{_PARAMS}/self_attention/{name}/kernel" for name in ("query", "key", "value"))
_RULES = [
    table_rule("model.encoder.weight", "token_embedder"),
    Rule(f"{_LAYER}.qkv.weight", _PROJECTIONS, "by_head"),
    *dense_rules(f"{_LAYER}.wo", f"{_PARAMS}/self_attention/out", inputs=2),
    *dense_rules(f"{_LAYER}.ffn.w12", (f"{_PARAMS}/mlp/wi_0", f"{_PARAMS}/mlp/wi_1")),
    *dense_rules(f"{_LAYER}.ffn.w3", f"{_PARAMS}/mlp/wo"),
    *norm_rules(f"{_LAYER}.attention_norm", f"{_PARAMS}/self_attention_norm"),
    *norm_rules(f"{_LAYER}.ffn_norm", f"{_PARAMS}/mlp_norm"),
    *norm_rules("model.layer_norm", "encoder/final_norm"),
    Rule("decoder.weight", ("head/kernel",), "out_in"),
    Rule("decoder.bias", ("head/bias",)),
]
_REPOSITORY = "chandar-lab/NeoBERT--model."
"""Repository and module of the code on the hub."""
_MULTIPLE = 8


def _width(intermediate_size: int) -> int:
    """Return the width of the gated MLP: two thirds of `intermediate_size`, rounded up to a multiple of 8."""
    return -(-(2 * intermediate_size // 3) // _MULTIPLE) * _MULTIPLE


def read_neobert(fields: Fields, present: Present) -> ModelConfig:
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = width // max(heads, 1)
    fields.only("dim_head", head_dim)
    for name, only in (("rms_norm", True), ("rope", True), ("hidden_act", "SwiGLU"), ("ngpt", False)):
        fields.only(name, only)
    # Initial values, and what the training script recorded.
    fields.unused("embedding_init_range", "decoder_init_range", "classifier_init_range", "base_scale", "kwargs")
    fields.unused("flash_attention")
    return ModelConfig(
        encoder=StackConfig(
            num_layers=fields.numbered("num_hidden_layers"),
            d_model=width,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            d_ff=_width(fields.integer("intermediate_size")),
            mlp_activation="silu",
            norm_epsilon=fields.number("norm_eps", 1e-6),
            positions="rope",
            dropout_rate=fields.number("dropout", 0.0),
        ),
        decoder=None,
        vocab_size=fields.integer("vocab_size"),
        tie_embeddings=not present.head,
        embedding_stddev=0.02,
        head_bias=present.head,
    )


def write_neobert(model: ModelConfig) -> Values:
    stack = model.encoder
    assert stack is not None
    if stack.d_ff % _MULTIPLE:
        raise DataError(f"NeoBERT's MLP has a width that is a multiple of {_MULTIPLE}")
    classes = {"AutoConfig": "NeoBERTConfig", "AutoModel": "NeoBERT", "AutoModelForMaskedLM": "NeoBERTLMHead"}
    return {
        "architectures": ["NeoBERTLMHead"],
        "auto_map": {auto: _REPOSITORY + name for auto, name in classes.items()},
        "hidden_size": stack.d_model,
        "num_attention_heads": stack.num_heads,
        "num_hidden_layers": stack.num_layers,
        "intermediate_size": stack.d_ff * 3 // 2,
        "norm_eps": stack.norm_epsilon,
        "dropout": stack.dropout_rate,
        "vocab_size": model.vocab_size,
    }


NEOBERT = Family(
    model_type="neobert",
    presets=(presets.neobert,),
    rules=_RULES,
    read=read_neobert,
    write=write_neobert,
    special_tokens=TOKENS,
    architecture="encoder",
    token_tables=("model.encoder.weight",),
    lm_head="decoder.weight",
    prefix="model.",
    head_pattern=r"(decoder|classifier)\.",
)
