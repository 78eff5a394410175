"""Decoding with the cache gives the logits of the forward pass, for prompts of unequal lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_examples import EXAMPLES, forward, model, parameters, tokens

from t5x_like.models.factory import abstract_model, bind_params

ROWS, PROMPT, LENGTH = 3, 5, 9
PROMPT_LENGTHS = np.array([5, 1, 3])


def decoded(config, rows, encoder_tokens, *, bidirectional):
    """Return logits [B, LENGTH, V] of `rows`, the prompt at once and the rest one by one; prompts are padded on the
    right, so that the rows' tokens are in different slots."""
    spec, params = abstract_model(config), parameters(config)

    @jax.jit
    def start(params):
        model = bind_params(spec.graphdef, params)
        encoded = valid = None
        if config.encoder is not None:
            valid = (encoder_tokens != 0).astype(jnp.int32)
            encoded = model.encode(encoder_tokens)
        cache = model.start_decoding(encoded, valid, ROWS, LENGTH)
        prompt = np.where(np.arange(PROMPT) < PROMPT_LENGTHS[:, None], rows[:, :PROMPT], 0)
        return model.prefill(prompt, jnp.array(PROMPT_LENGTHS), cache, bidirectional=bidirectional, all_logits=True)

    @jax.jit
    def step(params, token, live, cache):
        return bind_params(spec.graphdef, params).decode(token, cache, counts_B=live)

    out, cache = start(params)
    found = np.zeros((ROWS, LENGTH, out.shape[-1]), np.float32)
    for row, length in enumerate(PROMPT_LENGTHS):
        found[row, :length] = out[row, :length]
    for count in range(LENGTH - 1):
        position = PROMPT_LENGTHS + count
        live = position < LENGTH
        column = np.minimum(position, LENGTH - 1)
        out, cache = step(params, rows[np.arange(ROWS), column][:, None], live.astype(np.int32), cache)
        for row in np.flatnonzero(live):
            found[row, column[row]] = out[row, 0]
    return found


@pytest.mark.parametrize(
    ("architecture", "positions"),
    [
        ("encoder_decoder", "relative_bias"),
        ("encoder_decoder", "learned"),
        ("decoder", "rope"),
        ("decoder", "none"),
        ("prefix_lm", "rope"),
        ("prefix_lm", "relative_bias"),
    ],
)
def test_decoding_with_the_cache_equals_the_forward_pass(architecture, positions):
    assert_decodes(model(architecture, positions), prefix=architecture == "prefix_lm")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_decoding_with_family_features_equals_the_forward_pass(name):
    assert_decodes(EXAMPLES[name], prefix="prefix" in name)


def assert_decodes(config, *, prefix):
    rows = tokens(0, ROWS, LENGTH)
    rows[:, 0] = 0
    batch = {"decoder_input_tokens": rows}
    encoder_tokens = tokens(1, ROWS, 7)
    encoder_tokens[1, 4:] = 0
    if config.encoder is not None:
        batch["encoder_input_tokens"] = encoder_tokens
    if prefix:
        batch["decoder_causal_attention"] = (np.arange(LENGTH) < PROMPT_LENGTHS[:, None]).astype(np.int32)
    expected = forward(config)(parameters(config), batch)
    found = decoded(config, rows, encoder_tokens, bidirectional=prefix)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_cache_can_be_traced_without_allocating_arrays():
    config = model("encoder_decoder", dtype="bfloat16")
    spec = abstract_model(config)

    def start(params):
        model = bind_params(spec.graphdef, params)
        return model.init_cache(2, 10, encoder_length=7), model.start_decoding(jnp.zeros((2, 7, 32)), None, 2, 10)

    empty, ready = jax.eval_shape(start, spec.params)
    assert empty == ready
    assert [slots.keys.shape for slots in empty.layers] == [(2, 2, 11, 8)] * 2
    assert [slots.keys.shape for slots in empty.cross] == [(2, 2, 7, 8)] * 2
    assert empty.layers[0].keys.dtype == jnp.bfloat16 and empty.layers[0].key_scales is None
