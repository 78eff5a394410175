"""A padded vocabulary computes what the same model computes without padding, and its padding stays zero."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from helpers import decoding_examples as tiny
from helpers.model_examples import model, parameters
from helpers.parallel_programs import run_for
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from t5x_like.config import (
    AdafactorConfig,
    AdamWConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    ShardingConfig,
    TrainingConfig,
)
from t5x_like.decoding.beam_search import BeamSearch
from t5x_like.decoding.engine import beam_tokens, generate_tokens
from t5x_like.decoding.sampling import Sampling
from t5x_like.errors import ConfigError
from t5x_like.models.factory import abstract_model, bind_params, init_params
from t5x_like.models.vocab_padding import cut, padded, without_padding
from t5x_like.program import build_program
from t5x_like.sharding.constrain import activation_context
from t5x_like.sharding.mesh import make_mesh
from t5x_like.sharding.rules import default_rules
from t5x_like.sharding.shardings import tree_shardings
from t5x_like.training.losses import batch_metrics, summed_loss
from t5x_like.training.optimizers.make_optimizer import make_optimizer

MODELS = {
    "tied": model("prefix_lm", tie_embeddings=True, logits_softcap=5.0, pad_vocab_to_multiple_of=16),
    "untied": model("encoder", tie_embeddings=False, head_bias=True, pad_vocab_to_multiple_of=16),
    "two tables": model("encoder_decoder", separate_encoder_embeddings=True, pad_vocab_to_multiple_of=16),
}
"""Models with 61 ids in tables of 64 rows."""


def batch_of(config: ModelConfig) -> dict[str, Any]:
    random, shape = np.random.default_rng(0), (4, 8)
    stack = "encoder" if config.decoder is None else "decoder"
    # Of the largest ids, and of ids that no token has, for which both models read the same row.
    some, size = range(config.vocab_size - 11, config.vocab_size + 3), config.vocab_size
    inputs = {f"{name}_input_tokens": random.choice(some, shape).astype(np.int32) for name in config.stacks}
    targets = random.integers(size - 11, size, shape).astype(np.int32)
    weights = random.integers(0, 2, shape).astype(np.int32)
    return {**inputs, f"{stack}_target_tokens": targets, f"{stack}_loss_weights": weights}


def loss_and_gradients(config: ModelConfig, params: Any, chunk_tokens: int) -> Any:
    graphdef = abstract_model(config).graphdef

    def loss(params: Any) -> Any:
        metrics, coefficients = batch_metrics(
            lambda params, batch, rng: bind_params(graphdef, params).output(batch),
            params,
            {"main": batch_of(config)},
            None,
            z_loss=1e-2,
            label_smoothing=0.1,
            denoisers=(),
            chunk_tokens=chunk_tokens,
        )
        return summed_loss(metrics, coefficients, metrics), metrics

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize("chunk_tokens", [0, 5])
@pytest.mark.parametrize("name", MODELS)
def test_loss_metrics_and_gradients_are_those_without_padding(name: str, chunk_tokens: int) -> None:
    config = MODELS[name]
    params = parameters(without_padding(config))
    expected, expected_gradients = loss_and_gradients(without_padding(config), params, chunk_tokens)
    found, gradients = loss_and_gradients(config, padded(params, config), chunk_tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), found, expected)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected_gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * scale),
        gradients,
        # The gradient of the padding is exactly zero.
        padded(expected_gradients, config),
    )
    rows = np.asarray(gradients["token_embedder"]["embedding"])[config.vocab_size :]
    assert rows.shape == (3, 32) and not rows.any()


def test_initial_parameters_are_those_without_padding_and_zeros() -> None:
    config, key = MODELS["untied"], jax.random.key(1)
    expected = padded(init_params(without_padding(config), key), config)
    jax.tree.map(np.testing.assert_array_equal, init_params(config, key), expected)
    assert jax.tree.map(lambda x: x.shape, expected) == jax.tree.map(lambda x: x.shape, abstract_model(config).params)


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [
        (AdamWConfig(weight_decay=0.1), 1.0),
        (AdamWConfig(weight_decay=0.0, rms_scaled=True), (61 / 64) ** 0.5),
        (AdafactorConfig(clipping_threshold=None, min_dim_size_to_factor=2), (61 / 64) ** 0.5),
    ],
    ids=["adamw", "rms_scaled", "adafactor"],
)
def test_optimizers_leave_the_padding_zero(optimizer: OptimizerConfig, factor: float) -> None:
    """AdamW moves the real rows as without padding, unless it divides mean squares by the number of all rows, as
    Adafactor does."""
    config = dataclasses.replace(MODELS["tied"], tie_embeddings=False)
    training = TrainingConfig(
        num_train_steps=2,
        global_batch_size=1,
        optimizer=optimizer,
        schedule=ScheduleConfig(kind="constant", learning_rate=1e-2, warmup_steps=0),
    )
    plain = without_padding(config)
    params = parameters(plain)
    gradients = jax.tree.map(lambda x: 0.1 * np.roll(x, 1), params)

    def tables(tree: Any) -> Any:
        return {name: tree[name] for name in ("token_embedder", "head")}

    def step(config: ModelConfig, params: Any, gradients: Any) -> Any:
        made = make_optimizer(training, tables(abstract_model(config).logical_axes))

        def moved(params: Any, gradients: Any) -> Any:
            updates, _ = made.update(gradients, made.init(params), params, learning_rate=1e-2)
            return jax.tree.map(lambda x, more: x + more, params, updates)

        return jax.tree.map(np.asarray, jax.jit(moved)(tables(params), tables(gradients)))

    expected = step(plain, params, gradients)
    found = step(config, padded(params, config), padded(gradients, config))
    for table in (found["token_embedder"]["embedding"], found["head"]["kernel"].T):
        assert table.shape[0] == 64 and not table[61:].any()
    before, after, wanted = (tree["token_embedder"]["embedding"] for tree in (params, found, expected))
    np.testing.assert_allclose(after[:61] - before, factor * (wanted - before), rtol=1e-4, atol=1e-7)


@given(st.integers(1, 300), st.integers(1, 130))
def test_padding_is_the_least(vocab_size: int, multiple: int) -> None:
    config = dataclasses.replace(MODELS["tied"], vocab_size=vocab_size, pad_vocab_to_multiple_of=multiple)
    assert config.padded_vocab_size % multiple == 0
    assert 0 <= config.vocab_padding_rows < multiple


@pytest.mark.slow
def test_the_same_tokens_are_decoded() -> None:
    program, params = tiny.untrained("causal_lm", "rope")
    plain = dataclasses.replace(program.run.model, vocab_size=61)
    params = jax.tree.map(np.asarray, cut(params, dataclasses.replace(plain, pad_vocab_to_multiple_of=64)))
    results = []
    for multiple in (1, 64):
        config = dataclasses.replace(plain, pad_vocab_to_multiple_of=multiple)
        one = build_program(dataclasses.replace(program.run, model=config), jax.devices()[:1])
        own, settings = padded(params, config), {"allowed_V": np.ones(61, bool), "max_new_tokens": 6}
        greedy = generate_tokens(one, own, [[5, 9, 33], [60]], **settings)
        drawn = generate_tokens(
            one, own, [[5, 9, 33], [60]], sampling=Sampling(temperature=2.0, top_k=60, top_p=0.99), seed=3, **settings
        )
        beams = beam_tokens(one, own, [[5, 9, 33], [60]], search=BeamSearch(3, 0.6), **settings)
        results.append((greedy, drawn, [[hypothesis.tokens for hypothesis in found] for found in beams]))
    assert results[0] == results[1]


def test_a_tensor_degree_that_does_not_divide_the_vocabulary() -> None:
    """259 ids on a tensor axis of 4: loss and gradients equal those of one device without padding."""
    sharding = ShardingConfig(fsdp=2, tensor=4)
    config = dataclasses.replace(MODELS["tied"], vocab_size=259, pad_vocab_to_multiple_of=4)
    run = dataclasses.replace(run_for("prefix_lm", sharding), model=without_padding(config))
    with pytest.raises(ConfigError, match="set model.pad_vocab_to_multiple_of to a multiple of 4"):
        build_program(run, jax.devices())
    params = parameters(without_padding(config))
    expected, expected_gradients = loss_and_gradients(without_padding(config), params, 0)

    mesh, rules, spec = make_mesh(sharding, jax.devices()), default_rules(sharding), abstract_model(config)
    shardings = tree_shardings(mesh, rules, spec.logical_axes, spec.params)
    assert shardings["token_embedder"]["embedding"].spec == PartitionSpec("tensor", "fsdp")
    with activation_context(mesh, rules):
        found, gradients = loss_and_gradients(config, jax.device_put(padded(params, config), shardings), 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected_gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale),
        gradients,
        padded(expected_gradients, config),
    )
    assert not np.asarray(gradients["token_embedder"]["embedding"])[259:].any()
