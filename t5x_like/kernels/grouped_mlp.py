"""MLPs of several experts on rows sorted by expert: each row with its own expert's kernels, none dropped.

Groups have any sizes, and arrays have static shapes. On TPUs the products skip what belongs to no group: XLA's ragged
product, and JAX's `megablox` kernel for the gradient of the kernels, which XLA's rule would compute for all experts and
all rows. On CPUs loops over tiles of rows multiply hardly more than the rows of the groups (`kernels.tiled_product`).

On GPUs, where such loops would wait for the host at each tile, the rows are cut into blocks of one expert each, so that
all products are batches of equal matrix products. A block has half the mean number of rows per expert: at most
`rows / block + experts` blocks are needed, whatever the sizes, which is half more work than with even groups (Gale et
al. 2023, MegaBlocks, has the same layout). Each block has a copy of its kernels, so that smaller blocks would need more
memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.tiled_product import tiled_product

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
    """
    by_platform = {
        "tpu": functools.partial(_ragged_mlp, activate=activate),
        "cpu": functools.partial(_sorted_mlp, activate=activate, product=tiled_product),
    }
    others = functools.partial(_blocked_mlp, activate=activate)
    if platform is not None:
        return by_platform.get(platform, others)(rows_Nxd, sizes_E, kernels)
    return jax.lax.platform_dependent(rows_Nxd, sizes_E, kernels, default=others, **by_platform)


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


def _blocked_mlp(rows: Array, sizes: Array, kernels: ExpertKernels, activate: Callable[[Array], Array]) -> Array:
    count, experts = rows.shape[0], sizes.shape[0]
    # An exported program may not know the number of rows.
    block = max(1, -(-count // (2 * experts))) if isinstance(count, int) else 8
    num_blocks = -(-count // block) + experts
    # Each expert fills whole blocks; the last one of an expert is filled up with zeros.
    blocks_E = (sizes + block - 1) // block
    first_block_E, first_row_E = jnp.cumsum(blocks_E) - blocks_E, jnp.cumsum(sizes) - sizes
    # Blocks after the last one belong to the last expert and have no rows.
    expert_N = jnp.minimum(_group_of(blocks_E, num_blocks), experts - 1)
    within = (jnp.arange(num_blocks) - first_block_E[expert_N])[:, None] * block + jnp.arange(block)
    used = (within < sizes[expert_N][:, None])[..., None]
    x = jnp.where(used, jnp.take(rows, first_row_E[expert_N][:, None] + within, axis=0, mode="clip"), 0)

    @jax.checkpoint
    def product(x: Array, kernels: Array) -> Array:
        # The backward pass copies the kernels of the blocks again, instead of keeping the copies.
        return jnp.einsum("nbd,ndf->nbf", x, kernels[expert_N])

    hidden = activate(product(x, kernels.wi_0))
    if kernels.wi_1 is not None:
        hidden = hidden * product(x, kernels.wi_1)
    out = product(hidden, kernels.wo).reshape(num_blocks * block, -1)

    row = jnp.arange(count)
    expert = jnp.minimum(_group_of(sizes, count), experts - 1)
    # Where each row was put: the first place of its expert's blocks plus its number within the expert.
    place = first_block_E[expert] * block + row - first_row_E[expert]
    return jnp.where((row < jnp.sum(sizes))[:, None], jnp.take(out, place, axis=0, mode="clip"), 0)


def _group_of(sizes: Array, count: int) -> Array:
    """Return the group of each of `count` positions; the number of groups for positions after the last one."""
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(count), side="right")
