"""T5, mT5 and umT5: config.json to ModelConfig and back."""

from __future__ import annotations

import dataclasses

from t5x_like.config.errors import DataError
from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.interop.huggingface.fields import ACTIVATIONS, Fields
from t5x_like.interop.huggingface.settings.common import Present, Values, activation_name


def read_t5(fields: Fields, present: Present) -> ModelConfig:
    kind = fields.values["model_type"]
    projection = str(fields.values.get("feed_forward_proj", "relu"))
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
        relative_bias_per_layer=kind == "umt5",
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
        # umT5 was trained without; transformers 5 scales it all the same.
        scale_logits=scaled if kind == "t5" else False,
    )


def write_t5(model: ModelConfig, kind: str) -> Values:
    encoder, decoder = model.encoder, model.decoder
    assert encoder is not None and decoder is not None
    activation = activation_name(encoder.mlp_activation, tanh="gelu" if encoder.mlp_gated else "gelu_new")
    if encoder.mlp_gated and encoder.mlp_activation == "gelu":
        raise DataError("a gated MLP with GELU by the error function has no name in T5's config.json")
    return {
        "architectures": [{"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}[kind] + "ForConditionalGeneration"],
        "is_encoder_decoder": True,
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
