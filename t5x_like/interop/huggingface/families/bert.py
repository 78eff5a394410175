"""BERT, and what DeBERTa and ModernBERT share with it."""

from __future__ import annotations

from typing import Any

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
from t5x_like.interop.huggingface.weight_map import Rule, dense_rules, norm_rules, table_rule
from t5x_like.models import presets

TOKENS = SpecialTokens(pad=0, start=0, eos=1)
LAYER_NORM_RENAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
"""Names of the norms in old files, and the present ones."""


def bert_rules(prefix: str, projections: tuple[str, str, str]) -> list[Rule]:
    """Return the rules of BERT and DeBERTa; `projections`: names of query, key and value projection."""
    layer, layers = f"{prefix}.encoder.layer.{{layer}}", "encoder/layers"
    rules = [
        table_rule(f"{prefix}.embeddings.word_embeddings.weight", "token_embedder"),
        table_rule(f"{prefix}.embeddings.position_embeddings.weight", "encoder/position_embedder"),
        table_rule(f"{prefix}.embeddings.token_type_embeddings.weight", "encoder/token_type_embedder"),
        *norm_rules(f"{prefix}.embeddings.LayerNorm", "encoder/embedding_norm"),
        *dense_rules(f"{layer}.attention.output.dense", f"{layers}/self_attention/out", inputs=2),
        *norm_rules(f"{layer}.attention.output.LayerNorm", f"{layers}/self_attention_norm"),
        *dense_rules(f"{layer}.intermediate.dense", f"{layers}/mlp/wi"),
        *dense_rules(f"{layer}.output.dense", f"{layers}/mlp/wo"),
        *norm_rules(f"{layer}.output.LayerNorm", f"{layers}/mlp_norm"),
        *dense_rules("cls.predictions.transform.dense", "head/transform"),
        *norm_rules("cls.predictions.transform.LayerNorm", "head/transform_norm"),
        Rule("cls.predictions.bias", ("head/bias",)),
    ]
    for name, part in zip(projections, ("query", "key", "value"), strict=True):
        rules += dense_rules(f"{layer}.attention.self.{name}", f"{layers}/self_attention/{part}")
    return rules


def bert_model(stack: StackConfig, fields: Fields, present: Present) -> ModelConfig:
    masked_lm = {"lm_head_transform": present.masked_lm, "head_bias": present.masked_lm}
    return ModelConfig(
        encoder=stack,
        decoder=None,
        vocab_size=fields.integer("vocab_size"),
        embedding_norm=True,
        **(TIED_LM | masked_lm),
    )


def read_bert_stack(fields: Fields, **more: Any) -> StackConfig:
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    values: dict[str, Any] = {
        "num_layers": fields.numbered("num_hidden_layers"),
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // max(heads, 1),
        "d_ff": fields.integer("intermediate_size"),
        "mlp_activation": fields.activation("hidden_act", "gelu"),
        "mlp_gated": False,
        "norm": "layernorm",
        "norm_placement": "post",
        "use_bias": True,
        "dropout_rate": fields.number("hidden_dropout_prob", 0.1),
    }
    return StackConfig(**(values | more))


def write_encoder(model: ModelConfig, name: str) -> Values:
    stack = model.encoder
    assert stack is not None
    return {
        "architectures": [f"{name}ForMaskedLM" if model.lm_head_transform else f"{name}Model"],
        "hidden_size": stack.d_model,
        "num_attention_heads": stack.num_heads,
        "num_hidden_layers": stack.num_layers,
        "intermediate_size": stack.d_ff,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": True,
    }


def write_dropout(stack: StackConfig) -> Values:
    return dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), stack.dropout_rate)


def read_bert(fields: Fields, present: Present) -> ModelConfig:
    fields.only("is_decoder", False)
    fields.only("position_embedding_type", "absolute")
    stack = read_bert_stack(
        fields,
        positions="learned",
        max_positions=fields.integer("max_position_embeddings", 512),
        num_token_types=fields.integer("type_vocab_size", 2),
        norm_epsilon=fields.number("layer_norm_eps", 1e-12),
    )
    return bert_model(stack, fields, present)


def write_bert(model: ModelConfig) -> Values:
    stack = model.encoder
    assert stack is not None
    return {
        **write_encoder(model, "Bert"),
        **write_dropout(stack),
        "hidden_act": activation_name(stack.mlp_activation, tanh="gelu_new"),
        "max_position_embeddings": stack.max_positions,
        "type_vocab_size": stack.num_token_types,
        "layer_norm_eps": stack.norm_epsilon,
        # transformers 5 has no other kind and no such field, which CTranslate2 reads.
        "position_embedding_type": "absolute",
    }


BERT = Family(
    model_type="bert",
    presets=(presets.bert, presets.bert_base),
    rules=bert_rules("bert", ("query", "key", "value")),
    read=read_bert,
    write=write_bert,
    special_tokens=TOKENS,
    architecture="encoder",
    token_tables=("bert.embeddings.word_embeddings.weight",),
    lm_head="cls.predictions.decoder.weight",
    masked_lm_head="cls.predictions.transform.dense.weight",
    head_bias_copy="cls.predictions.decoder.bias",
    prefix="bert.",
    head_pattern=r"(cls|classifier)\.",
    unused_pattern=r"bert\.pooler\..*|cls\.seq_relationship\..*",
    renames=LAYER_NORM_RENAMES,
)
