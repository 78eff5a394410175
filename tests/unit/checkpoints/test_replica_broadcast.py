"""One replica reads, and the devices send the same bits to the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.checkpoints.replica_broadcast import first_replica_indices, from_first_replica, index_key

SPECS = (
    PartitionSpec(),
    PartitionSpec("a"),
    PartitionSpec(None, "b"),
    PartitionSpec("b", "a"),
    PartitionSpec(("a", "b")),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "int8", "uint32"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_all_replicas_have_the_bits_of_the_first(spec: PartitionSpec, dtype: str) -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), devices=jax.devices()[:8])
    sharding = NamedSharding(mesh, spec)
    bits = np.random.default_rng(0).integers(0, 256, 16 * 8 * jnp.dtype(dtype).itemsize, np.uint8)
    values = (bits % 2 if dtype == "bool" else bits).view(jnp.dtype(dtype)).reshape(16, 8)
    parts = {index_key(index): values[index] for index in first_replica_indices(sharding, values.shape)}
    found = from_first_replica(sharding, values.shape, values.dtype, parts)
    assert found.sharding.is_equivalent_to(sharding, 2) and found.dtype == values.dtype
    for shard in found.addressable_shards:
        assert np.asarray(shard.data).tobytes() == values[shard.index].tobytes()


def test_a_process_without_the_first_replica_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = jax.make_mesh((2, 4), ("slices", "fsdp"), devices=jax.devices()[:8])
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    all_devices = sharding.addressable_devices_indices_map((8,))
    for process, expected in ((0, 4), (1, 0)):
        own = {device: index for device, index in all_devices.items() if device in mesh.devices[process]}
        monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda self, shape, own=own: own)
        assert len(first_replica_indices(sharding, (8,))) == expected
