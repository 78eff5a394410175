"""The step on a model small enough to know its gradient: logits = table[input token], plus noise under dropout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_like.config import (
    Adafactor,
    AdamW,
    CausalLM,
    DataConfig,
    ModelConfig,
    RunConfig,
    Schedule,
    StackConfig,
    TrainingConfig,
)
from t5x_like.monitoring.metrics import Mean, value
from t5x_like.outputs import Loss, Output
from t5x_like.training.optimizers import make_optimizer
from t5x_like.training.schedules import make_schedule
from t5x_like.training.state import init_state
from t5x_like.training.step import make_eval_step, make_train_step, split_rows

Tree = Any
VOCABULARY, ROWS, LENGTH = 7, 8, 5
AXES = {"table": {"embedding": ("vocab", "embed")}}


def run_with(dropout_rate: float = 0.0, **training: Any) -> RunConfig:
    stack = StackConfig(
        num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, head_dim=8, d_ff=8, dropout_rate=dropout_rate
    )
    options = {"max_gradient_norm": None, "z_loss": 0.0, "optimizer": AdamW(weight_decay=0.0)} | training
    return RunConfig(
        name="t",
        model=ModelConfig(encoder=None, decoder=stack, vocab_size=VOCABULARY),
        data=DataConfig(
            layout="causal_lm",
            mixture=(CausalLM(name="even"), CausalLM(name="odd")),
            inputs_length=0,
            targets_length=LENGTH,
        ),
        training=TrainingConfig(
            num_train_steps=10,
            batch_size=ROWS,
            schedule=Schedule(kind="constant", learning_rate=0.5, warmup_steps=0),
            **options,
        ),
    )


def apply(params: Tree, batch: Tree, rng: jax.Array | None) -> jax.Array:
    logits = params["table"]["embedding"][batch["decoder_input_tokens"]]
    return logits if rng is None else logits * jax.random.uniform(rng, logits.shape)


def params_of(seed: int = 0) -> Tree:
    table = np.random.default_rng(seed).standard_normal((VOCABULARY, VOCABULARY))
    return {"table": {"embedding": jnp.asarray(table, jnp.float32)}}


def padded(features: Tree, length: int) -> Tree:
    """Rows with further cells, of weight 0."""
    more = {name: [(0, 0), (0, length - x.shape[1])] for name, x in features.items() if x.ndim == 2}
    return {name: np.pad(x, more[name]) if name in more else x for name, x in features.items()}


def batch_of(seed: int = 0, rows: int = ROWS) -> Tree:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCABULARY, (rows, LENGTH + 1)).astype(np.int32)
    weights = (np.arange(LENGTH) < rng.integers(0, LENGTH + 1, (rows, 1))).astype(np.int32)
    return {
        "main": {
            "decoder_input_tokens": tokens[:, :-1],
            "decoder_target_tokens": tokens[:, 1:],
            "decoder_loss_weights": weights,
            "denoiser_ids": np.arange(rows, dtype=np.int32) % 2,
        }
    }


sgd = optax.GradientTransformationExtraArgs(
    lambda params: {},
    lambda grads, state, params=None, *, learning_rate: (jax.tree.map(lambda g: -g, grads), state),
)
"""A stand-in that applies the gradient it is given, so that a test can read it off the parameters."""


def gradient(
    run: RunConfig, batch: Tree, params: Tree | None = None, apply: Callable[..., Any] = apply
) -> tuple[np.ndarray, Tree]:
    params = params_of() if params is None else params
    step = jax.jit(make_train_step(run, apply, sgd, make_schedule(run.training)))
    state, metrics = step(init_state(params, sgd, 0), batch)
    return np.asarray(params["table"]["embedding"] - state["params"]["table"]["embedding"]), metrics


def mean_loss(params: Tree, batch: Tree, z_loss: float) -> jax.Array:
    features = batch["main"]
    logits = apply(params, features, None)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    at_target = jnp.sum(logits * jax.nn.one_hot(features["decoder_target_tokens"], VOCABULARY), axis=-1)
    weights = features["decoder_loss_weights"]
    return jnp.sum((log_z - at_target + z_loss * log_z**2) * weights) / jnp.sum(weights)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradient_is_that_of_the_mean_over_all_loss_tokens(parts: int, z_loss: float) -> None:
    """Parts of very unequal weight: the result is that of the whole batch, not the mean of the parts' means."""
    batch = batch_of(seed=1)
    batch["main"]["decoder_loss_weights"][::4] = 0
    expected = jax.grad(mean_loss)(params_of(), batch, z_loss)["table"]["embedding"]
    found, metrics = gradient(run_with(gradient_accumulation_steps=parts, z_loss=z_loss), batch)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert float(metrics["loss_tokens"].sum) == batch["main"]["decoder_loss_weights"].sum()
    assert value(metrics["loss"]) == pytest.approx(float(mean_loss(params_of(), batch, 0.0)), rel=1e-5)
    assert value(metrics["gradient_norm"]) == pytest.approx(float(np.linalg.norm(expected)), rel=1e-5)


