"""Lookup of rows of a table that is split over devices: rows and gradients of one device, and no whole table."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config import ShardingConfig
from t5x_like.kernels.table_lookup import lookup
from t5x_like.models.layers import Embedding
from t5x_like.sharding.constrain import activation_context, lookup_sharding
from t5x_like.sharding.mesh import make_mesh
from t5x_like.sharding.rules import default_rules

SIZE, WIDTH = 40, 16
CHUNK_BYTES = 4 * WIDTH * 9
"""Nine rows, which divide no table: the last chunk overlaps the one before."""
NAMES = ("vocab", "embed")
MESHES = {
    "fsdp": ShardingConfig(fsdp=8),
    "copies": ShardingConfig(data=4, fsdp=2),
    "tensor": ShardingConfig(data=2, fsdp=1, tensor=4),
    "fsdp, context and tensor": ShardingConfig(fsdp=2, context=2, tensor=2),
    "experts": ShardingConfig(fsdp=4, expert=2),
    "vocabulary over fsdp": ShardingConfig(
        fsdp=4, tensor=2, parameter_rules=(("vocab", "fsdp"), ("vocab", "tensor"), ("embed", None))
    ),
}
IDS = {"a batch": (8, 12), "rows that no axis divides": (3, 12), "one token": (8, 1), "one row": (1, 8)}


def rows_and_gradient(table, ids, cotangent, dtype, config=None):
    """Return the rows, the gradient of the table, and the compiled program of both."""
    mesh = None if config is None else make_mesh(config, jax.devices())

    def looked_up(table):
        if mesh is None:
            return lookup(table, ids, dtype, None)
        with activation_context(mesh, default_rules(config)):
            return lookup(table, ids, dtype, lookup_sharding(ids.shape, table.shape, NAMES), CHUNK_BYTES)

    def both(table):
        rows, pullback = jax.vjp(looked_up, table)
        return rows, *pullback(cotangent)

    if mesh is not None:
        rules = default_rules(config).parameters
        axes = [[axis for axis in rules[name] if mesh.shape[axis] > 1] or None for name in NAMES]
        split = [None if axis is None else tuple(axis) for axis in axes]
        table = jax.device_put(table, NamedSharding(mesh, PartitionSpec(*split)))
    program = jax.jit(both, out_shardings=None if mesh is None else (None, table.sharding)).lower(table).compile()
    return *map(np.asarray, program(table)), program.as_text()


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("shape", IDS)
def test_rows_and_gradients_are_those_of_one_device_without_a_whole_table(mesh: str, shape: str) -> None:
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(SIZE, WIDTH)), jnp.float32)
    # Outside the table on both sides, and one id so often that its gradient is a long sum.
    ids = jnp.asarray(np.where(rng.random(IDS[shape]) < 0.3, 7, rng.integers(-3, SIZE + 5, IDS[shape])), jnp.int32)
    cotangent = jnp.asarray(rng.normal(size=(*IDS[shape], WIDTH)), jnp.float32)
    rows, gradient, _ = rows_and_gradient(table, ids, cotangent, jnp.float32)
    inside = np.clip(ids, 0, SIZE - 1)
    np.testing.assert_array_equal(rows, np.asarray(table)[inside])
    expected = np.zeros((SIZE, WIDTH))
    np.add.at(expected, inside, np.asarray(cotangent, np.float64))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    found_rows, found_gradient, program = rows_and_gradient(table, ids, cotangent, jnp.float32, MESHES[mesh])
    np.testing.assert_array_equal(found_rows, rows)
    np.testing.assert_allclose(found_gradient, gradient, rtol=1e-5, atol=1e-5)
    if mesh != "vocabulary over fsdp":
        assert re.search(rf"f32\[{SIZE},{WIDTH}\]", program) is None


def test_gradients_of_a_rounded_table_are_added_up_in_float32() -> None:
    table = jnp.zeros((SIZE, WIDTH), jnp.bfloat16)
    ids, cotangent = jnp.full((8, 512), 3), jnp.ones((8, 512, WIDTH), jnp.bfloat16)
    for config in (None, MESHES["fsdp"], MESHES["copies"]):
        _, gradient, _ = rows_and_gradient(table, ids, cotangent, jnp.bfloat16, config)
        assert gradient.dtype == jnp.bfloat16
        # In bfloat16, 256 + 1 is 256.
        assert (gradient[3] == 4096).all() and not gradient[4:].any()


def test_table_that_no_axis_splits_is_read_as_on_one_device() -> None:
    config = ShardingConfig(data=8, fsdp=1)
    with activation_context(make_mesh(config, jax.devices()), default_rules(config)):
        assert lookup_sharding((8, 4), (SIZE, WIDTH), NAMES) is None


def test_ids_of_other_shapes_and_vocabularies_with_padding() -> None:
    """Positions have one dimension, and rows of zeros after those of the ids are read by none of them."""
    rng = np.random.default_rng(0)
    config = ShardingConfig(fsdp=2, context=2, tensor=2)
    embedding = Embedding(("vocab", SIZE - 3), ("embed", WIDTH), stddev=1.0, rngs=nnx.Rngs(0), padding=3)
    for shape in ((6,), (2, 3, 4), (0, 4), (2, 0)):
        ids = jnp.asarray(rng.integers(0, SIZE + 5, shape), jnp.int32)
        with activation_context(make_mesh(config, jax.devices()), default_rules(config)):
            found = jax.jit(lambda ids: embedding(ids, jnp.float32))(ids)
        np.testing.assert_array_equal(found, embedding.embedding[...][np.minimum(ids, SIZE - 4)])
