"""Replay of single steps: the same step on the same state must give the same bits, and replicas must be equal.

What it finds is a device that computes or remembers wrongly without an error. It needs memory for a second state while
it runs, and the time of one step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_like.checkpoints.fingerprints import fingerprint
from t5x_like.errors import SafetyError
from t5x_like.sharding.batch_placement import on_host
from t5x_like.sharding.host_memory import on_device
from t5x_like.utils import tree_paths

_LOG = logging.getLogger(__name__)
_MAX_LISTED = 5

Step = Callable[[Any, Any], tuple[Any, Any]]


class ReplayCheck:
    """Check of every `every`-th step; all processes take the same ones.

    Args:
      every: Number of steps between two checks.
      train_step: The step (state, batch) -> (state, metrics), which donates the state.
      mesh: Mesh of the state.
    """

    def __init__(self, every: int, train_step: Step, mesh: Mesh):
        self._every, self._train_step = every, train_step
        self._mesh, self._fingerprints = mesh, ShardFingerprints(mesh)

    def is_due(self, step: int) -> bool:
        """Return whether the step with this number, from 1, is to be checked."""
        return step % self._every == 0

    def run(self, step: int, state: Any, batch: Any) -> tuple[Any, Any]:
        """Take the step twice and return the result.

        Raises:
          SafetyError: the results differ, or copies of an array on different devices do. The message names the devices
            and their processes.
        """
        replayed, _ = self._train_step(jax.tree.map(jnp.copy, state), batch)
        expected = self._fingerprints(replayed)
        del replayed
        state, metrics = self._train_step(state, batch)
        found = self._fingerprints(state)
        problems = [*_differing(expected, found, self._mesh), *_unequal_replicas(state, found, self._mesh)]
        if problems:
            listed = "".join(f"\n  - {line}" for line in problems[:_MAX_LISTED])
            more = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
            raise SafetyError(
                f"step {step} was computed twice from the same state, and its result is not reliable:{listed}{more}\n"
                "If the named devices are always the same, replace their machine; if they change, an operation of the "
                "program is not deterministic. Existing checkpoints were saved before; run the same command again."
            )
        _LOG.info("step %d was computed twice with equal results", step)
        return state, metrics


class ShardFingerprints:
    """Function from a state on a mesh to the fingerprints of each device's part, by path: [devices] in its order.

    It is compiled for the first state, and expects others like it.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._compiled: Callable[..., jax.Array] | None = None

    def __call__(self, state: Any) -> dict[str, npt.NDArray[np.uint32]]:
        leaves = tree_paths.by_path(state)
        if self._compiled is None:
            self._compiled = _on_each_device(leaves, self._mesh)
        table = on_host(self._compiled(*leaves.values()))
        return {path: table[:, index] for index, path in enumerate(leaves)}


def _on_each_device(leaves: Mapping[str, jax.Array], mesh: Mesh) -> Callable[..., jax.Array]:
    """Return the function (arrays like the leaves) -> uint32 [devices, leaves], each row from a device's own memory."""

    def local(*parts: jax.Array) -> jax.Array:
        return jnp.stack([fingerprint(part) for part in parts])[None]

    shardings = [leaf.sharding for leaf in leaves.values()]
    specs = tuple(sharding.spec for sharding in shardings if isinstance(sharding, NamedSharding))
    rows = PartitionSpec(mesh.axis_names)
    # Without the check that copies are equal, which assumes what is to be found out.
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return jax.jit(lambda *leaves: mapped(*on_device(leaves)))


def _differing(
    expected: Mapping[str, npt.NDArray[np.uint32]], found: Mapping[str, npt.NDArray[np.uint32]], mesh: Mesh
) -> Iterator[str]:
    for path, values in found.items():
        wrong = np.flatnonzero(values != expected[path])
        if wrong.size:
            yield f"{path} differs from the first time on {_devices(wrong, mesh)}"


def _unequal_replicas(state: Any, found: Mapping[str, npt.NDArray[np.uint32]], mesh: Mesh) -> Iterator[str]:
    """Yield the arrays of which devices have different copies; the devices in the minority are named."""
    places = {device: place for place, device in enumerate(mesh.devices.flat)}
    for path, leaf in tree_paths.by_path(state).items():
        copies: dict[str, list[int]] = {}
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            copies.setdefault(str(index), []).append(places[device])
        for holders in copies.values():
            values, counts = np.unique(found[path][holders], return_counts=True)
            if len(values) > 1:
                wrong = [place for place in holders if found[path][place] != values[counts.argmax()]]
                yield f"{path} has another value than its copies on {_devices(np.array(wrong), mesh)}"


def _devices(places: npt.NDArray[Any], mesh: Mesh) -> str:
    if len(places) == mesh.size > 1:
        return "all devices"
    devices = [mesh.devices.flat[place] for place in places]
    listed = ", ".join(f"device {device.id} of process {device.process_index}" for device in devices[:_MAX_LISTED])
    return listed + (f" and {len(devices) - _MAX_LISTED} more" if len(devices) > _MAX_LISTED else "")
