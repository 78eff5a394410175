"""Product of activations with a parameter, with a backward pass that needs no transposed copies of its operands."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: Array, kernel: Array, contracted: int, dtype: jnp.dtype) -> Array:
    """Contract the last `contracted` dimensions of x with the first ones of kernel, in the type of x.

    JAX's own rule computes the kernel's gradient with the cotangent as first operand, for which XLA transposes the
    cotangent of all tokens in memory; on CPU that costs more than the product. Here x is the first operand, which
    matches the layout that both already have.

    Args:
      x: float [..., inputs].
      kernel: [inputs, outputs], float32 or the type of x; cast to the type of x.
      contracted: Number of contracted dimensions.
      dtype: Type of the result. The result's cotangent is cast to the type of x for the backward products; the kernel's
        gradient is accumulated and returned in the kernel's own type.

    Returns:
      [..., outputs] in `dtype`.
    """
    return _product(x, kernel, contracted, dtype)


def _product(x: Array, kernel: Array, contracted: int, dtype: jnp.dtype) -> Array:
    return _dot(x, kernel.astype(x.dtype), _last(x, contracted), range(contracted), dtype)


def _dot(a: Array, b: Array, a_dims: range, b_dims: range, dtype: jnp.dtype) -> Array:
    return jax.lax.dot_general(a, b, ((tuple(a_dims), tuple(b_dims)), ((), ())), preferred_element_type=dtype)


def _last(x: Array, count: int) -> range:
    return range(x.ndim - count, x.ndim)


def _forward(x: Array, kernel: Array, contracted: int, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    # `_product` and not `matmul`: a remat policy that keeps products does not look inside a custom_vjp.
    return _product(x, kernel, contracted, dtype), (x, kernel)


def _backward(
    contracted: int, dtype: jnp.dtype, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    g = cotangent.astype(x.dtype)
    outputs = kernel.ndim - contracted
    tokens = range(x.ndim - contracted)
    # Both gradients contract without moving dimensions: d_x = g kernel^T over the outputs, d_kernel = x^T g over the
    # tokens.
    d_x = _dot(g, kernel.astype(x.dtype), _last(g, outputs), _last(kernel, outputs), x.dtype)
    return d_x, _dot(x, g, tokens, tokens, kernel.dtype)


matmul.defvjp(_forward, _backward)
