"""Sums of the loss against their definition in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.model_output import ModelOutput, OutputProjection
from t5x_like.monitoring.metrics import WeightedMean, add, compute
from t5x_like.sharding.loss_chunks import MAX_LOGITS_BYTES, loss_chunk_tokens
from t5x_like.training.losses import (
    batch_metrics,
    sub_batch_metrics,
    summed_loss,
)

ROWS, LENGTH, VOCABULARY = 6, 5, 11
NAMES = ("r", "s", "x")


def example(seed: int = 0, stack: str = "decoder") -> tuple[np.ndarray, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((ROWS, LENGTH, VOCABULARY)).astype(np.float32) * 3
    batch = {
        f"{stack}_target_tokens": rng.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32),
        f"{stack}_loss_weights": rng.integers(0, 2, (ROWS, LENGTH)).astype(np.int32),
        "denoiser_ids": np.array([0, 2, 0, 2, 2, 0], np.int32),
    }
    np.put_along_axis(logits[::2], batch[f"{stack}_target_tokens"][::2, :, None], 9.0, axis=-1)
    return logits, batch


def sums(logits: np.ndarray, batch: dict[str, Any], z_loss: float = 0.0) -> dict[str, WeightedMean]:
    return sub_batch_metrics(
        ModelOutput(jnp.asarray(logits)), batch, z_loss=z_loss, label_smoothing=0.0, denoisers=NAMES
    )


@pytest.mark.parametrize("stack", ["decoder", "encoder"])
def test_sums_are_weighted_sums_over_tokens(stack: str) -> None:
    logits, batch = example(stack=stack)
    log_z = np.log(np.sum(np.exp(logits.astype(np.float64)), axis=-1))
    targets, weights = batch[f"{stack}_target_tokens"], batch[f"{stack}_loss_weights"]
    entropy = (log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]) * weights
    found = sums(logits, batch, z_loss=1e-2)
    assert compute(found["loss"]) == pytest.approx(entropy.sum() / weights.sum(), rel=1e-5)
    assert compute(found["z_loss"]) == pytest.approx((1e-2 * log_z**2 * weights).sum() / weights.sum(), rel=1e-5)
    right = (logits.argmax(-1) == targets) * weights
    assert 0 < right.sum() < weights.sum()
    assert float(found["accuracy"].sum) == right.sum() and float(found["accuracy"].weight) == weights.sum()
    for index, name in enumerate(NAMES):
        rows = batch["denoiser_ids"] == index
        assert float(found[f"loss/{name}"].sum) == pytest.approx(entropy[rows].sum(), rel=1e-5)
        assert float(found[f"loss/{name}"].weight) == weights[rows].sum()
    assert np.isnan(compute(found["loss/s"])), "a denoiser that was not drawn has no loss, rather than 0"


def test_positions_of_packed_rows_count_for_their_own_denoiser() -> None:
    logits, batch = example()
    weights = batch["decoder_loss_weights"]
    whole = {name: x for name, x in sums(logits, batch).items() if name.startswith("loss/")}
    by_position = {**batch, "denoiser_ids": np.broadcast_to(batch["denoiser_ids"][:, None], weights.shape)}
    jax.tree.map(np.testing.assert_array_equal, {name: sums(logits, by_position)[name] for name in whole}, whole)

    ids = np.random.default_rng(1).integers(-1, len(NAMES), weights.shape).astype(np.int32)
    found = sums(logits, {**batch, "denoiser_ids": ids})
    per_token = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), batch["decoder_target_tokens"][..., None], axis=-1
    )[..., 0]
    for index, name in enumerate(NAMES):
        of_this = weights * (ids == index)
        assert float(found[f"loss/{name}"].sum) == pytest.approx((per_token * of_this).sum(), rel=1e-5)
        assert float(found[f"loss/{name}"].weight) == of_this.sum() > 0


def test_rows_without_denoiser_ids_count_for_the_total_only() -> None:
    logits, batch = example()
    found = sums(logits, {name: x for name, x in batch.items() if name != "denoiser_ids"})
    assert float(found["loss"].weight) > 0
    assert all(float(found[f"loss/{name}"].weight) == 0 for name in NAMES)


def test_sub_batches_of_other_lengths_add_to_one_sum_and_have_their_own_dropout_keys() -> None:
    logits, batch = example()
    short = {name: x[:2, :3] if x.ndim == 2 else x[:2] for name, x in batch.items()}
    keys = []

    def apply(params: Any, batch: Any, rng: Any) -> jax.Array:
        keys.append(None if rng is None else jax.random.key_data(rng).tolist())
        rows, length = batch["decoder_target_tokens"].shape
        return params[:rows, :length]

    options = {"z_loss": 0.0, "label_smoothing": 0.0, "denoisers": NAMES}
    found, _ = batch_metrics(apply, jnp.asarray(logits), {"long": batch, "short": short}, jax.random.key(0), **options)
    expected = add(sums(logits, batch), sums(logits[:2, :3], short))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    assert keys[0] != keys[1]
    batch_metrics(apply, jnp.asarray(logits), {"long": batch}, None, **options)
    assert keys[2] is None


def test_loss_in_chunks_has_the_sums_and_the_gradient_of_whole_logits() -> None:
    """Two sub-batches, of which the logits of one are not to be split: it has no projection."""
    rng = np.random.default_rng(2)
    logits, batch = example()
    short = {name: x[:2, :3] if x.ndim == 2 else x[:2] for name, x in batch.items()}
    params = {"states": rng.standard_normal((ROWS, LENGTH, 4)), "kernel": rng.standard_normal((4, VOCABULARY))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)

    def apply(params: Any, batch: Any, rng: Any) -> ModelOutput:
        rows, length = batch["decoder_target_tokens"].shape
        states = params["states"][:rows, :length]
        projection = OutputProjection(states, params["kernel"]) if rows == ROWS else None
        return ModelOutput(states @ params["kernel"], loss_coefficient=0.7, projection=projection)

    def loss(params: Any, chunk_tokens: int) -> Any:
        batches = {"long": batch, "short": short}
        options = {"z_loss": 1e-2, "label_smoothing": 0.1, "denoisers": NAMES, "chunk_tokens": chunk_tokens}
        metrics, coefficients = batch_metrics(apply, params, batches, None, **options)
        return summed_loss(metrics, coefficients, metrics), metrics

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (expected, metrics), d_params = gradient(params, 0)
    (found, metrics_in_chunks), d_params_in_chunks = gradient(params, 7)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics_in_chunks, metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), d_params_in_chunks, d_params)


def test_logits_are_whole_up_to_a_size_unless_the_run_chooses() -> None:
    at_limit = MAX_LOGITS_BYTES // (4 * 32_768)
    assert loss_chunk_tokens(None, at_limit, 256, 32_768) == 0
    assert loss_chunk_tokens(None, at_limit + 1, 256, 32_768) == 512, "64 MiB of logits"
    assert loss_chunk_tokens(None, at_limit + 1, 256, 8 * 32_768) == 256, "as many tokens as the head is wide"
    assert loss_chunk_tokens(None, at_limit + 1, 2048, 32_768) == 2048
    assert loss_chunk_tokens(0, 10 * at_limit, 256, 32_768) == 0 and loss_chunk_tokens(64, 100, 256, 1000) == 64


def test_added_means_are_weighted_by_tokens() -> None:
    total = add({"a": WeightedMean(6.0, 2.0), "only": WeightedMean(1.0, 1.0)}, {"a": WeightedMean(10.0, 8.0)})
    assert compute(total["a"]) == 1.6 and compute(total["only"]) == 1.0
    assert np.isnan(compute(WeightedMean(0.0, 0.0)))
