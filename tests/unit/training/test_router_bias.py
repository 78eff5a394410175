"""Biases of routers: moved by the load of the whole batch, by nothing else, and until the load is even."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from helpers.model_examples import EXAMPLES, VOCABULARY, parameters
from helpers.training_examples import run_with

from t5x_like.config import AdamWConfig, FreezeConfig, MoEConfig, RunConfig, ScheduleConfig, ScheduleFreeConfig
from t5x_like.model_output import TOKENS_PER_EXPERT
from t5x_like.models.factory import abstract_model, bind_params
from t5x_like.training.optimizers.make_optimizer import make_optimizer
from t5x_like.training.schedules import make_schedule
from t5x_like.training.train_step import init_state, make_train_step
from t5x_like.utils import tree_paths
from t5x_like.utils.type_aliases import PyTree

RATE, ROWS, LENGTH = 0.02, 4, 24


def run_of(learning_rate: float = 0.1, **training: Any) -> RunConfig:
    run = run_with(**training)
    decoder = dataclasses.replace(
        EXAMPLES["experts"].decoder,
        experts=MoEConfig(num_experts=6, scoring="sigmoid", bias_update_rate=RATE, router_aux_loss_weight=0.0),
    )
    schedule = ScheduleConfig(kind="constant", learning_rate=learning_rate, warmup_steps=0)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(EXAMPLES["experts"], decoder=decoder),
        training=dataclasses.replace(run.training, schedule=schedule),
    )


def batch() -> PyTree:
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
    weights = np.ones((ROWS, LENGTH), np.int32)
    # Rows of different lengths, so that the parts of the batch have different numbers of tokens.
    weights[1::2, 9:] = 0
    tokens[1::2, 10:] = 0
    names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
    return {"main": dict(zip(names, (tokens[:, :-1], tokens[:, 1:], weights), strict=True))}


class Trained:
    """Parameters, a jitted step and the state of a run."""

    def __init__(self, run: RunConfig):
        self.run = run
        self.spec = abstract_model(run.model)
        optimizer = make_optimizer(run.training, self.spec.logical_axes)
        self.step = jax.jit(make_train_step(run, self.output, optimizer, make_schedule(run.training)))
        self.state = init_state(parameters(run.model), optimizer, 0)
        self.counts = jax.jit(lambda params: self.output(params, batch()["main"], None).losses)

    def output(self, params: PyTree, features: PyTree, rng: jax.Array | None) -> Any:
        return bind_params(self.spec.graphdef, params).output(features, dropout_rng=rng)

    def loads(self) -> np.ndarray:
        return np.asarray(self.counts(self.state["params"])[f"{TOKENS_PER_EXPERT}decoder"].sum)

    def advance(self, steps: int = 1) -> dict[str, Any]:
        for _ in range(steps):
            self.state, metrics = self.step(self.state, batch())
        return metrics


def bias(state: PyTree) -> np.ndarray:
    return np.asarray(state["params"]["decoder"]["layers"]["mlp"]["router_bias"])


@pytest.mark.slow
def test_bias_moves_by_the_sign_of_the_load_of_the_whole_batch_once_it_is_not_frozen() -> None:
    freeze = (FreezeConfig(paths=(".*/router_bias",), until_step=1),)
    trained = Trained(run_of(optimizer=AdamWConfig(weight_decay=0.5), gradient_accumulation_steps=2, freeze=freeze))
    assert not [path for path in tree_paths.by_path(trained.state["opt_state"]) if "router_bias" in path]
    before = bias(trained.state)
    trained.advance()
    np.testing.assert_array_equal(bias(trained.state), before)
    loads = trained.loads()
    assert loads.sum(1).tolist() == [2 * 2 * (LENGTH + 10)] * 2
    metrics = trained.advance()
    expected = RATE * np.sign(loads.mean(1, keepdims=True) - loads)
    np.testing.assert_allclose(bias(trained.state) - before, expected, atol=1e-7)
    assert not [name for name in metrics if name.startswith(TOKENS_PER_EXPERT)]


@pytest.mark.slow
def test_averages_of_iterates_do_not_pull_the_bias_back() -> None:
    trained = Trained(run_of(optimizer=ScheduleFreeConfig()))
    before = bias(trained.state)
    trained.advance()
    moved = np.abs(bias(trained.state) - before)
    np.testing.assert_allclose(moved[moved > 1e-6], RATE, rtol=1e-4)


def test_biases_make_the_load_even() -> None:
    """On a fixed batch and with almost fixed kernels, whose router prefers some experts."""
    trained = Trained(run_of(learning_rate=1e-6))
    trained.state["params"]["decoder"]["layers"]["mlp"]["router_bias"] *= 0.0
    uneven = trained.loads()
    trained.advance(60)
    even = trained.loads()
    assert uneven.max() > 1.6 * uneven.mean() and even.max() < 1.3 * even.mean(), (uneven, even)
    assert even.sum() == uneven.sum()
