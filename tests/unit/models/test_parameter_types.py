"""Parameters in bfloat16: the model computes what it computes from the same values in float32, and so do gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_examples import EXAMPLES, model, parameters, tokens

from t5x_like.config.model import ModelConfig
from t5x_like.models.factory import abstract_model, bind_params
from t5x_like.training.stochastic_rounding import widened
from t5x_like.utils import tree_paths

ONE_LAYER = {"num_layers": 1, "layer_pattern": ("local",), "sliding_window": (3, 3)}
GEMMA = EXAMPLES["local"]
MODELS = {
    "relative bias": model("encoder_decoder", stack_changes={"num_layers": 1}, tie_embeddings=True),
    "scale plus one": dataclasses.replace(GEMMA, decoder=dataclasses.replace(GEMMA.decoder, **ONE_LAYER)),
}


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_float32(name: str) -> None:
    config: ModelConfig = MODELS[name]
    graphdef = abstract_model(config).graphdef
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters(config))
    length = 40
    batch = {f"{stack}_input_tokens": tokens(number, 4, length) for number, stack in enumerate(config.stacks)}
    if config.encoder is not None:
        batch["encoder_segment_ids"] = np.ones((4, length), np.int32)
    targets = tokens(5, *next(reversed(batch.values())).shape)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits = bind_params(graphdef, params)(batch)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1))

    found, gradients = loss(params)
    expected, exact = loss(widened(params))
    assert found == expected
    exact = tree_paths.by_path(exact)
    for path, gradient in tree_paths.by_path(gradients).items():
        assert gradient.dtype == jnp.bfloat16, path
        # Each use of a parameter rounds its sum once. A sum in bfloat16 would be wrong by several percent: it stops
        # growing where a term is less than 0.4 % of it.
        error = np.max(np.abs(np.asarray(gradient, np.float64) - np.asarray(exact[path], np.float64)))
        assert error <= 2.0**-7 * np.max(np.abs(exact[path])), path
