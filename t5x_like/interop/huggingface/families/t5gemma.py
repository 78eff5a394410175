"""T5Gemma and T5Gemma 2 for text: encoder-decoders of Gemma blocks."""

from __future__ import annotations

import dataclasses

from t5x_like.config.model import ModelConfig
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.families.family import Family, Present, Values
from t5x_like.interop.huggingface.families.gemma import (
    GEMMA_MODEL,
    TOKENS,
    causal_window,
    read_gemma_2_stack,
    read_gemma_3_stack,
    write_gemma_2_stack,
    write_gemma_3_stack,
)
from t5x_like.interop.huggingface.families.rotary_stack import PROJECTIONS, rotary_stack_rules
from t5x_like.interop.huggingface.weight_map import Rule, attention_rules, head_rule, table_rule
from t5x_like.models import presets

_NORMS = {
    "self_attention_norm": "pre_self_attn_layernorm",
    "self_attention_post_norm": "post_self_attn_layernorm",
    "cross_attention_norm": "pre_cross_attn_layernorm",
    "cross_attention_post_norm": "post_cross_attn_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_T5GEMMA_RULES = [
    table_rule("model.encoder.embed_tokens.weight", "encoder_token_embedder"),
    table_rule("model.decoder.embed_tokens.weight", "token_embedder"),
    head_rule("lm_head.out_proj.weight"),
    *rotary_stack_rules("model.encoder", "encoder", _NORMS),
    *rotary_stack_rules("model.decoder", "decoder", _NORMS),
    *attention_rules("model.decoder.layers.{layer}.cross_attn", "decoder/layers/cross_attention", PROJECTIONS),
]
_T5GEMMA_2_RULES = [
    table_rule("model.encoder.embed_tokens.weight", "token_embedder"),
    Rule("model.encoder.embed_tokens.eoi_embedding", ("unscaled_embedding",)),
    head_rule("lm_head.out_proj.weight"),
    *rotary_stack_rules("model.encoder", "encoder", _NORMS),
    *rotary_stack_rules("model.decoder", "decoder", _NORMS),
]


def read_t5gemma(fields: Fields, present: Present) -> ModelConfig:
    encoder, decoder = fields.part("encoder"), fields.part("decoder")
    encoder.unused("final_logit_softcapping")
    decoder.unused("cross_attention_hidden_size")
    window = encoder.integer("sliding_window", 4096)
    return ModelConfig(
        encoder=dataclasses.replace(read_gemma_2_stack(encoder), sliding_window=(window, window)),
        decoder=read_gemma_2_stack(decoder),
        vocab_size=decoder.integer("vocab_size"),
        separate_encoder_embeddings=True,
        logits_softcap=decoder.optional("final_logit_softcapping", 30.0),
        **(GEMMA_MODEL | {"tie_embeddings": not present.head}),
    )


def write_t5gemma(model: ModelConfig) -> Values:
    encoder, decoder = model.encoder, model.decoder
    assert encoder is not None and decoder is not None
    shared = {"model_type": "t5_gemma_module", "vocab_size": model.vocab_size, "tie_word_embeddings": True}
    encoder_fields = write_gemma_2_stack(encoder, 4096 if encoder.sliding_window is None else encoder.sliding_window[0])
    decoder_fields = write_gemma_2_stack(decoder, causal_window(decoder))
    cap = {"final_logit_softcapping": model.logits_softcap}
    return {
        "architectures": ["T5GemmaForConditionalGeneration"],
        "is_encoder_decoder": True,
        "encoder": {**shared, **encoder_fields, **cap},
        "decoder": {
            **shared,
            **decoder_fields,
            **cap,
            "is_decoder": True,
            "cross_attention_hidden_size": encoder.d_model,
        },
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": model.vocab_size,
    }


def read_t5gemma_2(fields: Fields, present: Present) -> ModelConfig:
    encoder, decoder = fields.part("encoder").part("text_config"), fields.part("decoder")
    width = encoder.integer("sliding_window", 4096)
    return ModelConfig(
        encoder=read_gemma_3_stack(encoder, sliding_window=((width + 1) // 2 - 1, width // 2)),
        decoder=read_gemma_3_stack(decoder, cross_attention="merged"),
        vocab_size=decoder.integer("vocab_size"),
        unscaled_embedding_token_id=fields.integer(
            "eoi_token_index", fields.part("encoder").integer("eoi_token_index", 256_000)
        ),
        logits_softcap=decoder.optional("final_logit_softcapping"),
        **(GEMMA_MODEL | {"tie_embeddings": not present.head}),
    )


def write_t5gemma_2(model: ModelConfig) -> Values:
    encoder, decoder = model.encoder, model.decoder
    assert encoder is not None and decoder is not None
    width = 4096 if encoder.sliding_window is None else encoder.sliding_window[0] + encoder.sliding_window[1] + 1
    cap = {"final_logit_softcapping": model.logits_softcap, "vocab_size": model.vocab_size}
    return {
        "architectures": ["T5Gemma2ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "encoder": {
            "model_type": "t5gemma2_encoder",
            "text_config": {"model_type": "t5gemma2_text", **write_gemma_3_stack(encoder, width), **cap},
            "eoi_token_index": model.unscaled_embedding_token_id,
        },
        "decoder": {"model_type": "t5gemma2_decoder", **write_gemma_3_stack(decoder, causal_window(decoder)), **cap},
        "eoi_token_index": model.unscaled_embedding_token_id,
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": model.vocab_size,
    }


T5GEMMA = Family(
    model_type="t5gemma",
    presets=(presets.t5gemma,),
    rules=_T5GEMMA_RULES,
    read=read_t5gemma,
    write=write_t5gemma,
    special_tokens=TOKENS,
    architecture="encoder_decoder",
    token_tables=("model.decoder.embed_tokens.weight",),
    lm_head="lm_head.out_proj.weight",
)
T5GEMMA_2 = Family(
    model_type="t5gemma2",
    presets=(presets.t5gemma_2,),
    rules=_T5GEMMA_2_RULES,
    read=read_t5gemma_2,
    write=write_t5gemma_2,
    special_tokens=TOKENS,
    architecture="encoder_decoder",
    token_tables=("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
    lm_head="lm_head.out_proj.weight",
    unused_pattern=r"model\.encoder\.(vision_tower|multi_modal_projector)\..*",
    missing_note="a vision tower, which transformers reports as missing: it has no text-only T5Gemma 2",
)
