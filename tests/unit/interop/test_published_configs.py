"""Fields of config.json as transformers 4 wrote them for published models, which describe the presets."""

import dataclasses

import pytest

from t5x_like.errors import DataError
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.family_matching import model_of_config
from t5x_like.models import presets

T5 = {"model_type": "t5", "d_kv": 64, "decoder_start_token_id": 0, "dropout_rate": 0.1, "initializer_factor": 1.0}
T5 |= {
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-6,
    "n_positions": 512,
    "output_past": True,
    "use_cache": True,
}
T5 |= {"relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "vocab_size": 32128}
T5_BASE = T5 | {"d_model": 768, "num_heads": 12, "num_layers": 12, "num_decoder_layers": 12, "n_positions": 4096}
LLAMA = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
LLAMA |= {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA |= {"num_hidden_layers": 32, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
MISTRAL = {name: value for name, value in LLAMA.items() if name not in ("attention_bias", "mlp_bias", "pretraining_tp")}
MISTRAL |= {"rope_theta": 1_000_000.0, "sliding_window": None, "initializer_range": 0.02}
QWEN = {"hidden_act": "silu", "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
QWEN |= {"use_sliding_window": False, "attention_dropout": 0.0, "vocab_size": 151_936, "torch_dtype": "bfloat16"}
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "rms_norm_eps": 1e-6, "attention_bias": False}
GEMMA_2 = GEMMA | {"hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}
BERT = {"hidden_act": "gelu", "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "hidden_size": 768}
BERT |= {
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "position_embedding_type": "absolute",
}
BERT |= {"initializer_range": 0.02, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "type_vocab_size": 2}
ROBERTA = BERT | {"layer_norm_eps": 1e-5, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
BART = {"activation_function": "gelu", "activation_dropout": 0.1, "add_bias_logits": False, "dropout": 0.1}
BART |= {"is_encoder_decoder": True, "max_position_embeddings": 1024, "normalize_embedding": True, "pad_token_id": 1}
BART |= {"static_position_embeddings": False, "num_hidden_layers": 6, "scale_embedding": False, "init_std": 0.02}

CONFIGS = {
    "t5-small": (
        T5 | {"d_model": 512, "d_ff": 2048, "num_heads": 8, "num_layers": 6, "task_specific_params": {"summary": {}}},
        presets.t5_1_0("small"),
    ),
    "t5-v1_1-base": (
        T5_BASE | {"d_ff": 2048, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        presets.t5_1_1("base"),
    ),
    "long-t5-tglobal-base": (
        T5_BASE | {
            "model_type": "longt5", "d_ff": 2048, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new",
            "is_gated_act": True, "encoder_attention_type": "transient-global", "global_block_size": 16,
            "local_radius": 127, "tie_word_embeddings": False,
        },
        presets.long_t5("base", block_size=16),
    ),
    "switch-base-8": (
        T5_BASE | {
            "model_type": "switch_transformers", "d_ff": 3072, "add_router_probs": False, "decoder_sparse_step": 2,
            "encoder_sparse_step": 2, "batch_prioritized_routing": False, "expert_capacity": 64, "num_experts": 8,
            "feed_forward_proj": "relu", "is_gated_act": False, "num_partitions": 1, "num_sparse_decoder_layers": 6,
            "num_sparse_encoder_layers": 6, "router_aux_loss_coef": 0.001, "router_bias": False,
            "router_dtype": "float32", "router_ignore_padding_tokens": False, "router_jitter_noise": 0.01,
            "router_type": "tokens_masked", "router_z_loss_coef": 0.001,
        },
        presets.switch("base"),
    ),
    "Llama-3.1-8B": (
        LLAMA | {
            "vocab_size": 128_256, "max_position_embeddings": 131_072, "rope_theta": 500_000.0,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        },
        presets.llama_3("8b"),
    ),
    "Mistral-7B-v0.3": (MISTRAL | {"model_type": "mistral", "vocab_size": 32_768}, presets.mistral_7b()),
    "Mixtral-8x7B": (
        MISTRAL | {
            "model_type": "mixtral", "vocab_size": 32_000, "num_experts_per_tok": 2, "num_local_experts": 8,
            "output_router_logits": False, "router_aux_loss_coef": 0.02,
        },
        presets.mixtral_8x7b(),
    ),
    "Qwen2.5-0.5B": (
        QWEN | {
            "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
            "num_key_value_heads": 2, "num_hidden_layers": 24, "max_window_layers": 24, "sliding_window": 32_768,
            "use_mrope": False,
        },
        presets.qwen_2_5("0.5b"),
    ),
    "Qwen3-0.6B": (
        QWEN | {
            "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28, "max_window_layers": 28,
            "sliding_window": None, "rope_scaling": None, "attention_bias": False,
        },
        presets.qwen_3("0.6b"),
    ),
    "gemma-2b": (
        GEMMA | {
            "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16_384, "num_attention_heads": 8,
            "num_key_value_heads": 1, "num_hidden_layers": 18, "vocab_size": 256_000, "rope_theta": 10_000.0,
        },
        presets.gemma_1("2b"),
    ),
    "gemma-2-2b": (
        GEMMA_2 | {
            "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8,
            "num_key_value_heads": 4, "num_hidden_layers": 26, "vocab_size": 256_000, "rope_theta": 10_000.0,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        presets.gemma_2("2b"),
    ),
    "gemma-3-1b": (
        GEMMA_2 | {
            "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4,
            "num_key_value_heads": 1, "num_hidden_layers": 26, "vocab_size": 262_144, "rope_theta": 1_000_000,
            "rope_local_base_freq": 10_000, "rope_scaling": None, "query_pre_attn_scalar": 256, "sliding_window": 512,
            "sliding_window_pattern": 6, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        },
        presets.gemma_3("1b"),
    ),
    "gpt2": (
        {
            "model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1,
            "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
            "n_positions": 1024, "summary_activation": None, "summary_first_dropout": 0.1, "summary_type": "cls_index",
            "task_specific_params": {"text-generation": {"do_sample": True}}, "vocab_size": 50_257,
        },
        presets.gpt_2("small"),
    ),
    "bert-base": (
        BERT | {"model_type": "bert", "vocab_size": 30_522, "gradient_checkpointing": False}, presets.bert("base")
    ),
    "roberta-base": (ROBERTA | {"model_type": "roberta", "vocab_size": 50_265}, presets.roberta("base")),
    "xlm-roberta-base": (
        ROBERTA | {"model_type": "xlm-roberta", "vocab_size": 250_002, "output_past": True}, presets.xlm_roberta("base")
    ),
    "deberta-v3-base": (
        {name: value for name, value in BERT.items() if name != "position_embedding_type"} | {
            "model_type": "deberta-v2", "relative_attention": True, "position_buckets": 256, "layer_norm_eps": 1e-7,
            "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p", "type_vocab_size": 0,
            "max_relative_positions": -1, "position_biased_input": False, "vocab_size": 128_100,
        },
        presets.deberta_v3("base"),
    ),
    "ModernBERT-base": (
        {
            "model_type": "modernbert", "attention_bias": False, "classifier_activation": "gelu", "norm_eps": 1e-5,
            "classifier_bias": False, "classifier_pooling": "mean", "decoder_bias": True, "hidden_activation": "gelu",
            "deterministic_flash_attn": False, "global_attn_every_n_layers": 3, "global_rope_theta": 160_000.0,
            "hidden_size": 768, "intermediate_size": 1152, "layer_norm_eps": 1e-5, "local_attention": 128,
            "local_rope_theta": 10_000.0, "mlp_bias": False, "norm_bias": False, "num_attention_heads": 12,
            "num_hidden_layers": 22, "max_position_embeddings": 8192, "sparse_pred_ignore_index": -100,
            "position_embedding_type": "absolute", "sparse_prediction": False, "vocab_size": 50_368,
        },
        presets.modernbert("base"),
    ),
    "EuroBERT-210m": (
        {
            "model_type": "eurobert", "attention_bias": False, "hidden_act": "silu", "hidden_size": 768,
            "intermediate_size": 3072, "num_attention_heads": 12, "num_key_value_heads": 12, "num_hidden_layers": 12,
            "rms_norm_eps": 1e-5, "rope_theta": 250_000, "rope_scaling": None, "mlp_bias": False, "head_dim": 64,
            "pretraining_tp": 1, "vocab_size": 128_256, "mask_token_id": 128_002, "pad_token_id": 128_001,
        },
        presets.eurobert("210m"),
    ),
    "bart-base": (
        BART | {
            "model_type": "bart", "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072, "encoder_attention_heads": 12, "decoder_attention_heads": 12,
            "normalize_before": False, "add_final_layer_norm": False, "vocab_size": 50_265,
        },
        presets.bart("base"),
    ),
    "mbart-large-cc25": (
        BART | {
            "model_type": "mbart", "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12, "encoder_ffn_dim": 4096,
            "decoder_ffn_dim": 4096, "encoder_attention_heads": 16, "decoder_attention_heads": 16,
            "normalize_before": True, "add_final_layer_norm": True, "scale_embedding": True, "vocab_size": 250_027,
        },
        presets.mbart(),
    ),
}  # fmt: skip
"""Configuration and preset by the name of the model on the hub."""


def plain(model):
    """Return a model without what does not decide its outputs, or its config.json does not say."""
    stacks = {}
    for name, stack in model.stacks.items():
        experts = stack.experts and dataclasses.replace(stack.experts, router_aux_loss_weight=0.0)
        scale = stack.head_dim**-0.5 if stack.attention_scale is None else stack.attention_scale
        stacks[name] = dataclasses.replace(
            stack, dropout_rate=0.0, dropout_broadcast_length=False, output_init_scale=1.0, experts=experts,
            layer_pattern=stack.layer_kinds, attention_scale=round(scale, 9),
        )  # fmt: skip
    ids = {"pad_token_id": None, "decoder_start_token_id": 0, "eos_ids": ()}
    ids |= {
        "embedding_stddev": 1.0,
        "head_init_scale": 1.0,
        "tie_embeddings": False,
        "dtype": "float32",
        "remat": "none",
    }
    return dataclasses.replace(model, **stacks, **ids)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_transformers_4_wrote_describe_the_preset(name):
    config, model = CONFIGS[name]
    # What the tensors tell is given by the classes of a model that is not tied.
    named = config | {"architectures": ["ForMaskedLM" if model.architecture == "encoder" else "ForCausalLM"]}
    assert plain(model_of_config(Fields(named, "config.json"))) == plain(model)


@pytest.mark.parametrize("number", [0, 5, 13])
def test_numbers_of_layers_with_experts_that_are_no_divisor_are_refused(number):
    config, _ = CONFIGS["switch-base-8"]
    named = config | {"architectures": ["ForCausalLM"], "num_sparse_decoder_layers": number}
    with pytest.raises(DataError, match=f"num_sparse_decoder_layers: found {number}, expected a divisor of the 12"):
        model_of_config(Fields(named, "config.json"))
