"""The product of activations with a parameter, with a backward pass whose operands need no transposed copies."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: Array, kernel: Array, contracted: int, dtype: jnp.dtype) -> Array:
    """Contracts the last `contracted` dimensions of x with the first ones of kernel, in the type of x.

    JAX's own rule writes the kernel's gradient with the cotangent first, for which XLA transposes the cotangent of all
    tokens in memory; on CPU that costs more than the product. Here x comes first, as cotangents are laid out already.

    Args:
      x: [..., inputs], float.
      kernel: [inputs, outputs], float32 or the type of x; cast to that.
      dtype: Of the result. Its cotangent is cast to the type of x for the backward products; the kernel's gradient is
        accumulated and returned in the kernel's own type.

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
    # The product itself and not `matmul` again: a remat policy that keeps products does not see into the latter.
    return _product(x, kernel, contracted, dtype), (x, kernel)


def _backward(
    contracted: int, dtype: jnp.dtype, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    g = cotangent.astype(x.dtype)
    outputs = kernel.ndim - contracted
    rows = range(x.ndim - contracted)
    d_x = _dot(g, kernel.astype(x.dtype), _last(g, outputs), _last(kernel, outputs), x.dtype)
    return d_x, _dot(x, g, rows, rows, kernel.dtype)


matmul.defvjp(_forward, _backward)
