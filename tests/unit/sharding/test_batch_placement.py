"""Placement of batches: a process loads exactly the rows of its devices, for any device order of the mesh."""

from __future__ import annotations

import dataclasses
import random

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from t5x_like.config import ShardingConfig
from t5x_like.data.stream.host_shard import HostShard
from t5x_like.sharding.batch_placement import local_rows, row_groups
from t5x_like.sharding.rules import default_rules

RULES = default_rules(ShardingConfig())


@dataclasses.dataclass(frozen=True)
class Device:
    """Device of another process, with the attributes that a mesh reads."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def mesh_of(devices: list[Device], **degrees: int) -> Mesh:
    sizes = {axis: degrees.get(axis, 1) for axis in ShardingConfig().degrees}
    grid = np.empty(len(devices), object)
    grid[:] = devices
    return Mesh(grid.reshape(tuple(sizes.values())), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def rows_by_process(mesh: Mesh, processes: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    rows_per_process = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        rows_per_process.append(local_rows(mesh, RULES, rows).tolist())
    return rows_per_process


@pytest.mark.parametrize("seed", range(4))
def test_each_row_is_loaded_once_for_any_device_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [Device(id, id // 2) for id in range(8)]
    random.Random(seed).shuffle(devices)
    mesh = mesh_of(devices, data=2, fsdp=4)
    loaded = rows_by_process(mesh, 4, 16, monkeypatch)
    for process, rows in enumerate(loaded):
        positions = [n for n, device in enumerate(devices) if device.process_index == process]
        assert rows == sorted(2 * position + row for position in positions for row in range(2))
    assert sorted(sum(loaded, [])) == list(range(16))
    groups = row_groups(mesh, RULES)
    assert sorted(groups) == [[0], [1], [2], [3]]
    assert groups == sorted(groups, key=lambda group: loaded[group[0]])


def test_processes_that_split_a_row_both_load_it(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [Device(id, id // 2) for id in range(8)]
    # Heads are split over all devices of two processes: their rows are the same.
    mesh = mesh_of(devices, fsdp=2, tensor=4)
    assert rows_by_process(mesh, 4, 8, monkeypatch) == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2
    assert row_groups(mesh, RULES) == [[0, 1], [2, 3]]
    whole = mesh_of(devices, tensor=8)
    assert row_groups(whole, RULES) == [[0, 1, 2, 3]]
    # A batch that the axes do not divide is replicated.
    assert rows_by_process(mesh, 4, 3, monkeypatch) == [[0, 1, 2]] * 4


def test_processes_with_partly_shared_rows_are_refused() -> None:
    devices = [Device(0, 0), Device(1, 0), Device(2, 1), Device(3, 0), Device(4, 1), Device(5, 1)]
    with pytest.raises(ValueError, match="share some rows but not all"):
        row_groups(mesh_of(devices, fsdp=3, tensor=2), RULES)


def test_host_shard_without_row_choice_is_contiguous() -> None:
    parts = [HostShard(group, 3).rows(10).tolist() for group in range(3)]
    assert sum(parts, []) == list(range(10))
