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
from helpers.training_examples import LENGTH, ROWS, VOCABULARY, batch_of, run_with

from t5x_like.config import AdafactorConfig, AdamWConfig, GuardConfig, MonitoringConfig, RunConfig
from t5x_like.model_output import AuxiliaryLoss, ModelOutput
from t5x_like.monitoring.metrics import WeightedMean, compute
from t5x_like.training.guard import init_guard, is_spike, with_values
from t5x_like.training.norms import is_empty_norm, norm_metrics
from t5x_like.training.optimizers.make_optimizer import make_optimizer
from t5x_like.training.schedules import make_schedule
from t5x_like.training.train_step import init_state, make_eval_step, make_train_step, moving_average, split_rows
from t5x_like.utils.type_aliases import PyTree

AXES = {"table": {"embedding": ("vocab", "embed")}}


def apply(params: PyTree, batch: PyTree, rng: jax.Array | None) -> jax.Array:
    logits = params["table"]["embedding"][batch["decoder_input_tokens"]]
    return logits if rng is None else logits * jax.random.uniform(rng, logits.shape)


def params_of(seed: int = 0) -> PyTree:
    table = np.random.default_rng(seed).standard_normal((VOCABULARY, VOCABULARY))
    return {"table": {"embedding": jnp.asarray(table, jnp.float32)}}


def padded(features: PyTree, length: int) -> PyTree:
    """Return the rows extended by positions of weight 0."""
    more = {name: [(0, 0), (0, length - x.shape[1])] for name, x in features.items() if x.ndim == 2}
    return {name: np.pad(x, more[name]) if name in more else x for name, x in features.items()}


sgd = optax.GradientTransformationExtraArgs(
    lambda params: {},
    lambda grads, state, params=None, *, learning_rate: (jax.tree.map(lambda g: -g, grads), state),
)
"""A stand-in that applies the gradient it is given, so that a test can read it off the parameters."""


def gradient(
    run: RunConfig, batch: PyTree, params: PyTree | None = None, apply: Callable[..., Any] = apply
) -> tuple[np.ndarray, PyTree]:
    params = params_of() if params is None else params
    step = jax.jit(make_train_step(run, apply, sgd, make_schedule(run.training)))
    state, metrics = step(init_state(params, sgd, 0), batch)
    return np.asarray(params["table"]["embedding"] - state["params"]["table"]["embedding"]), metrics


def mean_loss(params: PyTree, batch: PyTree, z_loss: float) -> jax.Array:
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
    assert compute(metrics["loss"]) == pytest.approx(float(mean_loss(params_of(), batch, 0.0)), rel=1e-5)
    assert compute(metrics["grad_norm"]) == pytest.approx(float(np.linalg.norm(expected)), rel=1e-5)


@pytest.mark.parametrize("optimizer", [AdafactorConfig(min_dim_size_to_factor=2), AdamWConfig()])
def test_accumulation_gives_the_parameters_of_the_whole_batch(optimizer: AdafactorConfig | AdamWConfig) -> None:
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
    """Sub-batches of other names, row counts and lengths: sums must be divided by the weights of both."""
    long = batch_of(seed=1)["main"]
    short = {name: x[:4, :3] if x.ndim == 2 else x[:4] for name, x in batch_of(seed=2)["main"].items()}
    as_one = {"main": {name: np.concatenate([x, padded(short, LENGTH)[name]]) for name, x in long.items()}}
    expected, whole = gradient(run_with(z_loss=0.1), as_one)
    run = run_with(z_loss=0.1, gradient_accumulation_steps=parts)
    found, metrics = gradient(run, {names[0]: long, names[1]: short})
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found).max() > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, whole)


