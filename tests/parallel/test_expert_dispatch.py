"""Experts on several devices: outputs and gradients equal those of one device for any routing."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from t5x_like.kernels.expert_dispatch import ExpertSharding, apply_experts
from t5x_like.kernels.grouped_mlp import ExpertKernels

ROWS, LENGTH, WIDTH, HIDDEN, EXPERTS, CHOICES = 8, 6, 8, 16, 8, 2
PLACEMENTS = {
    "experts": ((8,), ("expert",), ("expert",), (), ("expert",), ()),
    "experts and copies": ((2, 4), ("data", "expert"), ("data", "expert"), (), ("expert",), ()),
    "experts, length and hidden dimension": (
        (2, 2, 2),
        ("expert", "context", "tensor"),
        ("expert",),
        ("context",),
        ("expert",),
        ("tensor",),
    ),
    "rows on all devices": ((2, 4), ("data", "expert"), (), (), ("expert",), ()),
}


def routing(kind: str) -> Array:
    rng = np.random.default_rng(1)
    shape = (ROWS, LENGTH, CHOICES)
    match kind:
        case "random":
            return jnp.asarray(rng.integers(0, EXPERTS, shape), jnp.int32)
        case "one device":
            return jnp.broadcast_to(jnp.array([5, 4], jnp.int32), shape)
        case _:
            # Padding has no experts.
            return jnp.asarray(np.where(rng.random(shape) < 0.5, 3, EXPERTS), jnp.int32)


def arrays() -> tuple[Array, Array, ExpertKernels]:
    rng = np.random.default_rng(0)
    shapes = ((ROWS, LENGTH, WIDTH), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    x, *kernels = (jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return x, jnp.asarray(rng.random((ROWS, LENGTH, CHOICES)), jnp.float32), ExpertKernels(*kernels)


def compiled(sharding: ExpertSharding | None) -> Any:
    """Return the function (arrays, experts) -> ((sum, output), gradients)."""

    def value(arguments: tuple[Array, Array, ExpertKernels], expert: Array) -> tuple[Array, Array]:
        x, weight, kernels = arguments
        out = apply_experts(x, expert, weight, kernels, jax.nn.silu, sharding)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(value, has_aux=True))


@functools.cache
def one_device() -> Any:
    return compiled(None)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_dispatch_equals_one_device_for_any_routing(placement: str) -> None:
    sizes, names, batch, length, experts, mlp = PLACEMENTS[placement]
    mesh = jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    function = compiled(ExpertSharding(mesh, batch, length, experts, mlp))
    for kind in ("random", "one device", "padding"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(b).max())),
            function(arrays(), routing(kind)),
            one_device()(arrays(), routing(kind)),
        )
