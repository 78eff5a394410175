"""Products of 8-bit operands: rounding as stated, gradients of kernels that are not rounded, and a model of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.model_examples import model, parameters, tokens

from t5x_like.kernels.matmul import Quantization, matmul
from t5x_like.models import inference_layout
from t5x_like.models.factory import abstract_model, bind_params

qwix = pytest.importorskip("qwix")


def rounded(x: np.ndarray, axes: tuple[int, ...], kind: str, *, gradient: bool = False) -> np.ndarray:
    """Return the values that 8 bits represent, with one scale for the contracted axes."""
    dtype = {"int8": jnp.int8, "float8": jnp.float8_e5m2 if gradient else jnp.float8_e4m3fn}[kind]
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    found = np.asarray(qwix.dequantize(qwix.quantize(jnp.asarray(x), dtype, channelwise_axes=kept)), np.float64)
    largest = np.abs(x).max(axis=axes, keepdims=True)
    # Half a step of integers; half of the distance of two floats with 3 or 2 bits of mantissa.
    bound = largest / 254 if kind == "int8" else np.abs(x) * 2.0 ** (-3 if gradient else -4) + largest * 1e-4
    assert np.all(np.abs(found - x) <= 1.01 * bound) and np.any(found != x)
    return found


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_products_are_those_of_rounded_operands(kind: Quantization) -> None:
    rng = np.random.default_rng(0)
    # Tokens of very different sizes, which one scale for all of them would round to nothing.
    x = (rng.normal(size=(3, 5, 16)) * 10.0 ** rng.integers(-3, 3, (3, 5, 1))).astype(np.float32)
    kernel = rng.normal(size=(16, 2, 8)).astype(np.float32)
    g = rng.normal(size=(3, 5, 2, 8)).astype(np.float32)
    y, backward = jax.vjp(lambda x, kernel: matmul(x, kernel, 1, jnp.dtype(jnp.float32), kind), x, kernel)
    expected = np.einsum("bli,ihd->blhd", rounded(x, (2,), kind), rounded(kernel, (0,), kind))
    of_token = np.abs(expected).max(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(y / of_token, expected / of_token, atol=1e-4)
    d_x, d_kernel = backward(jnp.asarray(g))
    expected_x = np.einsum("blhd,ihd->bli", rounded(g, (2, 3), kind, gradient=True), rounded(kernel, (1, 2), kind))
    np.testing.assert_allclose(d_x, expected_x, rtol=2e-4, atol=1e-4 * np.abs(expected_x).max())
    np.testing.assert_allclose(d_kernel, np.einsum("bli,blhd->ihd", x, g), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_a_model_computes_the_same_in_the_layout_of_inference() -> None:
    """And nearly what it computes without rounding."""
    plain = model("decoder", "rope")
    config = dataclasses.replace(plain, decoder=dataclasses.replace(plain.decoder, quantization="int8"))
    batch = {"decoder_input_tokens": tokens(0, 2, 7)}
    spec = abstract_model(config)
    found = bind_params(spec.graphdef, parameters(config))(batch)
    exact = bind_params(abstract_model(plain).graphdef, parameters(plain))(batch)
    assert 0 < np.abs(found - exact).max() < 0.1 * np.abs(exact).max()
    layout, _, _ = inference_layout.abstract_layout(spec.graphdef, spec.params, fuse=True)
    fused = inference_layout.convert_params(spec.graphdef, parameters(config), fuse=True)
    decoder = nnx.merge(layout, fused)
    cache = decoder.start_decoding(None, None, 2, 8, widest_step=7)
    logits, _ = decoder.decode(batch["decoder_input_tokens"], cache)
    # An operand whose sum differs by rounding can be one of 255 levels off, in few positions.
    differences = np.abs(logits - found) / np.abs(found).max()
    assert np.median(differences) < 1e-4 and differences.max() < 0.02