def with_further_loss(params: PyTree, batch: PyTree, rng: jax.Array | None) -> ModelOutput:
    """Add the squared logits of token 1 at positions of weight 0, whose number differs between parts."""
    logits = apply(params, batch, rng)
    ignored = 1.0 - batch["decoder_loss_weights"]
    return ModelOutput(
        logits,
        {"far": AuxiliaryLoss(jnp.sum(jnp.square(logits[..., 1]) * ignored), jnp.sum(ignored), coefficient=0.3)},
        {"largest": WeightedMean(jnp.max(logits), jnp.ones(()))},
    )


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_further_loss_of_the_model_is_a_mean_over_the_whole_batch(parts: int) -> None:
    batch = batch_of(seed=1)
    batch["main"]["decoder_loss_weights"][::4] = 0

    def far(params: PyTree) -> jax.Array:
        found = [with_further_loss(params, features, None).losses["far"] for features in batch.values()]
        return sum(loss.sum for loss in found) / sum(loss.weight for loss in found)

    def total(params: PyTree) -> jax.Array:
        return mean_loss(params, batch, 0.1) + 0.3 * far(params)

    expected = jax.grad(total)(params_of())["table"]["embedding"]
    assert np.abs(expected - jax.grad(mean_loss)(params_of(), batch, 0.1)["table"]["embedding"]).max() > 1e-2
    run = run_with(gradient_accumulation_steps=parts, z_loss=0.1)
    found, metrics = gradient(run, batch, apply=with_further_loss)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert compute(metrics["far"]) == pytest.approx(float(far(params_of())), rel=1e-5), "reported without coefficient"
    assert float(metrics["largest"].weight) == parts
    batch["short"] = {name: x[:4, :3] if x.ndim == 2 else x[:4] for name, x in batch_of(seed=2)["main"].items()}
    rows = padded(batch["short"], LENGTH)
    as_one = {name: np.concatenate([x, rows[name]]) for name, x in batch["main"].items()}
    found, metrics = gradient(run, batch, apply=with_further_loss)
    assert compute(metrics["far"]) == pytest.approx(float(far(params_of())), rel=1e-5)
    expected = jax.grad(lambda params: mean_loss(params, {"main": as_one}, 0.1) + 0.3 * far(params))(params_of())
    np.testing.assert_allclose(found, expected["table"]["embedding"], atol=1e-6)


def test_weights_that_are_known_ahead_cost_no_second_run_of_the_model() -> None:
    def products(parts: int) -> int:
        def model(params: PyTree, batch: PyTree, rng: jax.Array | None) -> ModelOutput:
            logits = params["table"]["embedding"][batch["decoder_input_tokens"]]
            logits = jax.lax.scan(lambda x, _: (jnp.tanh(x @ params["table"]["embedding"]), None), logits, None, 3)[0]
            loss = AuxiliaryLoss(jnp.sum(logits**2), jnp.sum(batch["decoder_loss_weights"] * 1.0), coefficient=1.0)
            return ModelOutput(logits, {"far": loss})

        run = run_with(gradient_accumulation_steps=parts)
        step = jax.jit(make_train_step(run, model, sgd, make_schedule(run.training)))
        return step.lower(init_state(params_of(), sgd, 0), batch_of()).as_text().count("dot_general")

    assert products(1) == products(2) > 0


