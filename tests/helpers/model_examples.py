"""Small models of every kind, and batches for them, shared by the tests of models."""

import dataclasses
import functools

import jax
import numpy as np

from t5x_like.config.model import ModelConfig, MoEConfig, RopeScalingConfig, StackConfig
from t5x_like.models.factory import abstract_model, bind_params, init_params

VOCABULARY = 61


def stack(**changes) -> StackConfig:
    base = StackConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48)
    return dataclasses.replace(base, **changes)


def model(architecture: str, positions: str = "relative_bias", *, stack_changes=None, **changes) -> ModelConfig:
    """Return a small model; `architecture` is encoder_decoder, decoder, prefix_lm or encoder."""
    of_stack = stack(positions=positions, max_positions=32, **(stack_changes or {}))
    causal = dataclasses.replace(of_stack, relative_bias_bidirectional=architecture == "prefix_lm")
    return ModelConfig(
        encoder=of_stack if architecture in ("encoder_decoder", "encoder") else None,
        decoder=None if architecture == "encoder" else causal,
        vocab_size=VOCABULARY,
        **changes,
    )


GEMMA = {
    "layer_pattern": ("local", "global"),
    "sliding_window": (3, 3),
    "norm_placement": "both",
    "norm_scale_plus_one": True,
}
GEMMA |= {
    "local_rope_base": 100.0,
    "attention_softcap": 2.0,
    "rope_scaling": RopeScalingConfig(kind="linear", factor=2.0),
}


def _merged() -> ModelConfig:
    config = model("encoder_decoder", "rope", stack_changes=GEMMA | {"qk_norm": True}, tie_embeddings=True)
    decoder = dataclasses.replace(config.decoder, cross_attention="merged")
    return dataclasses.replace(
        config, decoder=decoder, scale_embeddings=True, unscaled_embedding_token_id=7, logits_softcap=3.0
    )


def _unequal() -> ModelConfig:
    config = model("encoder_decoder", "rope", stack_changes=GEMMA, tie_embeddings=True)
    encoder = dataclasses.replace(config.encoder, d_model=24, num_layers=3, sliding_window=(2, 1))
    return dataclasses.replace(config, encoder=encoder, separate_encoder_embeddings=True)


def _blocks() -> ModelConfig:
    changes = {"layer_pattern": ("local",), "sliding_window": (1, 1), "global_block_size": 2}
    config = model("encoder_decoder", "relative_bias")
    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **changes))


SOME_EXPERTS = MoEConfig(num_experts=3, experts_per_token=1, layer_period=2, normalize_weights=False)
GATED = {
    "norm": "layernorm",
    "norm_placement": "sub",
    "norm_parameters": False,
    "use_bias": True,
    "mlp_bias": False,
    "attention_gate": True,
    "depth_weights": True,
}

EXAMPLES: dict[str, ModelConfig] = {
    "merged": _merged(),
    "unequal": _unequal(),
    "per-layer bias": model("encoder_decoder", stack_changes={"relative_bias_per_layer": True}),
    "local": model("decoder", "rope", stack_changes=GEMMA),
    "local prefix": model("prefix_lm", "rope", stack_changes=GEMMA),
    "experts": model("decoder", "rope", stack_changes={"experts": MoEConfig(num_experts=3)}),
    "some experts": model(
        "decoder", "rope", stack_changes={"experts": SOME_EXPERTS, "num_layers": 4, "mlp_gated": False}
    ),
    "gated prefix": model("prefix_lm", "rope", stack_changes=GATED),
    "blocks": _blocks(),
    "first layer": model(
        "encoder_decoder", "rope", stack_changes={"norm": "layernorm", "first_layer_attention_norm": False}
    ),
    "disentangled": model(
        "decoder",
        "disentangled",
        stack_changes={"relative_bias_buckets": 4, "relative_bias_max_distance": 12, "num_token_types": 2},
    ),
}
"""Models with the features that some family needs and T5 lacks."""


@functools.cache
def parameters(config: ModelConfig, seed: int = 0):
    """Return new parameters with all that start at 0 or 1 moved, so that each has an effect."""
    params = jax.jit(lambda: init_params(config, jax.random.key(seed)))()
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


@functools.cache
def forward(config: ModelConfig):
    """Return the jitted function (params, batch, dropout key or None) -> logits."""
    graphdef = abstract_model(config).graphdef
    return jax.jit(lambda params, batch, rng=None: bind_params(graphdef, params)(batch, dropout_rng=rng))


def logits(config: ModelConfig, batch):
    return np.asarray(forward(config)(parameters(config), batch))


def tokens(seed: int, rows: int, length: int):
    return np.random.default_rng(seed).integers(1, VOCABULARY, (rows, length)).astype(np.int32)