@pytest.mark.parametrize("optimizer", [Adafactor(min_dim_size_to_factor=2), AdamW()])
def test_accumulation_gives_the_parameters_of_the_whole_batch(optimizer: Adafactor | AdamW) -> None:
    results = []
    for parts in (1, 4):
        run = run_with(gradient_accumulation_steps=parts, optimizer=optimizer, max_gradient_norm=0.1)
        tx = make_optimizer(run.training, AXES)
        step = jax.jit(make_train_step(run, apply, tx, make_schedule(run.training)))
        state = init_state(params_of(), tx, 0)
        for seed in range(3):
            state, _ = step(state, batch_of(seed))
        results.append(state["params"]["table"]["embedding"])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(results[0] - params_of()["table"]["embedding"])) > 0.1


def test_duplicating_the_batch_changes_nothing() -> None:
    batch = batch_of()
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
    np.testing.assert_allclose(gradient(run_with(), batch)[0], gradient(run_with(), twice)[0], atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("names", [("main", "short_3"), ("b", "a")])
def test_sub_batches_are_one_padded_batch(names: tuple[str, str], parts: int) -> None:
    """Of other names, row counts and lengths; what is summed must be divided by the weights of both."""
    long = batch_of(seed=1)["main"]
    short = {name: x[:4, :3] if x.ndim == 2 else x[:4] for name, x in batch_of(seed=2)["main"].items()}
    as_one = {"main": {name: np.concatenate([x, padded(short, LENGTH)[name]]) for name, x in long.items()}}
    expected, whole = gradient(run_with(z_loss=0.1), as_one)
    run = run_with(z_loss=0.1, gradient_accumulation_steps=parts)
    found, metrics = gradient(run, {names[0]: long, names[1]: short})
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found).max() > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, whole)


def with_further_loss(params: Tree, batch: Tree, rng: jax.Array | None) -> Output:
    """The logits of token 1 squared, over the cells that have no weight: unlike the loss tokens in every part."""
    logits = apply(params, batch, rng)
    cells = 1.0 - batch["decoder_loss_weights"]
    return Output(
        logits,
        {"far": Loss(jnp.sum(jnp.square(logits[..., 1]) * cells), jnp.sum(cells), coefficient=0.3)},
        {"largest": Mean(jnp.max(logits), jnp.ones(()))},
    )


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_further_loss_of_the_model_is_a_mean_over_the_whole_batch(parts: int) -> None:
    batch = batch_of(seed=1)
    batch["main"]["decoder_loss_weights"][::4] = 0

    def far(params: Tree) -> jax.Array:
        found = [with_further_loss(params, features, None).losses["far"] for features in batch.values()]
        return sum(loss.sum for loss in found) / sum(loss.weight for loss in found)

    def total(params: Tree) -> jax.Array:
        return mean_loss(params, batch, 0.1) + 0.3 * far(params)

    expected = jax.grad(total)(params_of())["table"]["embedding"]
    assert np.abs(expected - jax.grad(mean_loss)(params_of(), batch, 0.1)["table"]["embedding"]).max() > 1e-2
    run = run_with(gradient_accumulation_steps=parts, z_loss=0.1)
    found, metrics = gradient(run, batch, apply=with_further_loss)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert value(metrics["far"]) == pytest.approx(float(far(params_of())), rel=1e-5), "reported without coefficient"
    assert float(metrics["largest"].weight) == parts
    batch["short"] = {name: x[:4, :3] if x.ndim == 2 else x[:4] for name, x in batch_of(seed=2)["main"].items()}
    rows = padded(batch["short"], LENGTH)
    as_one = {name: np.concatenate([x, rows[name]]) for name, x in batch["main"].items()}
    found, metrics = gradient(run, batch, apply=with_further_loss)
    assert value(metrics["far"]) == pytest.approx(float(far(params_of())), rel=1e-5)
    expected = jax.grad(lambda params: mean_loss(params, {"main": as_one}, 0.1) + 0.3 * far(params))(params_of())
    np.testing.assert_allclose(found, expected["table"]["embedding"], atol=1e-6)


