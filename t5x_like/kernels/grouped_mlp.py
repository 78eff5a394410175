"""MLPs of several experts on rows sorted by expert: each row with its own expert's kernels, none dropped.

Groups have any sizes, and arrays have static shapes. Each platform has one product that skips what belongs to no group:

- TPUs: XLA's ragged product, and JAX's `megablox` kernel for the gradient of the kernels, which XLA's rule would
  compute for all experts and all rows.
- CPUs: loops over tiles of rows (`kernels.tiled_product`).
- NVIDIA GPUs from Ampere on: kernels for Triton (`kernels.triton_product`). Others are refused.

An exported program that does not know the number of rows has the loops of CPUs on GPUs as well: the grid of a kernel
for Triton is static. The loops wait for the host at each tile there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.tiled_product import tiled_product
from t5x_like.kernels.triton_product import refuse_old_gpus, triton_product

ROW_TILE = 128
"""On TPUs the number of rows must be a multiple of this."""
_KERNEL_TILE = 512


class ExpertKernels(NamedTuple):
    """Kernels of MLPs: `wi_0` and of gated ones `wi_1` [experts, inputs, hidden], `wo` [experts, hidden, outputs]."""

    wi_0: Array
    wi_1: Array | None
    wo: Array


class Product(Protocol):
    """Product [N, f] of each row with the kernel of its group; undefined for rows after the last group."""

    def __call__(self, x_Nxd: Array, kernels_Exdxf: Array, sizes_E: Array, /) -> Array: ...


def grouped_mlp(
    rows_Nxd: Array,
    sizes_E: Array,
    kernels: ExpertKernels,
    activate: Callable[[Array], Array],
    platform: str | None = None,
) -> Array:
    """Return (activate(x wi_0) * (x wi_1)) wo, or without a gate activate(x wi_0) wo, of each row with the kernels of
    its expert.

    Args:
      rows_Nxd: Rows, those of the first expert first. Rows after the last group are ignored.
      sizes_E: int32, number of rows of each expert.
      kernels: Kernels in the type of the rows.
      activate: Elementwise function.
      platform: Platform of the devices. None: chosen when the program is compiled, for programs of several platforms;
        a backward pass would then keep the arrays of all of them.

    Returns:
      [N, d] in the type of the rows; 0 for ignored rows.

    Raises:
      UserError: a GPU is older than Ampere or not one of NVIDIA.
      ValueError: there is no product for the platform.
    """
    knows_rows = isinstance(rows_Nxd.shape[0], int)
    on_gpus = triton_product if knows_rows else tiled_product
    by_platform = {
        "tpu": functools.partial(_ragged_mlp, activate=activate),
        "cpu": functools.partial(_sorted_mlp, activate=activate, product=tiled_product),
        "cuda": functools.partial(_sorted_mlp, activate=activate, product=on_gpus),
    }
    if knows_rows and platform in (None, "gpu", "cuda"):
        refuse_old_gpus()
    if platform is None:
        return jax.lax.platform_dependent(rows_Nxd, sizes_E, kernels, **by_platform)
    # Devices call the platform "gpu" and the compiler calls it "cuda".
    name = "cuda" if platform == "gpu" else platform
    if name not in by_platform:
        raise ValueError(f"experts: found the platform {platform!r}, expected one of gpu, {', '.join(by_platform)}")
    return by_platform[name](rows_Nxd, sizes_E, kernels)


def _ragged_mlp(rows: Array, sizes: Array, kernels: ExpertKernels, activate: Callable[[Array], Array]) -> Array:
    padded = jnp.pad(rows, ((0, -rows.shape[0] % ROW_TILE), (0, 0)))
    return _sorted_mlp(padded, sizes, kernels, activate, ragged_product)[: rows.shape[0]]


def _sorted_mlp(
    rows: Array, sizes: Array, kernels: ExpertKernels, activate: Callable[[Array], Array], product: Product
) -> Array:
    # What the products return for ignored rows is undefined, in the backward pass as well.
    used = (jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None]
    x = jnp.where(used, rows, 0)
    # Undefined rows could be NaN, which a product with 0 in a gradient would spread; `where` removes them before each
    # product.
    hidden = activate(product(x, kernels.wi_0, sizes))
    if kernels.wi_1 is not None:
        hidden = hidden * product(x, kernels.wi_1, sizes)
    return jnp.where(used, product(jnp.where(used, hidden, 0), kernels.wo, sizes), 0)


@jax.custom_vjp
def ragged_product(x_Nxd: Array, kernels_Exdxf: Array, sizes_E: Array) -> Array:
    """Return the product [N, f] of each row with the kernel of its group; undefined for rows after the last group."""
    return jax.lax.ragged_dot(x_Nxd, kernels_Exdxf, sizes_E)


def _ragged_forward(x: Array, kernels: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return jax.lax.ragged_dot(x, kernels, sizes), (x, kernels, sizes)


def _ragged_backward(residuals: tuple[Array, Array, Array], d_out: Array) -> tuple[Array, Array, None]:
    x, kernels, sizes = residuals
    d_x = jax.lax.ragged_dot(d_out, jnp.swapaxes(kernels, 1, 2), sizes)
    return d_x, kernel_gradient(x, d_out, sizes).astype(kernels.dtype), None


ragged_product.defvjp(_ragged_forward, _ragged_backward)


def kernel_gradient(x_Nxd: Array, d_out_Nxf: Array, sizes_E: Array, *, interpret: bool = False) -> Array:
    """Return the gradient of the kernels, float32 [E, d, f]: the product of x and d_out over the rows of each group.

    Args:
      x_Nxd: Inputs of the product; N is a multiple of `ROW_TILE`.
      d_out_Nxf: Gradient of its result.
      sizes_E: int32, number of rows of each group.
      interpret: Run the kernel on another platform than a TPU, for tests.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiles = (ROW_TILE, min(_KERNEL_TILE, x_Nxd.shape[1]), min(_KERNEL_TILE, d_out_Nxf.shape[1]))
    return tgmm(x_Nxd.T, d_out_Nxf, sizes_E, jnp.float32, tiles, interpret=interpret)
