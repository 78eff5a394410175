"""Small models of every kind, and batches for them, shared by the tests of models."""

import dataclasses
import functools

import jax
import numpy as np

from t5x_like.config.model import ModelConfig, StackConfig
from t5x_like.models.build import abstract, build, merge

VOCABULARY = 61


def stack(**changes) -> StackConfig:
    base = StackConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48)
    return dataclasses.replace(base, **changes)


def model(architecture: str, positions: str = "relative_bias", *, stack_changes=None, **changes) -> ModelConfig:
    """`architecture` is encoder_decoder, decoder, prefix_lm or encoder."""
    of_stack = stack(positions=positions, max_positions=32, **(stack_changes or {}))
    causal = dataclasses.replace(of_stack, relative_bias_bidirectional=architecture == "prefix_lm")
    return ModelConfig(
        encoder=of_stack if architecture in ("encoder_decoder", "encoder") else None,
        decoder=None if architecture == "encoder" else causal,
        vocab_size=VOCABULARY,
        **changes,
    )


@functools.cache
def parameters(config: ModelConfig, seed: int = 0):
    """Fresh parameters with everything that starts at 0 or 1 moved, so that nothing is without effect."""
    params = jax.jit(lambda: build(config, jax.random.key(seed)))()
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


@functools.cache
def forward(config: ModelConfig):
    """Jitted (params, batch, dropout key or None) -> logits."""
    graphdef = abstract(config).graphdef
    return jax.jit(lambda params, batch, rng=None: merge(graphdef, params)(batch, dropout_rng=rng))


def logits(config: ModelConfig, batch):
    return np.asarray(forward(config)(parameters(config), batch))


def tokens(seed: int, rows: int, length: int):
    return np.random.default_rng(seed).integers(1, VOCABULARY, (rows, length)).astype(np.int32)
