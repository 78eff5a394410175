"""LTG-BERT and GPT-BERT against their definition, written in NumPy from the published code, in float64."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from t5x_like.models import presets
from t5x_like.models.factory import abstract_model, bind_params, init_params
from t5x_like.utils import tree_paths

LENGTH, VOCABULARY = 14, 40


def small(model):
    """Return a model of four buckets and two layers, which distances of the rows exceed."""
    (name, stack), *_ = model.stacks.items()
    stack = dataclasses.replace(
        stack, num_layers=2, d_model=24, num_heads=3, num_kv_heads=3, head_dim=8, d_ff=20,
        relative_bias_buckets=4, relative_bias_max_distance=LENGTH, attention_scale=(3 * 8) ** -0.5,
    )  # fmt: skip
    return dataclasses.replace(model, vocab_size=VOCABULARY, **{name: stack})


def norm(x, epsilon, scale=1.0, bias=0.0):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + epsilon) * scale + bias


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bucket(distance, buckets, farthest):
    """Return the row of the table of relative positions for query position - key position."""
    middle = buckets // 2
    if abs(distance) <= middle:
        return distance + buckets
    ratio = math.log(abs(distance) / middle) / math.log((farthest - 1) / middle)
    return int(math.copysign(math.ceil(ratio * (middle - 1)) + middle, distance)) + buckets


def reference(config, params, tokens, visible):
    """Return the logits of one row; `visible` [L, L] says which keys each query sees."""
    (name, stack), *_ = config.stacks.items()
    is_gpt = name == "decoder"
    p = {path: np.asarray(leaf, np.float64) for path, leaf in tree_paths.by_path(params).items()}
    heads, length, epsilon = stack.num_heads, len(tokens), stack.norm_epsilon
    rows = np.array(
        [
            [bucket(q - k, stack.relative_bias_buckets, stack.relative_bias_max_distance) for k in range(length)]
            for q in range(length)
        ]
    )
    of_distance = norm(
        p[f"{name}/distance_embedder/embedding"],
        epsilon,
        p[f"{name}/distance_norm/scale"],
        p[f"{name}/distance_norm/bias"],
    )[rows]
    x = norm(p["token_embedder/embedding"][tokens], epsilon)
    states, weights = [x], list(p.get(f"{name}/depth_weights", []))

    def deep(x):
        if not is_gpt:
            return x
        states.append(x)
        return sum(weights.pop(0) * state for state in list(states))

    for number in range(stack.num_layers):
        layer = {path.removeprefix(f"{name}/layers/"): leaf[number] for path, leaf in p.items() if "/layers/" in path}

        def dense(x, part, layer=layer):
            kernel = layer[f"{part}/kernel"]
            return np.tensordot(x, kernel, x.shape[-1] == kernel.shape[0] or 2) + layer.get(f"{part}/bias", 0.0)

        inner = norm(x, epsilon)
        query, key, value = (dense(inner, f"self_attention/{part}") for part in ("query", "key", "value"))
        key_of_distance, query_of_distance = (dense(of_distance, f"self_attention/{part}") for part in ("key", "query"))
        scores = np.einsum("qhx,khx->hqk", query, key)
        scores += np.einsum("qhx,qkhx->hqk", query, key_of_distance)
        scores += np.einsum("khx,qkhx->hqk", key, query_of_distance)
        scores = np.where(visible, scores / math.sqrt(3 * stack.head_dim), -np.inf)
        probabilities = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khx->qhx", probabilities, value)
        if is_gpt:
            mixed = mixed * gelu(dense(inner, "self_attention/gate"))
            mixed = norm(mixed.reshape(length, -1), epsilon).reshape(length, heads, -1)
            x = deep(x + dense(mixed, "self_attention/out"))
        else:
            scale, bias = (layer[f"self_attention_post_norm/{part}"] for part in ("scale", "bias"))
            x = x + norm(dense(mixed, "self_attention/out"), epsilon, scale, bias)
        inner = norm(x, epsilon)
        hidden = gelu_tanh(inner @ layer["mlp/wi_0/kernel"]) * (inner @ layer["mlp/wi_1/kernel"])
        x = deep(x + norm(hidden, epsilon) @ layer["mlp/wo/kernel"])
    hidden = gelu(norm(x, epsilon) @ p["head/transform/kernel"] + p["head/transform/bias"])
    assert not weights
    return norm(hidden, epsilon) @ p["token_embedder/embedding"].T + p["head/bias"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", [presets.ltg_bert, presets.gpt_bert])
def test_logits_equal_the_definition(preset):
    config = small(preset())
    abstract = abstract_model(config)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), init_params(config, jax.random.key(0))
    )
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (1, LENGTH)).astype(np.int32)
    visible = np.ones((LENGTH, LENGTH), bool)
    batch = {"encoder_input_tokens": tokens}
    if config.decoder is not None:
        prefix = np.arange(LENGTH) < 5
        visible = np.tril(visible) | (prefix[:, None] & prefix)
        batch = {"decoder_input_tokens": tokens, "decoder_causal_attention": prefix[None].astype(np.int32)}
    found = jax.jit(lambda params: bind_params(abstract.graphdef, params)(batch))(params)
    expected = reference(config, params, tokens[0], visible)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_presets_have_the_parameters_of_the_published_models():
    def count(model):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(model).params))

    d, layers, rows = 768, 12, 64
    head, positions = d * d + d + 16_384, rows * d + 2 * d
    ltg = layers * (4 * (d * d + d) + 2 * d + 3 * d * 2048)
    assert count(presets.ltg_bert("base")) == 16_384 * d + ltg + head + positions
    gpt = layers * (5 * (d * d + d) + 3 * d * 2560) + sum(range(2, 2 * layers + 2))
    assert count(presets.gpt_bert("base")) == 16_384 * d + gpt + head + positions
