"""Which rows of a batch the devices of this process hold, and how they get there.

Devices of one process need not hold rows that follow each other: a mesh is laid along the machine's links, and axes
that do not split the batch may lie across processes, whose devices then hold the same rows. So rows are loaded by their
numbers in the global batch, and row n is row n whatever the number of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_like.partitioning.rules import Rules, spec
from t5x_like.partitioning.shardings import batch_shardings

Integers = npt.NDArray[np.int64]
Batch = Mapping[str, Mapping[str, Any]]


def own_rows(mesh: Mesh, rules: Rules, rows: int) -> Integers:
    """The numbers, ascending, of the rows of a global batch of `rows` that are on this process's devices."""
    return _rows_of(_row_sharding(mesh, rules, rows), rows, jax.process_index())


def row_groups(mesh: Mesh, rules: Rules) -> list[list[int]]:
    """Processes by the rows that their devices hold: those of one list hold the same ones. In the order of the rows."""
    rows = mesh.devices.size  # A multiple of whatever splits the rows.
    sharding = _row_sharding(mesh, rules, rows)
    processes = sorted({device.process_index for device in mesh.devices.flat})
    held: dict[tuple[int, ...], list[int]] = {}
    for process in processes:
        held.setdefault(tuple(_rows_of(sharding, rows, process).tolist()), []).append(process)
    if sum(map(len, held)) != rows:
        raise ValueError("some rows are on devices of processes that do not hold the same ones")
    return [held[key] for key in sorted(held)]


def put_own(mesh: Mesh, rules: Rules, batch: Batch) -> Batch:
    """The rows that this process has loaded, `own_rows` of each sub-batch, on the mesh. Does not wait for them."""
    if jax.process_count() == 1:
        return put_whole(mesh, rules, batch)

    def place(x: Any) -> jax.Array:
        local = np.asarray(x)
        rows = _global_rows(mesh, rules, len(local))
        return _assembled(mesh, rules, local, own_rows(mesh, rules, rows), rows)

    return jax.tree.map(place, batch)


def put_whole(mesh: Mesh, rules: Rules, batch: Batch) -> Batch:
    """A batch that every process has the whole of, on the mesh. Does not wait for it."""
    if jax.process_count() == 1:
        arrays = jax.tree.map(np.asarray, batch)
        placed: Batch = jax.device_put(arrays, batch_shardings(mesh, rules, arrays))
        return placed
    return jax.tree.map(lambda x: _assembled(mesh, rules, np.asarray(x), np.arange(len(x)), len(x)), batch)


def on_host(tree: Any) -> Any:
    """A tree of arrays as NumPy's, whole in every process. To be called by all of them.

    What no single process has is gathered; what each has is only copied.
    """

    def fetch(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            from jax.experimental import multihost_utils

            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(fetch, tree)


def _assembled(mesh: Mesh, rules: Rules, local: npt.NDArray[Any], numbers: Integers, rows: int) -> jax.Array:
    """An array of `rows` rows, of which `local` has those with these numbers."""
    shape = (rows, *local.shape[1:])
    names = ("batch", "length", None)[: len(shape)]
    sharding = NamedSharding(mesh, spec(names, rules.activations, shape, mesh))

    def part(index: tuple[slice, ...] | None) -> npt.NDArray[Any]:
        assert index is not None
        first, stop, _ = index[0].indices(rows)
        start = int(np.searchsorted(numbers, first))
        return local[(slice(start, start + stop - first), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, part)


def _global_rows(mesh: Mesh, rules: Rules, local: int) -> int:
    """Rows of a batch of which this process has `local`."""
    probe = mesh.devices.size
    rows = local * probe // len(own_rows(mesh, rules, probe))
    return rows if len(own_rows(mesh, rules, rows)) == local else local


def _row_sharding(mesh: Mesh, rules: Rules, rows: int) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*spec(("batch",), rules.activations, (rows,), mesh)))


@functools.lru_cache(maxsize=256)
def _rows_of(sharding: NamedSharding, rows: int, process: int) -> Integers:
    places: Mapping[Any, Any] = sharding.devices_indices_map((rows,))
    held = {index[0].indices(rows)[:2] for device, index in places.items() if device.process_index == process}
    numbers = [np.arange(first, stop, dtype=np.int64) for first, stop in sorted(held)]
    return np.concatenate(numbers) if numbers else np.arange(0, dtype=np.int64)
