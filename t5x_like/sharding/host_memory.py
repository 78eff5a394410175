"""Arrays of a training step that are kept in the memory of the hosts, from where the devices fetch them."""

from __future__ import annotations

from typing import Any, assert_never

import jax

from t5x_like.config import RunConfig
from t5x_like.errors import ConfigProblem
from t5x_like.utils.type_aliases import PyTree

HOST = "pinned_host"
"""JAX's name of the memory of a host that its devices read and write without a copy."""


def keeps_optimizer_state(run: RunConfig) -> bool:
    """Return whether the optimizer state of a run is kept in host memory."""
    match run.sharding.optimizer_state_memory:
        case "device":
            return False
        case "host":
            return True
        case unknown:
            assert_never(unknown)


def goes_to_host(x: Any) -> bool:
    """Return whether an array of an optimizer state that is kept in host memory goes there: the matrices do. Vectors
    and counts, which take no memory, stay on the devices."""
    return len(x.shape) >= 2


def on_device(tree: PyTree) -> PyTree:
    """Return the tree with all arrays in the memory of the devices, within a function that is compiled."""

    def moved(x: Any) -> Any:
        # XLA (libtpu 0.0.42.1) refuses a program that changes the shape of an array on its way from the host.
        return jax.lax.optimization_barrier(jax.device_put(x, jax.memory.Space.Device))

    return jax.tree.map(moved, tree)


def host_shardings(shardings: PyTree, abstract: PyTree) -> PyTree:
    """Return the shardings with the arrays of `goes_to_host` in host memory."""
    return jax.tree.map(
        lambda sharding, x: sharding.with_memory_kind(HOST) if goes_to_host(x) else sharding, shardings, abstract
    )


def is_on_host(x: Any) -> bool:
    """Return whether an array, or a `jax.ShapeDtypeStruct` with a sharding, is in host memory."""
    return bool(x.sharding.memory_kind == HOST)


def host_memory_problems(run: RunConfig, mesh: jax.sharding.Mesh) -> list[ConfigProblem]:
    """Return a problem for each field that places arrays in host memory if the devices cannot reach it."""
    found = {
        "sharding.optimizer_state_memory": (run.sharding.optimizer_state_memory, "host", "device"),
        "model.remat": (run.model.remat, "offload", "full"),
    }
    wanted = {where: other for where, (value, on_host, other) in found.items() if value == on_host}
    if not wanted or HOST in _memory_kinds(mesh):
        return []
    kind = mesh.devices.flat[0].device_kind
    return [
        ConfigProblem(
            where,
            f"{found[where][0]!r} on {kind}, which has no memory of the kind {HOST}",
            f"{other!r}, or devices that read the memory of their host: TPUs, GPUs and CPUs",
        )
        for where, other in wanted.items()
    ]


def _memory_kinds(mesh: jax.sharding.Mesh) -> set[str]:
    """Return the kinds of memory that a device of this process reaches, or of another one if this process has none."""
    own = (device for device in mesh.devices.flat if device.process_index == device.client.process_index())
    return {memory.kind for memory in next(own, mesh.devices.flat[0]).addressable_memories()}