def test_a_model_may_not_report_under_a_name_that_is_taken() -> None:
    def model(params: PyTree, batch: PyTree, rng: jax.Array | None) -> ModelOutput:
        return ModelOutput(apply(params, batch, rng), metrics={"accuracy": WeightedMean(jnp.ones(()), jnp.ones(()))})

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
        losses += [compute(metrics["loss/even"]), compute(metrics["loss/odd"])]
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
    assert compute(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5), "the metric is the norm before clipping"
    loose, _ = gradient(run_with(max_gradient_norm=float(norm) * 3), batch)
    np.testing.assert_allclose(loose, free, rtol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_reported(poison: float) -> None:
    run = run_with(optimizer=AdafactorConfig(min_dim_size_to_factor=2))
    tx = make_optimizer(run.training, AXES)
    step = jax.jit(make_train_step(run, apply, tx, make_schedule(run.training)))
    state, metrics = step(init_state(params_of(), tx, 0), batch_of())
    assert compute(metrics["skipped_steps"]) == 0.0
    bad = batch_of(1)
    bad["main"]["decoder_loss_weights"] = bad["main"]["decoder_loss_weights"].astype(np.float32)
    bad["main"]["decoder_loss_weights"][0, 0] = poison
    after, metrics = step(state, bad)
    assert compute(metrics["skipped_steps"]) == 1.0
    assert np.isnan(compute(metrics["grad_norm"])), "no finite step, no norm"
    assert int(after["step"]) == 2
    jax.tree.map(np.testing.assert_array_equal, after["params"], state["params"])
    jax.tree.map(np.testing.assert_array_equal, after["opt_state"], state["opt_state"])
    again, _ = step(after, batch_of(2))
    assert np.all(np.isfinite(again["params"]["table"]["embedding"]))
    assert np.any(again["params"]["table"]["embedding"] != after["params"]["table"]["embedding"])


def test_an_update_that_is_not_finite_is_skipped() -> None:
    """A finite gradient, and a learning rate with which the norm of the update overflows."""
    run = run_with()
    tx = make_optimizer(run.training, AXES)
    step = jax.jit(make_train_step(run, apply, tx, lambda step: jnp.where(step == 1, 1e36, 0.5)))
    state, metrics = step(init_state(params_of(), tx, 0), batch_of())
    moved = np.linalg.norm(state["params"]["table"]["embedding"] - params_of()["table"]["embedding"])
    assert compute(metrics["update_norm"]) == pytest.approx(moved, rel=1e-5)
    after, metrics = step(state, batch_of(1))
    assert compute(metrics["skipped_steps"]) == 1.0 and np.isnan(compute(metrics["update_norm"]))
    jax.tree.map(
        np.testing.assert_array_equal, (after["params"], after["opt_state"]), (state["params"], state["opt_state"])
    )


@pytest.mark.parametrize("watched", ["loss", "update_norm"])
def test_a_spike_is_skipped_once_the_window_is_full_and_leaves_no_trace(watched: str) -> None:
    """A batch whose loss, or whose learning rate, is ten times as large; bit for bit as if it had not been there."""
    guard = GuardConfig(spike_threshold=8.0, spike_window=8)
    run = run_with(guard=guard)
    tx = make_optimizer(run.training, AXES)
    rate = jnp.full(32, 1e-3).at[jnp.array([5, 20])].set(1e-3 if watched == "loss" else 1e-1)

    def spiking(params: PyTree, batch: PyTree, rng: jax.Array | None) -> jax.Array:
        return apply(params, batch, rng) * jnp.where(batch["denoiser_ids"][0] == 1, 10.0, 1.0)

    step = jax.jit(make_train_step(run, spiking, tx, lambda step: rate[step]))
    state = init_state(params_of(), tx, 0, guard=guard)
    skipped = []
    for index in range(24):
        batch = batch_of(index)
        if watched == "loss" and index in (5, 20):
            batch["main"]["denoiser_ids"][:] = 1
        before = state
        state, metrics = step(state, batch)
        if compute(metrics["skipped_steps"]):
            skipped.append(index)
            assert compute(metrics["spikes"]) == 1.0
            for name in ("params", "opt_state", "guard"):
                jax.tree.map(np.testing.assert_array_equal, state[name], before[name])
    assert skipped == [20], "at step 5, the window is not full"


def test_a_constant_series_has_no_spikes() -> None:
    guard = GuardConfig(spike_threshold=3.0, spike_window=8)
    window, values = init_guard(guard), {"loss": jnp.float32(2.0), "update_norm": jnp.float32(1.0)}
    for _ in range(8):
        assert not is_spike(window, guard, {"loss": jnp.float32(99.0)})
        window = with_values(window, values)
    assert not is_spike(window, guard, {"loss": jnp.float32(2.004)})
    assert is_spike(window, guard, {"loss": jnp.float32(2.02)})
    assert not is_spike(window, guard, {"loss": jnp.float32(0.0)}), "a lower loss is not a spike"


def test_a_batch_without_loss_tokens_has_no_gradient() -> None:
    batch = batch_of()
    batch["main"]["decoder_loss_weights"][:] = 0
    found, metrics = gradient(run_with(z_loss=1e-2), batch)
    assert np.all(found == 0)
    assert (
        compute(metrics["loss_tokens"]) == 0
        and compute(metrics["skipped_steps"]) == 0
        and np.isnan(compute(metrics["loss"]))
    )


def test_the_schedule_drives_the_update_and_the_metric() -> None:
    run = run_with()
    schedule: Callable[[Any], jax.Array] = lambda step: jnp.asarray([0.25, 1.0])[step]  # noqa: E731
    tx = make_optimizer(run.training, AXES)
    step = jax.jit(make_train_step(run, apply, tx, schedule))
    state = init_state(params_of(), tx, 0)
    for rate in (0.25, 1.0):
        before = state
        state, metrics = step(before, batch_of())
        assert compute(metrics["learning_rate"]) == rate
        moved = np.abs(state["params"]["table"]["embedding"] - before["params"]["table"]["embedding"]).max()
        assert moved == pytest.approx(rate, rel=0.02), "Adam moves each number by the rate at first"


def test_step_transfers_no_data_to_or_from_the_host() -> None:
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
        *("loss_tokens", "learning_rate", "grad_norm", "update_norm", "skipped_steps"),
    }


def test_evaluation_has_neither_dropout_nor_smoothing() -> None:
    run = run_with(dropout_rate=0.5, label_smoothing=0.3)
    metrics = jax.jit(make_eval_step(run, apply))(params_of(), batch_of())
    assert compute(metrics["loss"]) == pytest.approx(float(mean_loss(params_of(), batch_of(), 0.0)), rel=1e-5)
    assert set(metrics) == {"loss", "z_loss", "accuracy", "loss/even", "loss/odd", "loss_tokens"}
    smoothed = dataclasses.replace(run, model=run_with().model)
    assert compute(gradient(smoothed, batch_of())[1]["loss"]) != pytest.approx(compute(metrics["loss"]), rel=1e-3)


