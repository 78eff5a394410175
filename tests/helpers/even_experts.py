"""MLPs of experts for which XLA's count of FLOPs is exact, for tests of estimates."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from t5x_like.kernels.grouped_mlp import ExpertKernels


def even_experts(
    rows_Nxd: Array, sizes_E: Array, kernels: ExpertKernels, activate: Callable[[Array], Array], platform: str | None
) -> Array:
    """Return the MLPs of experts with equally many rows each, as `kernels.grouped_mlp.grouped_mlp` does for any sizes.

    XLA counts loops over tiles once and kernels not at all, but it counts the batches of products of this function.
    """
    x_ExNxd = rows_Nxd.reshape(sizes_E.shape[0], -1, rows_Nxd.shape[1])
    hidden = activate(jnp.einsum("end,edf->enf", x_ExNxd, kernels.wi_0))
    if kernels.wi_1 is not None:
        hidden = hidden * jnp.einsum("end,edf->enf", x_ExNxd, kernels.wi_1)
    return jnp.einsum("enf,efd->end", hidden, kernels.wo).reshape(rows_Nxd.shape)