def test_weights_that_are_known_ahead_cost_no_second_run_of_the_model() -> None:
    def products(parts: int) -> int:
        def model(params: Tree, batch: Tree, rng: jax.Array | None) -> Output:
            logits = params["table"]["embedding"][batch["decoder_input_tokens"]]
            logits = jax.lax.scan(lambda x, _: (jnp.tanh(x @ params["table"]["embedding"]), None), logits, None, 3)[0]
            loss = Loss(jnp.sum(logits**2), jnp.sum(batch["decoder_loss_weights"] * 1.0), coefficient=1.0)
            return Output(logits, {"far": loss})

        run = run_with(gradient_accumulation_steps=parts)
        step = jax.jit(make_train_step(run, model, sgd, make_schedule(run.training)))
        return step.lower(init_state(params_of(), sgd, 0), batch_of()).as_text().count("dot_general")

    assert products(1) == products(2) > 0


def test_a_model_may_not_report_under_a_name_that_is_taken() -> None:
    def model(params: Tree, batch: Tree, rng: jax.Array | None) -> Output:
        return Output(apply(params, batch, rng), metrics={"accuracy": Mean(jnp.ones(()), jnp.ones(()))})

    with pytest.raises(ValueError, match=r"name that is taken.*accuracy"):
        gradient(run_with(), batch_of(), apply=model)


def test_dropout_keys_advance_over_parts_steps_and_sub_batches() -> None:
    """Identical rows; part p of two has the rows p, p + 2, ..., and those have the denoiser p."""
    batch = jax.tree.map(lambda x: np.repeat(x[:1], ROWS, axis=0), batch_of(seed=3))
    batch["main"]["denoiser_ids"] = np.arange(ROWS, dtype=np.int32) % 2
    batch["main"]["decoder_loss_weights"][:] = 1
    run = run_with(dropout_rate=0.1, gradient_accumulation_steps=2)
    step = jax.jit(make_train_step(run, apply, sgd, make_schedule(run.training)))
    state = init_state(params_of(), sgd, 17)
    losses = []
    for _ in range(2):
        _, metrics = step(state, batch)
        losses += [value(metrics["loss/even"]), value(metrics["loss/odd"])]
        state = state | {"step": state["step"] + 1}
    assert len(set(losses)) == 4
    half = {name: x[::2] for name, x in batch["main"].items()}
    for index, found in enumerate(losses):
        at_step, part = divmod(index, 2)
        of_run = jax.random.wrap_key_data(state["rng"])
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(of_run, at_step), part), 0)
        logits = jax.nn.log_softmax(apply(params_of(), half, key))
        expected = -np.take_along_axis(np.asarray(logits), half["decoder_target_tokens"][..., None], -1).mean()
        assert found == pytest.approx(expected, rel=1e-5)


