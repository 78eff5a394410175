"""Product of activations with a parameter, with a backward pass that needs no transposed copies of its operands."""

from __future__ import annotations

import functools
from typing import Literal, assert_never

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

Quantization = Literal["int8", "float8"]
"""Type of the operands of a product: 8-bit integers; or 8-bit floats, e4m3 and, for gradients, e5m2."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(
    x: Array, kernel: Array, contracted: int, dtype: jnp.dtype, quantization: Quantization | None = None
) -> Array:
    """Contract the last `contracted` dimensions of x with the first ones of kernel, in the type of x.

    JAX's own rule computes the kernel's gradient with the cotangent as first operand, for which XLA transposes the
    cotangent of all tokens in memory; on CPU that costs more than the product. Here x is the first operand, which
    matches the layout that both already have.

    Args:
      x: float [..., inputs].
      kernel: [inputs, outputs], float32 or the type of x; cast to the type of x.
      contracted: Number of contracted dimensions.
      dtype: Type of the result. The result's cotangent is cast to the type of x for the backward products; the kernel's
        gradient is accumulated in float32 and returned in the kernel's own type.
      quantization: Round the operands of the product, and of that with the cotangent which is the gradient of x, to 8
        bits by qwix. Each token and each output (in the gradient each token and each input) has a scale, its largest
        absolute value. The gradient of the kernel is computed from operands that are not rounded, since errors in it
        add up over the steps. None: no rounding.

    Returns:
      [..., outputs] in `dtype`.
    """
    return _product(x, kernel, contracted, dtype, quantization)


def _product(x: Array, kernel: Array, contracted: int, dtype: jnp.dtype, quantization: Quantization | None) -> Array:
    a_dims, b_dims = _last(x, contracted), range(contracted)
    if quantization is None:
        return _dot(x, kernel.astype(x.dtype), a_dims, b_dims, dtype)
    forward, _ = _types(quantization)
    return _quantized_dot(x, kernel.astype(x.dtype), a_dims, b_dims, (forward, forward)).astype(dtype)


def _dot(a: Array, b: Array, a_dims: range, b_dims: range, dtype: jnp.dtype) -> Array:
    return jax.lax.dot_general(a, b, ((tuple(a_dims), tuple(b_dims)), ((), ())), preferred_element_type=dtype)


def _types(quantization: Quantization) -> tuple[DTypeLike, DTypeLike]:
    """Return the types of activations and kernels, and of gradients."""
    match quantization:
        case "int8":
            return jnp.int8, jnp.int8
        case "float8":
            return jnp.float8_e4m3fn, jnp.float8_e5m2
        case unknown:
            assert_never(unknown)


def _quantized_dot(a: Array, b: Array, a_dims: range, b_dims: range, types: tuple[DTypeLike, DTypeLike]) -> Array:
    """Return the product of operands rounded to 8 bits, float32."""
    import qwix

    def rounded(x: Array, dims: range, qtype: DTypeLike) -> qwix.QArray:
        kept = [dim for dim in range(x.ndim) if dim not in dims]
        return qwix.quantize(x.astype(jnp.float32), qtype, channelwise_axes=kept)

    numbers = ((tuple(a_dims), tuple(b_dims)), ((), ()))
    product: Array = qwix.dot_general(rounded(a, a_dims, types[0]), rounded(b, b_dims, types[1]), numbers)
    return product


def _last(x: Array, count: int) -> range:
    return range(x.ndim - count, x.ndim)


def _forward(
    x: Array, kernel: Array, contracted: int, dtype: jnp.dtype, quantization: Quantization | None
) -> tuple[Array, tuple[Array, Array]]:
    # `_product` and not `matmul`: a remat policy that keeps products does not look inside a custom_vjp.
    return _product(x, kernel, contracted, dtype, quantization), (x, kernel)


def _backward(
    contracted: int,
    dtype: jnp.dtype,
    quantization: Quantization | None,
    residuals: tuple[Array, Array],
    cotangent: Array,
) -> tuple[Array, Array]:
    x, kernel = residuals
    g = cotangent.astype(x.dtype)
    outputs = kernel.ndim - contracted
    tokens = range(x.ndim - contracted)
    # Both gradients contract without moving dimensions: d_x = g kernel^T over the outputs, d_kernel = x^T g over the
    # tokens.
    g_dims, kernel_dims = _last(g, outputs), _last(kernel, outputs)
    if quantization is None:
        d_x = _dot(g, kernel.astype(x.dtype), g_dims, kernel_dims, x.dtype)
    else:
        forward, gradient = _types(quantization)
        d_x = _quantized_dot(g, kernel.astype(x.dtype), g_dims, kernel_dims, (gradient, forward)).astype(x.dtype)
    d_kernel = _dot(x, g, tokens, tokens, jnp.dtype(jnp.float32))
    if x.dtype != jnp.float32:
        # XLA makes a product and its transposition, as of a head that is the table of embeddings, one product. That of
        # bfloat16 over the tokens of several rows is one that it cannot compute on CPUs (jaxlib 0.10.2).
        d_kernel = jax.lax.platform_dependent(d_kernel, cpu=jax.lax.optimization_barrier, default=lambda x: x)
    # Rounded after the sum over the tokens of all devices.
    return d_x, d_kernel.astype(kernel.dtype)


matmul.defvjp(_forward, _backward)
