"""Cross-entropy, compared with its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.kernels.cross_entropy import cross_entropy

VOCABULARY = 17


def example(dtype=jnp.float32):
    random = np.random.default_rng(0)
    logits = jnp.asarray(4 * random.normal(size=(2, 5, VOCABULARY)), dtype)
    return logits, jnp.asarray(random.integers(0, VOCABULARY, (2, 5)), jnp.int32)


def naive(logits, targets, z_loss, smoothing):
    """Compute the Kullback-Leibler divergence from the smoothed target distribution, and the z term."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    log_p = logits - log_z[..., None]
    one_hot = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    wanted = (1 - smoothing) * one_hot + smoothing / (logits.shape[-1] - 1) * (1 - one_hot)
    divergence = jnp.sum(jax.scipy.special.xlogy(wanted, wanted) - wanted * log_p, axis=-1)
    return divergence, z_loss * log_z**2


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_match_the_definition(z_loss, smoothing):
    logits, targets = example()
    weights = np.random.default_rng(1).normal(size=(2, 2, 5))

    def weighted(function, logits):
        loss, z = function(logits)
        return jnp.sum(weights[0] * loss + weights[1] * z), (loss, z)

    with jax.enable_x64(True):
        (_, expected), gradient_64 = jax.jit(
            jax.value_and_grad(lambda x: weighted(lambda y: naive(y, targets, z_loss, smoothing), x), has_aux=True)
        )(jnp.asarray(logits, jnp.float64))
    (_, found), gradient = jax.jit(
        jax.value_and_grad(
            lambda x: weighted(lambda y: cross_entropy(y, targets, z_loss=z_loss, label_smoothing=smoothing), x),
            has_aux=True,
        )
    )(logits)
    for actual, reference in zip(found, expected, strict=True):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, reference, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(gradient, gradient_64, atol=2e-6)


def test_half_precision_logits_give_float32_losses_and_half_precision_gradients():
    logits, targets = example(jnp.bfloat16)
    loss, gradient = jax.value_and_grad(lambda x: cross_entropy(x, targets)[0].sum())(logits)
    expected = naive(logits.astype(jnp.float32), targets, 0.0, 0.0)[0].sum()
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_large_logits_do_not_overflow():
    loss, gradient = jax.value_and_grad(lambda x: cross_entropy(x, jnp.array([0]), z_loss=1e-4)[0].sum())(
        jnp.array([[1e4, -1e4, 0.0]])
    )
    assert loss == 0.0 and np.isfinite(gradient).all()


def test_backward_pass_keeps_no_array_of_the_size_of_the_logits_but_the_logits():
    logits, targets = example()
    _, backward = jax.vjp(lambda x: cross_entropy(x, targets, z_loss=1e-4, label_smoothing=0.1), logits)
    kept = [leaf for leaf in jax.tree.leaves(backward) if getattr(leaf, "shape", ()) == logits.shape]
    assert len(kept) == 1
