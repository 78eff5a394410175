"""Placement of batches: which rows of a global batch this process loads, and their assembly into sharded arrays.

The devices of one process need not hold consecutive rows. The mesh follows the physical links of the machine, and mesh
axes that do not split the batch may span processes, whose devices then hold the same rows. Rows are therefore loaded by
their index in the global batch, and row n is the same row whatever the number of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_like.sharding.rules import Rules, spec
from t5x_like.sharding.shardings import batch_shardings
from t5x_like.utils.stall_limit import progress
from t5x_like.utils.type_aliases import IntArray

Batch = Mapping[str, Mapping[str, Any]]


def local_rows(mesh: Mesh, rules: Rules, rows: int) -> IntArray:
    """Return the indices, ascending, of the rows of a global batch of `rows` that this process's devices hold."""
    return _row_indices(_row_sharding(mesh, rules, rows), rows, jax.process_index())


def row_groups(mesh: Mesh, rules: Rules) -> list[list[int]]:
    """Return groups of processes whose devices hold the same rows, in the order of the rows.

    Raises:
      ValueError: Two processes share some rows but not all of them.
    """
    # The number of devices is a multiple of any number of row shards, so that no row is replicated by divisibility.
    rows = mesh.devices.size
    sharding = _row_sharding(mesh, rules, rows)
    processes = sorted({device.process_index for device in mesh.devices.flat})
    # Processes whose devices hold the same rows (because a mesh axis such as tensor spans them) load them each for
    # themselves.
    groups: dict[tuple[int, ...], list[int]] = {}
    for process in processes:
        groups.setdefault(tuple(_row_indices(sharding, rows, process).tolist()), []).append(process)
    # Groups that share rows in part would count these rows twice.
    if sum(map(len, groups)) != rows:
        raise ValueError("found processes whose devices share some rows but not all, expected all or none")
    return [groups[key] for key in sorted(groups)]


def shard_batch(mesh: Mesh, rules: Rules, batch: Batch) -> Batch:
    """Place the rows that this process has loaded (`local_rows` of each sub-batch) on the mesh, asynchronously."""
    if jax.process_count() == 1:
        return shard_global_batch(mesh, rules, batch)

    def place(x: Any) -> jax.Array:
        local = np.asarray(x)
        rows = _global_rows(mesh, rules, len(local))
        return _assemble(mesh, rules, local, local_rows(mesh, rules, rows), rows)

    return jax.tree.map(place, batch)


def shard_global_batch(mesh: Mesh, rules: Rules, batch: Batch) -> Batch:
    """Place a batch that every process holds as a whole on the mesh, asynchronously."""
    progress()
    if jax.process_count() == 1:
        arrays = jax.tree.map(np.asarray, batch)
        placed: Batch = jax.device_put(arrays, batch_shardings(mesh, rules, arrays))
        return placed
    return jax.tree.map(lambda x: _assemble(mesh, rules, np.asarray(x), np.arange(len(x)), len(x)), batch)


def on_host(tree: Any) -> Any:
    """Return a tree of arrays as NumPy arrays, whole in every process. All processes must call it.

    Arrays that no single process holds as a whole are gathered; the others are only copied.
    """

    def fetch(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            from jax.experimental import multihost_utils

            # A collective operation: a process that does not call it stops the others.
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(fetch, tree)


def _assemble(mesh: Mesh, rules: Rules, local: npt.NDArray[Any], indices: IntArray, rows: int) -> jax.Array:
    """Return a global array of `rows` rows, of which `local` has those with the given ascending indices."""
    shape = (rows, *local.shape[1:])
    # Features are [rows] or [rows, length]; a third dimension is never split.
    names = ("batch", "length", None)[: len(shape)]
    sharding = NamedSharding(mesh, spec(names, rules.activations, shape, mesh))

    def shard(index: tuple[slice, ...] | None) -> npt.NDArray[Any]:
        # JAX asks for each addressable shard by its slices of the global array. Its rows are consecutive there, hence
        # also in `local`, where they begin at the position of the first one.
        assert index is not None
        first, stop, _ = index[0].indices(rows)
        start = int(np.searchsorted(indices, first))
        return local[(slice(start, start + stop - first), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, shard)


def _global_rows(mesh: Mesh, rules: Rules, local: int) -> int:
    """Return the number of rows of a global batch of which this process has `local` rows."""
    # The share of this process is measured on a batch whose rows are split as far as the mesh can. A batch that the
    # mesh does not divide is replicated: then every process has all of it.
    probe = mesh.devices.size
    rows = local * probe // len(local_rows(mesh, rules, probe))
    return rows if len(local_rows(mesh, rules, rows)) == local else local


def _row_sharding(mesh: Mesh, rules: Rules, rows: int) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*spec(("batch",), rules.activations, (rows,), mesh)))


@functools.lru_cache(maxsize=256)
def _row_indices(sharding: NamedSharding, rows: int, process: int) -> IntArray:
    index_map: Mapping[Any, Any] = sharding.devices_indices_map((rows,))
    # Replicas of the same rows on several devices count once.
    ranges = {index[0].indices(rows)[:2] for device, index in index_map.items() if device.process_index == process}
    indices = [np.arange(first, stop, dtype=np.int64) for first, stop in sorted(ranges)]
    return np.concatenate(indices) if indices else np.arange(0, dtype=np.int64)
