"""Dispatch of tokens to their experts and back, on one device or with the experts split over devices; none is lost.

Each device sorts the choices of its tokens by expert. If experts are split, it sends the tokens of each other device's
experts there by an all-to-all and receives the results by another one. Buffers have static shapes, but nothing limits
how many tokens choose the same expert: the first round carries up to `SLACK` times the mean number of tokens per pair
of devices, and smaller rounds follow while some device has tokens left.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from t5x_like.kernels.grouped_mlp import ROW_TILE, ExpertKernels, grouped_mlp

SLACK = 1.25
"""Size of the buffers of the first round as a multiple of what even routing needs."""


@dataclasses.dataclass(frozen=True)
class ExpertSharding:
    """Placement of tokens and experts: the mesh axes that split each dimension, outermost first; empty if it is whole.

    Attributes:
      batch, length: Dimensions of the tokens.
      experts: Experts of the kernels.
      mlp: Hidden dimension of the experts.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    length: tuple[str, ...]
    experts: tuple[str, ...]
    mlp: tuple[str, ...]

    @property
    def num_parts(self) -> int:
        """Number of devices over which the experts are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.experts)


def apply_experts(
    x_BxLxd: Array,
    expert_BxLxk: Array,
    weight_BxLxk: Array,
    kernels: ExpertKernels,
    activate: Callable[[Array], Array],
    sharding: ExpertSharding | None,
) -> Array:
    """Return the sum of the chosen experts' outputs, each multiplied by its weight.

    Args:
      x_BxLxd: States of the tokens.
      expert_BxLxk: int32, chosen experts of each token; the number of experts for a choice that is not computed.
      weight_BxLxk: float32, weight of each choice.
      kernels: Kernels in the type of x.
      activate: Activation function of the experts.
      sharding: Placement on a mesh; None: one device of any platform.

    Returns:
      [B, L, d] in the type of x.
    """
    compute = functools.partial(_on_device, activate=activate, sharding=sharding)
    if sharding is None or sharding.mesh.size == 1:
        return compute(x_BxLxd, expert_BxLxk, weight_BxLxk, kernels)
    batch, length, experts, mlp = (
        axes or None for axes in (sharding.batch, sharding.length, sharding.experts, sharding.mlp)
    )
    tokens = PartitionSpec(batch, length, None)
    inner: Any = PartitionSpec(experts, None, mlp)
    outer: Any = PartitionSpec(experts, mlp, None)
    by_kernel = ExpertKernels(inner, None if kernels.wi_1 is None else inner, outer)
    # `shard_map` and not automatic partitioning: sorting and gathering by data-dependent indices would make XLA gather
    # the tokens of all devices.
    return jax.shard_map(
        compute,
        mesh=sharding.mesh,
        in_specs=(tokens, tokens, tokens, by_kernel),
        out_specs=tokens,
        check_vma=False,
    )(x_BxLxd, expert_BxLxk, weight_BxLxk, kernels)


def _on_device(
    x: Array,
    expert: Array,
    weight: Array,
    kernels: ExpertKernels,
    *,
    activate: Callable[[Array], Array],
    sharding: ExpertSharding | None,
) -> Array:
    """Return the output of this device's tokens."""
    choices = expert.shape[-1]
    tokens, expert, weight = x.reshape(-1, x.shape[-1]), expert.reshape(-1), weight.reshape(-1)
    platform = None if sharding is None else sharding.mesh.devices.flat[0].platform
    mlp = functools.partial(_sorted_mlp, kernels=kernels, activate=activate, platform=platform)
    if sharding is None or sharding.num_parts == 1:
        of_choices = mlp(jnp.repeat(tokens, choices, axis=0), expert)
        # Weighted sums come before the `psum` over "mlp", which then carries one vector per token instead of one per
        # choice.
        out = jnp.einsum("tkd,tk->td", of_choices.reshape(-1, choices, x.shape[-1]), weight.reshape(-1, choices))
    else:
        out = _exchange(tokens, expert, weight, choices, kernels.wo.shape[0], mlp, sharding)
    # `wo` is split along the dimension that it contracts, so each device has a partial sum.
    if sharding is not None and sharding.mlp:
        out = jax.lax.psum(out, sharding.mlp)
    return out.reshape(x.shape).astype(x.dtype)