def test_clipping_bounds_the_norm_of_the_mean_gradient() -> None:
    batch = batch_of()
    free, _ = gradient(run_with(), batch)
    norm = np.linalg.norm(free)
    clipped, metrics = gradient(run_with(max_gradient_norm=float(norm) / 3), batch)
    np.testing.assert_allclose(clipped, free / 3, rtol=1e-4, atol=1e-7)
    assert value(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-5), "the metric is the norm before clipping"
    loose, _ = gradient(run_with(max_gradient_norm=float(norm) * 3), batch)
    np.testing.assert_allclose(loose, free, rtol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_reported(poison: float) -> None:
    run = run_with(optimizer=Adafactor(min_dim_size_to_factor=2))
    tx = make_optimizer(run.training, AXES)
    step = jax.jit(make_train_step(run, apply, tx, make_schedule(run.training)))
    state, metrics = step(init_state(params_of(), tx, 0), batch_of())
    assert value(metrics["nonfinite"]) == 0.0
    bad = batch_of(1)
    bad["main"]["decoder_loss_weights"] = bad["main"]["decoder_loss_weights"].astype(np.float32)
    bad["main"]["decoder_loss_weights"][0, 0] = poison
    after, metrics = step(state, bad)
    assert value(metrics["nonfinite"]) == 1.0
    assert np.isnan(value(metrics["gradient_norm"])), "no finite step, no norm"
    assert int(after["step"]) == 2
    jax.tree.map(np.testing.assert_array_equal, after["params"], state["params"])
    jax.tree.map(np.testing.assert_array_equal, after["opt_state"], state["opt_state"])
    again, _ = step(after, batch_of(2))
    assert np.all(np.isfinite(again["params"]["table"]["embedding"]))
    assert np.any(again["params"]["table"]["embedding"] != after["params"]["table"]["embedding"])


def test_a_batch_without_loss_tokens_has_no_gradient() -> None:
    batch = batch_of()
    batch["main"]["decoder_loss_weights"][:] = 0
    found, metrics = gradient(run_with(z_loss=1e-2), batch)
    assert np.all(found == 0)
    assert value(metrics["loss_tokens"]) == 0 and value(metrics["nonfinite"]) == 0 and np.isnan(value(metrics["loss"]))


def test_the_schedule_drives_the_update_and_the_metric() -> None:
    run = run_with()
    schedule: Callable[[Any], jax.Array] = lambda step: jnp.asarray([0.25, 1.0])[step]  # noqa: E731
    tx = make_optimizer(run.training, AXES)
    step = jax.jit(make_train_step(run, apply, tx, schedule))
    state = init_state(params_of(), tx, 0)
    for rate in (0.25, 1.0):
        before = state
        state, metrics = step(before, batch_of())
        assert value(metrics["learning_rate"]) == rate
        moved = np.abs(state["params"]["table"]["embedding"] - before["params"]["table"]["embedding"]).max()
        assert moved == pytest.approx(rate, rel=0.02), "Adam moves each number by the rate at first"


def test_step_never_talks_to_the_host() -> None:
    run = run_with(dropout_rate=0.1, gradient_accumulation_steps=2)
    tx = make_optimizer(run.training, AXES)
    step = jax.jit(make_train_step(run, apply, tx, make_schedule(run.training)))
    state, batch = init_state(params_of(), tx, 0), jax.device_put(batch_of())
    compiled = step.lower(state, batch).compile()
    with jax.transfer_guard("disallow"):
        state, metrics = compiled(state, batch)
        compiled(state, batch)
    assert set(metrics) == {
        *("loss", "z_loss", "accuracy", "loss/even", "loss/odd"),
        *("loss_tokens", "learning_rate", "gradient_norm", "nonfinite"),
    }


def test_evaluation_has_neither_dropout_nor_smoothing() -> None:
    run = run_with(dropout_rate=0.5, label_smoothing=0.3)
    metrics = jax.jit(make_eval_step(run, apply))(params_of(), batch_of())
    assert value(metrics["loss"]) == pytest.approx(float(mean_loss(params_of(), batch_of(), 0.0)), rel=1e-5)
    assert set(metrics) == {"loss", "z_loss", "accuracy", "loss/even", "loss/odd", "loss_tokens"}
    smoothed = dataclasses.replace(run, model=run_with().model)
    assert value(gradient(smoothed, batch_of())[1]["loss"]) != pytest.approx(value(metrics["loss"]), rel=1e-3)


def test_parts_keep_the_rows_of_a_device_on_it() -> None:
    """Eight rows on two devices, two parts: each part takes the same number of rows from each half, in order."""
    parts = split_rows(jnp.arange(8), 2)
    np.testing.assert_array_equal(parts, [[0, 2, 4, 6], [1, 3, 5, 7]])
    assert split_rows(jnp.zeros((8, 3)), 4).shape == (4, 2, 3)
