"""Matrix product with its own backward pass: gradients equal JAX's, and remat policies recognize it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.ad_checkpoint import print_saved_residuals

from t5x_like.kernels.matmul import matmul

FLOAT32 = jnp.dtype(jnp.float32)


def test_matmul_gradients_equal_those_of_einsum() -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (2, 3, 4, 5)), jax.random.normal(keys[1], (4, 5, 6))

    def loss(product: Array) -> Array:
        return jnp.sum(jnp.sin(product))

    found = jax.grad(lambda x, k: loss(matmul(x, k, 2, FLOAT32)), argnums=(0, 1))(x, kernel)
    expected = jax.grad(lambda x, k: loss(jnp.einsum("blhd,hdm->blm", x, k)), argnums=(0, 1))(x, kernel)
    for actual, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, reference, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_transposed_kernel_is_computed_in_bfloat16() -> None:
    """As of a head that is the table of embeddings."""
    random = np.random.default_rng(0)
    x_BxTxd, table_Vxd = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((8, 64, 32), (288, 32)))

    def value(table: Array, dtype: jnp.dtype) -> Array:
        logits = matmul(x_BxTxd.astype(dtype), table.T, 1, jnp.dtype(jnp.float32))
        return jnp.sum(jnp.tanh(logits / 8))

    gradient = jax.jit(jax.grad(value), static_argnums=1)
    found, expected = (gradient(table_Vxd, jnp.dtype(name)) for name in ("bfloat16", "float32"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_remat_policy_for_products_keeps_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    def loss(x: Array, first: Array, second: Array) -> Array:
        return jnp.sum(jnp.sin(matmul(jnp.tanh(matmul(x, first, 1, FLOAT32)), second, 1, FLOAT32)))

    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    print_saved_residuals(jax.checkpoint(loss, policy=policy), jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones((4, 5)))
    kept = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "output of dot_general" in line]
    assert kept == ["f32[2,4]", "f32[2,5]"]