def _sorted_mlp(
    x: Array, expert: Array, kernels: ExpertKernels, activate: Callable[[Array], Array], platform: str | None
) -> Array:
    """Return the output of the expert of each row; 0 for rows whose expert is the number of experts."""
    order, position = _sort(expert)
    sizes = _count(expert, kernels.wo.shape[0])
    out = grouped_mlp(_permute(x, order), sizes, kernels, activate, platform)
    return _permute(out, position)


def _sort(expert: Array) -> tuple[Array, Array]:
    """Return the permutation that sorts by expert, and its inverse."""
    # Choices that are not computed have the largest number and come last, behind all groups.
    order = jnp.argsort(expert)
    return order, jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)


def _permute(x: Array, order: Array) -> Array:
    # Declared as a permutation: its gradient is then a scatter without collisions, which needs neither atomics nor an
    # order.
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _count(expert: Array, experts: int) -> Array:
    return jnp.zeros(experts, jnp.int32).at[expert].add(1, mode="drop")


def _exchange(
    tokens: Array,
    expert: Array,
    weight: Array,
    choices: int,
    experts_per_device: int,
    mlp: Callable[[Array, Array], Array],
    sharding: ExpertSharding,
) -> Array:
    """Return the sum of the weighted choices of each of this device's tokens; the experts are split over devices."""
    parts, total = sharding.num_parts, expert.size
    order, _ = _sort(expert)
    # [parts]: choices per device that holds experts. Choices are sorted by expert, so those of one device lie side by
    # side.
    sent = jnp.sum(_count(expert, parts * experts_per_device).reshape(parts, -1), axis=1)
    first = jnp.cumsum(sent) - sent
    # Rows per pair of devices if routing were even.
    mean = -(-total // parts)
    size = min(total, _rounded(SLACK * mean))
    # Rounds that rarely run get small buffers: memory is allocated for them in each step.
    further_size = _rounded(mean / 4)
    exchange = functools.partial(
        jax.lax.all_to_all, axis_name=sharding.experts, split_axis=0, concat_axis=0, tiled=True
    )

    def one_round(start: Array | int, size: int) -> Array:
        slot = start + jnp.arange(size)
        used = slot < sent[:, None]
        # The choice in each slot of each device's buffer.
        choice = jnp.take(order, first[:, None] + slot, mode="clip")
        rows = jnp.where(used[..., None], tokens[choice // choices], 0)
        # The receiver numbers its experts from 0. Unused slots get the number of its experts, which `_sorted_mlp`
        # skips.
        own_expert = jnp.where(used, expert[choice] % experts_per_device, experts_per_device)
        # An all-to-all sends block p of the buffer to device p, so applying it to the results returns each of them to
        # its slot.
        received = exchange(rows).reshape(parts * size, -1)
        results = exchange(mlp(received, exchange(own_expert).reshape(-1)).reshape(rows.shape))
        weighted = results * jnp.where(used, weight[choice], 0.0)[..., None]
        # `add` and not `set`: several choices of a token can travel in one round. Unused slots add 0 to an arbitrary
        # token.
        return jnp.zeros(tokens.shape, jnp.float32).at[choice // choices].add(weighted)

    # All devices take part in a round or none does.
    # A device that skipped an all-to-all would leave the others waiting, so the condition must be equal everywhere.
    most = jax.lax.pmax(jnp.max(sent), sharding.mesh.axis_names)

    # Computed again in the backward pass: otherwise memory would be kept for all rounds, which rarely run.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def further(out: Array, start: Array) -> tuple[Array, None]:
        return jax.lax.cond(start < most, lambda: out + one_round(start, further_size), lambda: out), None

    out = one_round(0, size)
    if size < total:
        out, _ = jax.lax.scan(further, out, jnp.arange(size, total, further_size))
    return out


def _rounded(rows: float) -> int:
    """Return the size of a buffer, rounded up to whole tiles if it is not smaller than one."""
    tile = ROW_TILE if rows >= ROW_TILE else 1
    return math.ceil(rows / tile) * tile
