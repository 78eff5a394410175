"""Decoding with a cache against a slow reference without one, which repeats the forward pass for every token, for every
architecture and for prompts of equal and unequal length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_examples import EXAMPLES, GEMMA, VOCABULARY, forward, model, parameters

from t5x_like.config.model import ModelConfig, MoEConfig
from t5x_like.decoding.decode_loop import decode_rows, read_prompts
from t5x_like.decoding.sampling import RowSampling, draw_keys, sample
from t5x_like.models import inference_layout
from t5x_like.models.factory import abstract_model, bind_params

ROWS, LONGEST, NEW, TOTAL = 3, 11, 12, 32
LENGTHS = {"unequal": np.array([11, 2, 6]), "equal": np.array([8, 8, 8])}
FIVE_TO_ONE = GEMMA | {"num_layers": 6, "layer_pattern": ("local",) * 5 + ("global",), "sliding_window": (3, 3)}
MODELS = {
    "t5": model("encoder_decoder"),
    "learned": model("encoder_decoder", "learned"),
    "five local to one": model("decoder", "rope", stack_changes=FIVE_TO_ONE),
    "multi-query": model("decoder", "rope", stack_changes={"num_kv_heads": 1}),
    "causal t5": model("decoder"),
    "prefix": model("prefix_lm"),
    "shared experts": model(
        "decoder", "rope", stack_changes={"experts": MoEConfig(num_experts=3, num_shared_experts=1, scoring="sigmoid")}
    ),
}
FEATURES = ("merged", "unequal", "local prefix", "some experts", "first layer", "disentangled")
MODELS |= {name: EXAMPLES[name] for name in FEATURES}
FAST = ("five local to one", "t5")


@functools.cache
def large_params(config: ModelConfig):
    """Return parameters so large that the next token depends on all tokens before it."""
    random = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: random.normal(0, 0.35, leaf.shape).astype(np.float32), parameters(config))


@functools.cache
def prompts(kind: str):
    tokens = np.random.default_rng(5).integers(2, VOCABULARY, (ROWS, LONGEST)).astype(np.int32)
    return np.where(np.arange(LONGEST) < LENGTHS[kind][:, None], tokens, 0)


def rows_keys(position):
    return draw_keys(jnp.uint32(9), jnp.arange(ROWS), jnp.full(ROWS, position))


def select(logits, position, temperature):
    sampling = RowSampling() if temperature == 0 else RowSampling(jnp.full(ROWS, temperature))
    return sample(logits, rows_keys(position), sampling)


def recompute(config, kind, prefix, temperature):
    """Return (tokens [ROWS, NEW], their logits [ROWS, NEW, V]), computed without a cache."""
    lengths, given = LENGTHS[kind], prompts(kind)
    run = forward(config)
    stream = np.zeros((ROWS, TOTAL), np.int32)
    batch = {}
    if config.encoder is not None:
        batch["encoder_input_tokens"], lengths = given, np.ones(ROWS, int)
    else:
        stream[:, :LONGEST] = given
        if prefix:
            batch["decoder_causal_attention"] = (np.arange(TOTAL) < lengths[:, None]).astype(np.int32)
    rows, result, seen = np.arange(ROWS), [], []
    for position in range(NEW):
        valid = (np.arange(TOTAL) < (lengths + position)[:, None]).astype(np.int32)
        features = batch | {"decoder_input_tokens": stream, "decoder_segment_ids": valid}
        if config.encoder is not None:
            # Causal attention: positions after the newest token do not affect it.
            del features["decoder_segment_ids"]
        logits = np.asarray(run(large_params(config), features))[rows, lengths + position - 1]
        token = np.asarray(select(jnp.asarray(logits), position, temperature))
        stream[rows, lengths + position] = token
        result.append(token)
        seen.append(logits)
    return np.stack(result, 1), np.stack(seen, 1)


def engine(config, kind, prefix, temperature, *, inference_layout_params=True, forced=None, cache_dtype=None):
    """Return the same by the decoding loop; `forced` tokens [ROWS, NEW] replace the selected ones."""
    spec = abstract_model(config)
    graphdef, params = spec.graphdef, large_params(config)
    if inference_layout_params:
        params = jax.jit(lambda params: inference_layout.convert_params(spec.graphdef, params, fuse=True))(params)
        graphdef = inference_layout.abstract_layout(spec.graphdef, spec.params, fuse=True)[0]

    def decode(params, tokens, lengths, forced):
        model = bind_params(graphdef, params)
        logits, cache = read_prompts(model, tokens, lengths, NEW, bidirectional=prefix, cache_dtype=cache_dtype)

        def next_token(logits, state):
            position, seen = state
            token = select(logits, position, temperature)
            if forced is not None:
                token = jax.lax.dynamic_index_in_dim(forced, position, axis=1, keepdims=False)
            return token, jnp.zeros(ROWS, bool), (position + 1, seen.at[:, position].set(logits))

        nothing = jnp.int32(0), jnp.zeros((ROWS, NEW, logits.shape[-1]))
        limits = jnp.full(ROWS, NEW)
        done = decode_rows(
            model, logits, cache, choose=next_token, selection_state=nothing, limits_R=limits, buffer_length=NEW
        )
        return done.tokens_RxN, done.selection_state[1]

    result = jax.jit(decode)(params, jnp.asarray(prompts(kind)), jnp.asarray(LENGTHS[kind]), forced)
    return jax.tree.map(np.asarray, result)


def marked(names):
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(MODELS))
def test_decoding_equals_recomputation(name):
    config, prefix = MODELS[name], "prefix" in name
    for kind, temperature in (("unequal", 8.0), ("unequal", 0.0), ("equal", 0.0)):
        expected, expected_logits = recompute(config, kind, prefix, temperature)
        result, logits = engine(config, kind, prefix, temperature)
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_allclose(logits, expected_logits, atol=2e-4 * np.abs(expected_logits).max())
        if temperature:
            assert len(set(expected.ravel().tolist())) > 8, "the tokens must vary"
        if name in FAST:
            return


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merged", "some experts"])
def test_training_parameters_give_the_same_tokens(name):
    config = MODELS[name]
    expected, _ = engine(config, "unequal", False, 0.0)
    np.testing.assert_array_equal(engine(config, "unequal", False, 0.0, inference_layout_params=False)[0], expected)


@pytest.mark.parametrize("name", [pytest.param("five local to one", marks=pytest.mark.slow), *marked(("t5", "merged"))])
def test_error_of_int8_and_bfloat16_caches_is_small(name):
    """Compare the logits of the same tokens with those of the float32 cache, relative to their standard deviation, by
    the bounds in the documentation. The int8 error of a key or value is at most 1/254 of the largest number of its
    head's slot."""
    config = MODELS[name]
    tokens, exact = engine(config, "unequal", False, 0.0)
    for dtype, bound in (("int8", 0.05), ("bfloat16", 0.05)):
        _, result = engine(config, "unequal", False, 0.0, forced=jnp.asarray(tokens), cache_dtype=dtype)
        error = np.sqrt(np.mean((result - exact) ** 2)) / np.std(exact)
        assert 0 < error < bound, (dtype, error)
        print(f"{name}, {dtype}: {error:.4f}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["five local to one", "t5", "merged"])
def test_truncated_rows_continue_as_without_the_removed_tokens(name):
    """Steps of three tokens, of which each row keeps a different number: the logits equal those of the forward pass."""
    config = MODELS[name]
    spec, random = abstract_model(config), np.random.default_rng(1)
    lengths = np.ones(ROWS, int) if config.encoder is not None else LENGTHS["unequal"]
    rows = random.integers(2, VOCABULARY, (ROWS, TOTAL)).astype(np.int32)
    rows[:, 0] = 0
    batch = {"decoder_input_tokens": rows}
    if config.encoder is not None:
        batch["encoder_input_tokens"] = prompts("unequal")
    expected = np.asarray(forward(config)(large_params(config), batch))

    @jax.jit
    def start(params, tokens):
        model = bind_params(spec.graphdef, params)
        if config.encoder is not None:
            return read_prompts(model, prompts("unequal"), jnp.asarray(LENGTHS["unequal"]), TOTAL, widest_step=3)[1]
        return read_prompts(model, tokens, jnp.asarray(lengths), TOTAL, widest_step=3)[1]

    @jax.jit
    def step(params, tokens, cache, kept):
        logits, after = bind_params(spec.graphdef, params).decode(tokens, cache)
        return logits, after.truncate(cache.lengths + kept)

    cache = start(large_params(config), rows[:, :LONGEST])
    while lengths.max() + 3 <= TOTAL:
        kept = random.integers(0, 4, ROWS)
        given = rows[np.arange(ROWS)[:, None], lengths[:, None] + np.arange(3)]
        wrong = np.where(np.arange(3) < kept[:, None], given, (given + 7) % VOCABULARY)
        logits, cache = step(large_params(config), wrong, cache, jnp.asarray(kept))
        for row in range(ROWS):
            matching = expected[row, lengths[row] : lengths[row] + kept[row]]
            scale = np.abs(expected).max()
            np.testing.assert_allclose(np.asarray(logits)[row, : kept[row]], matching, atol=2e-4 * scale)
        lengths = lengths + kept
    np.testing.assert_array_equal(cache.lengths, lengths)


def test_cache_of_a_local_layer_has_the_length_of_its_window():
    config = MODELS["five local to one"]
    cache = jax.eval_shape(
        lambda: bind_params(abstract_model(config).graphdef, large_params(config)).init_cache(2, 500, widest_step=4)
    )
    assert [slots.size for slots in cache.layers] == [7] * 5 + [504]
