"""Divergence from a teacher of which only the most likely tokens are stored."""

import jax
import numpy as np
import pytest
from helpers.config_examples import changed
from helpers.parallel_programs import run_for

from t5x_like.config import DistillationConfig, GuardConfig, ShardingConfig, batch_spec
from t5x_like.config.validation import validate
from t5x_like.training.distillation import kl_divergence, top_k_divergence

VOCABULARY, TEMPERATURE = 40, 2.0


def logits(seed, scale=3.0):
    return np.float32(scale * np.random.default_rng(seed).normal(size=(3, 5, VOCABULARY)))


def softmax(x):
    """Return the probabilities at the temperature, in float64."""
    exponential = np.exp((x - x.max(-1, keepdims=True)) / np.float64(TEMPERATURE))
    return exponential / exponential.sum(-1, keepdims=True)


def stored(teacher, k):
    ids = np.argsort(-teacher, axis=-1)[..., :k]
    return ids, np.float32(np.log(np.take_along_axis(softmax(teacher), ids, -1)))


@jax.jit
def of_top_k(ids, log_probs, student):
    return jax.value_and_grad(lambda x: top_k_divergence(ids, log_probs, x, TEMPERATURE).sum())(student)


@jax.jit
def live(teacher, student):
    return jax.value_and_grad(lambda x: kl_divergence(teacher, x, TEMPERATURE).sum())(student)


def coarse_divergence(teacher, student, k):
    """Return the sum of KL(p | q) over the targets, where the tokens after the k most likely ones of p are one
    outcome."""
    order = np.argsort(-teacher, axis=-1)
    p, q = (np.take_along_axis(softmax(x), order, -1) for x in (teacher, student))
    p, q = (np.concatenate([x[..., :k], x[..., k:].sum(-1, keepdims=True)], -1) for x in (p, q))
    return np.sum(p * (np.log(p) - np.log(q)))


@pytest.mark.parametrize("k", [1, 7])
def test_tokens_that_are_not_stored_count_as_one_outcome(k):
    teacher, student = logits(0), logits(1)
    found, gradient = of_top_k(*stored(teacher, k), student)
    np.testing.assert_allclose(found, coarse_divergence(teacher, student, k), rtol=1e-5)
    # A lower bound of the divergence over the vocabulary, by the log sum inequality.
    assert found < live(teacher, student)[0]
    direction, step = logits(2), 1e-4
    ends = [coarse_divergence(teacher, student + sign * step * direction.astype(np.float64), k) for sign in (1, -1)]
    np.testing.assert_allclose(np.vdot(gradient, direction), (ends[0] - ends[1]) / (2 * step), rtol=1e-4)


def test_all_tokens_give_the_divergence_of_a_live_teacher():
    teacher, student = logits(0), logits(1)
    for found, expected in zip(of_top_k(*stored(teacher, VOCABULARY), student), live(teacher, student), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_certain_teachers_and_students_have_finite_gradients():
    """If the k tokens have all of the probability, the remainder is below the rounding of float32."""
    for teacher, student in ((logits(0, 300.0), logits(1)), (logits(0), 100.0 * logits(0)), (logits(0), logits(0))):
        found, gradient = of_top_k(*stored(teacher, 7), student)
        assert np.isfinite(found) and np.isfinite(gradient).all()


def test_batches_have_the_stored_tokens_and_invalid_numbers_are_refused():
    run = run_for("decoder", ShardingConfig())
    distillation = DistillationConfig(teacher="teacher", model=run.model, top_k=8)
    run = changed(run, "training.distillation", distillation)
    before = [problem.where for problem in validate(run)]
    features = batch_spec(run)["main"]
    assert (features["teacher_ids"].shape, features["teacher_ids"].dtype) == ((16, 32, 8), "int32")
    assert (features["teacher_log_probs"].shape, features["teacher_log_probs"].dtype) == ((16, 32, 8), "float32")
    for path, value, where in (
        ("training.distillation.top_k", 513, "training.distillation.top_k"),
        ("training.guard", GuardConfig(policy="rollback"), "training.guard.policy"),
    ):
        problems = [problem.where for problem in validate(changed(run, path, value))]
        assert where in problems and where not in before
