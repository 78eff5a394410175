"""Products of rows with the kernels of their groups, for all platforms, against a loop over the groups."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from t5x_like.kernels import grouped_mlp
from t5x_like.kernels.grouped_mlp import ExpertKernels, kernel_gradient
from t5x_like.kernels.triton_product import triton_product

ROWS, WIDTH, HIDDEN, EXPERTS = 40, 8, 12, 4
TRITON = "@__gpu$xla.gpu.triton("
SIZES = {
    "uneven": (3, 0, 26, 11),
    "one group": (0, 0, 40, 0),
    "rows after the last group": (7, 9, 0, 8),
    "no rows": (0, 0, 0, 0),
}


def arrays() -> tuple[Array, ExpertKernels]:
    rng = np.random.default_rng(0)
    shapes = ((ROWS, WIDTH), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    x, *kernels = (jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return x, ExpertKernels(*kernels)


def loop(x: Array, sizes: tuple[int, ...], kernels: ExpertKernels) -> Array:
    parts, start = [], 0
    for size, wi_0, wi_1, wo in zip(sizes, *kernels, strict=True):
        rows = x[start : start + size]
        parts.append((jax.nn.silu(rows @ wi_0) * (rows @ wi_1)) @ wo)
        start += size
    return jnp.concatenate([*parts, jnp.zeros((ROWS - start, WIDTH))])


def gradients_by_loop(x: Array, d_out: Array, sizes: Array) -> Array:
    ends = np.cumsum(np.asarray(sizes))
    slices = [slice(end - size, end) for end, size in zip(ends, np.asarray(sizes), strict=True)]
    return jnp.stack([x[rows].T @ d_out[rows] for rows in slices])


def value(function: Any) -> Any:
    """Return the function (x, kernels, sizes) -> ((sum, output), gradients)."""

    def summed(x: Array, kernels: ExpertKernels, sizes: Any) -> tuple[Array, Array]:
        out = function(x, sizes, kernels)
        return jnp.sum(jnp.sin(out)), out

    return jax.value_and_grad(summed, argnums=(0, 1), has_aux=True)


@pytest.mark.parametrize("platform", ["tpu", "cpu", "cuda", None])
def test_grouped_mlp_is_a_loop_over_groups(platform: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # The TPU's kernel is tested below, by JAX's interpreter.
    monkeypatch.setattr(grouped_mlp, "kernel_gradient", _dense_gradient)
    if platform == "cuda":
        monkeypatch.setattr(grouped_mlp, "triton_product", functools.partial(triton_product, interpret=True))
    mlp = functools.partial(grouped_mlp.grouped_mlp, activate=jax.nn.silu, platform=platform)
    compiled = jax.jit(value(mlp))
    for name, sizes in SIZES.items():
        (_, found), grads = compiled(*arrays(), jnp.array(sizes, jnp.int32))
        (_, expected), expected_grads = value(loop)(*arrays(), sizes)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), grads, expected_grads)


def _dense_gradient(x: Array, d_out: Array, sizes: Array) -> Array:
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    member = group[:, None] == jnp.arange(sizes.shape[0])
    return jnp.einsum("ne,nd,nf->edf", member.astype(x.dtype), x, d_out)


@pytest.mark.parametrize("sizes", [(100, 0, 130, 26), (0, 256, 0, 0), (40, 60, 0, 50)])
def test_gradient_of_the_kernels_on_a_tpu_is_a_loop_over_groups(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, d_out = (jnp.asarray(rng.standard_normal((256, width)), jnp.float32) for width in (128, 256))
    found = kernel_gradient(x, d_out, jnp.array(sizes, jnp.int32), interpret=True)
    np.testing.assert_allclose(found, gradients_by_loop(x, d_out, jnp.array(sizes)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("platform", ["gpu", "cuda", None])
def test_gpus_have_a_kernel_for_each_product_and_loops_if_the_number_of_rows_is_unknown(platform: str | None) -> None:
    def loss(x: Array, kernels: ExpertKernels, sizes: Array) -> Array:
        return jnp.sum(grouped_mlp.grouped_mlp(x, sizes, kernels, jax.nn.silu, platform))

    def arguments(rows: Any) -> tuple[Any, ...]:
        shapes = jax.tree.map(lambda kernel: jax.ShapeDtypeStruct(kernel.shape, kernel.dtype), arrays()[1])
        return jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32), shapes, jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)

    gradients = jax.jit(jax.grad(loss, (0, 1)))
    text = gradients.trace(*arguments(ROWS)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(TRITON) == 9
    rows = jax.export.symbolic_shape("rows")[0]
    # Exported programs have no gradients.
    text = jax.export.export(jax.jit(loss), platforms=["cpu", "cuda"])(*arguments(rows)).mlir_module()
    assert TRITON not in text
    assert "stablehlo.while" in text


def test_other_platforms_are_refused() -> None:
    x, kernels = arrays()
    with pytest.raises(ValueError, match="found the platform 'METAL', expected one of"):
        grouped_mlp.grouped_mlp(x, jnp.array(SIZES["uneven"]), kernels, jax.nn.silu, "METAL")