def test_parts_keep_the_rows_of_a_device_on_it() -> None:
    """Eight rows on two devices, two parts: each part takes the same number of rows from each half, in order."""
    parts = split_rows(jnp.arange(8), 2)
    np.testing.assert_array_equal(parts, [[0, 2, 4, 6], [1, 3, 5, 7]])
    assert split_rows(jnp.zeros((8, 3)), 4).shape == (4, 2, 3)


def test_norms_by_module_and_layer() -> None:
    """Against NumPy, for a tree with stacked layers; steps that are not due or not finite have weight 0."""
    rng = np.random.default_rng(0)
    shapes = {
        "encoder": {
            "layers": {"mlp": {"wi": {"kernel": (3, 4, 5)}, "wo": {"kernel": (3, 5, 4)}}, "norm": {"scale": (3, 4)}}
        },
        "head": {"kernel": (4, 6), "bias": (6,)},
    }
    tree = jax.tree.map(lambda shape: rng.standard_normal(shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    layers = tree["encoder"]["layers"]
    mlp = [layers["mlp"][name]["kernel"] for name in ("wi", "wo")]
    expected = {
        "encoder/layers/mlp": np.sqrt(sum((x**2).sum() for x in mlp)),
        "encoder/layers/norm": np.linalg.norm(layers["norm"]["scale"]),
        "head": np.sqrt((tree["head"]["kernel"] ** 2).sum() + (tree["head"]["bias"] ** 2).sum()),
    } | {
        f"encoder/layers/{n}": np.sqrt(sum((x[n] ** 2).sum() for x in (*mlp, layers["norm"]["scale"])))
        for n in range(3)
    }
    yes, no = jnp.array(True), jnp.array(False)
    metrics = norm_metrics(lambda: {"update_norm/": tree}, yes, yes)
    assert {name: compute(mean) for name, mean in metrics.items()} == {
        f"update_norm/{name}": pytest.approx(value, rel=1e-5) for name, value in expected.items()
    }
    for due, finite in ((no, yes), (yes, no)):
        for name, mean in norm_metrics(lambda: {"update_norm/": tree}, due, finite).items():
            assert (float(mean.sum), float(mean.weight)) == (0, 0) and is_empty_norm(name, mean)


def test_step_reports_norms_at_multiples_of_the_interval_and_computes_the_same() -> None:
    run = run_with(max_gradient_norm=0.01, optimizer=AdamWConfig())
    measured = dataclasses.replace(run, monitoring=MonitoringConfig(norms_every_steps=2))
    optimizer = make_optimizer(run.training, AXES)
    states, metrics = [], []
    for each in (run, measured):
        step = jax.jit(make_train_step(each, apply, optimizer, make_schedule(each.training)))
        state = init_state(params_of(), optimizer, 0)
        for _ in range(2):
            before = state["params"]["table"]["embedding"]
            state, found = step(state, batch_of())
            metrics.append(found)
        states.append(state)
    assert all(map(np.array_equal, *map(jax.tree.leaves, states)))
    first, second = metrics[2:]
    assert first["gradient_norm/table"].weight == 0 and second["gradient_norm/table"].weight == 1
    assert compute(second["gradient_norm/table"]) == pytest.approx(compute(second["grad_norm"]), rel=1e-5)
    assert compute(second["param_norm/table"]) == pytest.approx(float(jnp.linalg.norm(before)), rel=1e-5)
    change = states[0]["params"]["table"]["embedding"] - before
    assert compute(second["update_norm/table"]) == pytest.approx(float(jnp.linalg.norm(change)), rel=1e-3)


def test_average_of_the_parameters() -> None:
    """Against the recurrence; a skipped step changes neither, and frozen parameters are their own average."""
    run = run_with(ema_decay=0.3, optimizer=AdamWConfig())
    optimizer = make_optimizer(run.training, AXES)
    step = jax.jit(make_train_step(run, apply, optimizer, make_schedule(run.training)))
    state = init_state(params_of(), optimizer, 0, averaged=True)
    expected = np.asarray(state["params"]["table"]["embedding"])
    for number in range(6):
        state, _ = step(state, batch_of(number))
        decay = min(0.3, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * np.asarray(state["params"]["table"]["embedding"])
        assert np.allclose(state["ema"]["table"]["embedding"], expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(expected, state["params"]["table"]["embedding"], rtol=1e-4)
    skipped, _ = step({**state, "params": jax.tree.map(lambda x: x * jnp.nan, state["params"])}, batch_of())
    assert np.array_equal(skipped["ema"]["table"]["embedding"], state["ema"]["table"]["embedding"])
    unchanged = moving_average(state["params"], state["params"], 0.999, jnp.array(10**6))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (unchanged, state["params"]))))
