"""Experts on several devices: outputs and gradients equal those of one device for any routing."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from t5x_like.kernels import expert_dispatch, grouped_mlp
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


def function_of(sharding: ExpertSharding | None) -> Any:
    """Return the function (arrays, experts) -> ((sum, output), gradients)."""

    def value(arguments: tuple[Array, Array, ExpertKernels], expert: Array) -> tuple[Array, Array]:
        x, weight, kernels = arguments
        out = apply_experts(x, expert, weight, kernels, jax.nn.silu, sharding)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(value, has_aux=True))


@functools.cache
def one_device() -> Any:
    return function_of(None)


def sharding_of(placement: str) -> ExpertSharding:
    sizes, names, batch, length, experts, mlp = PLACEMENTS[placement]
    mesh = jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    return ExpertSharding(mesh, batch, length, experts, mlp)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_dispatch_equals_one_device_for_any_routing(placement: str) -> None:
    function = function_of(sharding_of(placement))
    for kind in ("random", "one device", "padding"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(b).max())),
            function(arrays(), routing(kind)),
            one_device()(arrays(), routing(kind)),
        )


def test_devices_that_are_gpus_run_kernels_for_triton_on_their_own_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    # The mesh has CPUs, and the program is lowered for GPUs.
    def on_gpus(*arguments: Any) -> Array:
        return grouped_mlp.grouped_mlp(*arguments[:-1], platform="gpu")

    monkeypatch.setattr(expert_dispatch, "grouped_mlp", on_gpus)
    function = function_of(sharding_of("experts, length and hidden dimension"))
    text = function.trace(arrays(), routing("random")).lower(lowering_platforms=("cuda",)).as_text()
    kernels = re.findall(r"custom_call @__gpu\$xla\.gpu\.triton\(.* : \((.*)\) -> (.*)", text)
    assert len(kernels) >= 9
    # An expert's kernel of [8, 16], of which 2 devices share the experts and 2 others the hidden dimension.
    assert all("4x8x8xf32" in operands + result for operands, result in kernels)
