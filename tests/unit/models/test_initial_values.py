"""Initial values of parameters: the fields that scale them change these parameters and no others."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np

from t5x_like.config import ModelConfig, MoEConfig, StackConfig
from t5x_like.models.factory import init_params
from t5x_like.utils.tree_paths import by_path

STACK = StackConfig(num_layers=2, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32)
EXPERTS = dataclasses.replace(STACK, experts=MoEConfig(num_experts=4))


def test_fields_scale_embeddings_head_and_what_is_added_to_the_states() -> None:
    plain = ModelConfig(encoder=STACK, decoder=EXPERTS, vocab_size=64, tie_embeddings=False)
    encoder, decoder = (dataclasses.replace(stack, output_init_scale=0.25) for stack in (STACK, EXPERTS))
    stddev = plain.embedding_stddev / 4
    scaled = dataclasses.replace(plain, encoder=encoder, decoder=decoder, head_init_scale=0.5, embedding_stddev=stddev)
    before, after = (
        by_path(jax.jit(lambda config=config: init_params(config, jax.random.key(0)))()) for config in (plain, scaled)
    )
    factors = {r"token_embedder/.*": 0.25, r"head/.*": 0.5, r".*attention/out/kernel|.*mlp/wo(/kernel)?": 0.25}
    found = set()
    for path, values in before.items():
        factor = next((factors[pattern] for pattern in factors if re.fullmatch(pattern, path)), 1.0)
        # Powers of two: the same random numbers, scaled without rounding.
        np.testing.assert_array_equal(after[path], factor * np.asarray(values), err_msg=path)
        found.add(factor)
    assert found == {0.25, 0.5, 1.0}
