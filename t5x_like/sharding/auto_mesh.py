"""Automatic choice of the mesh degrees for a run and the available devices, with a reason in words.

The rule, in this order:
  1. Slices hold copies of the model (data parallelism over DCN), because of all axes data sends least over a slow
     network.
  2. Devices share the experts as far as the number of experts allows.
  3. Of tensor and context, take the smallest product with which the rows of a batch can be split over the other devices
     and with which state and activations fit. Tensor grows up to 8 before context does, because beyond 8 its
     communication outweighs its computation.
  4. The remaining devices are fsdp, as far as that divides the parameters, and data; or data alone if the whole state
     takes less than a tenth of a device's memory, because then gathering parameters gains nothing.
A mesh that `validate_sharding` would refuse is never chosen. If no mesh fits, the mesh that needs least memory is
chosen and the reason states this.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh

from t5x_like.config import DcnConfig, RunConfig, ShardingConfig, batch_spec
from t5x_like.config.sharding import AXES
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.hardware.topologies import accelerator_of
from t5x_like.sharding.host_memory import goes_to_host, keeps_optimizer_state
from t5x_like.sharding.loss_chunks import chunk_share
from t5x_like.sharding.mesh import known_slices
from t5x_like.sharding.rules import LogicalAxes, Rules, Table, spec, split_axes
from t5x_like.sharding.saved_activations import (
    SavedArray,
    accumulation_part,
    itemsize,
    logits,
    saved_activations,
)
from t5x_like.sharding.shardings import LogicalArray, logical_leaves
from t5x_like.sharding.validation import validate_sharding
from t5x_like.utils.formatting import size
from t5x_like.utils.type_aliases import PyTree

MAX_TENSOR = 8
MEMORY_FRACTION = 0.9
"""Fraction of the memory that the estimate may fill; the rest is for what the estimate leaves out."""
SMALL_STATE_FRACTION = 0.1


class MeshEstimate(NamedTuple):
    """Estimated memory of a device on a mesh, or the reasons why the mesh is invalid.

    Attributes:
      problems: Reasons why the mesh is invalid; empty if it is valid.
      state_bytes: Bytes of parameters, optimizer state and gradients on a device.
      activation_bytes: Bytes of the activations saved for the backward pass on a device.
      fetched_bytes: Bytes of the optimizer state that the update fetches from host memory.
    """

    problems: Sequence[ConfigProblem]
    state_bytes: int
    activation_bytes: int
    fetched_bytes: int = 0

    @property
    def total(self) -> int:
        # The update, which may have fetched all of its state, begins after the backward pass has freed the activations.
        return self.state_bytes + max(self.activation_bytes, self.fetched_bytes)

    def __str__(self) -> str:
        text = f"{size(self.state_bytes)} of state and {size(self.activation_bytes)} of activations"
        fetched = f" (then {size(self.fetched_bytes)} of optimizer state from the host)" if self.fetched_bytes else ""
        return text + fetched


class DevicePool(NamedTuple):
    """Devices that a mesh is chosen for.

    Attributes:
      devices: Number of devices, over all slices.
      slices: Number of slices, which are of equal size.
      usable_bytes: Memory of a device that a program can use; 0 if unknown.
    """

    devices: int
    slices: int
    usable_bytes: int


class MeshChoice(NamedTuple):
    """Chosen degrees.

    Attributes:
      degrees: Degrees within a slice.
      dcn: Degrees between slices.
      reason: A sentence or two.
    """

    degrees: dict[str, int]
    dcn: dict[str, int]
    reason: str


EstimateMesh = Callable[[Mapping[str, int]], MeshEstimate]
"""Estimates a mesh from its axis sizes, slices included."""


def choose_degrees(pool: DevicePool, experts: int, estimate: EstimateMesh) -> MeshChoice:
    """Choose degrees by the rule of this module.

    Args:
      pool: The devices.
      experts: Number of experts of a layer; 1 without experts.
      estimate: Returns the estimate for given axis sizes.

    Raises:
      ConfigError: No mesh is valid; the problems of the simplest mesh are listed.
    """
    # 0 where the memory of the devices is not known: then every valid mesh counts as fitting.
    budget = int(MEMORY_FRACTION * pool.usable_bytes)
    rejected: list[tuple[str, str]] = []
    first_problems: Sequence[ConfigProblem] = ()
    smallest: tuple[int, dict[str, int], MeshEstimate] | None = None
    # Candidates come best first, so that the first one that fits is the choice.
    for degrees in _candidates(pool.devices // pool.slices, experts):
        candidate = estimate(_with_slices(degrees, pool.slices))
        name = _format_degrees(degrees) or "one device"
        if candidate.problems:
            first_problems = first_problems or candidate.problems
            first = candidate.problems[0]
            rejected.append((name, f"{first.where} is {first.found}, and not {first.expected}"))
            continue
        if not budget or candidate.total <= budget:
            return _choose(pool, degrees, candidate, rejected, estimate)
        rejected.append((name, f"{size(candidate.total)} per device, of {size(budget)}"))
        # The choice if nothing fits: a run that the estimate rejects by little may still fit.
        if smallest is None or candidate.total < smallest[0]:
            smallest = candidate.total, degrees, candidate
    if smallest is None:
        raise ConfigError(first_problems)
    _, degrees, candidate = smallest
    reason = (
        f"{_name(degrees, pool.slices)}: no mesh is estimated to fit into {size(budget)} per device; this one needs "
        f"least, {candidate}: use more devices, training.gradient_accumulation_steps or model.remat"
    )
    return MeshChoice(degrees, _dcn_degrees(pool.slices), reason)


def _candidates(devices: int, experts: int) -> Iterator[dict[str, int]]:
    """Yield the degrees within a slice, best first; each set multiplies to `devices`."""
    # 1 divides any number, so without experts the axis has degree 1.
    expert_degrees = [degree for degree in _divisors(devices) if experts % degree == 0]
    pairs = [
        (tensor * context, context, tensor)
        for tensor in _divisors(devices)
        if tensor <= MAX_TENSOR
        for context in _divisors(devices // tensor)
    ]
    # Sorted by the product, then by context: among equal products, tensor is the larger one.
    for _, context, tensor in sorted(pairs):
        for expert in reversed(expert_degrees):
            if devices % (expert * context * tensor) == 0:
                rest = devices // (expert * context * tensor)
                # data ascending: as much fsdp as possible first, and more copies of the state only where fsdp does not
                # divide a parameter.
                for data in _divisors(rest):
                    others = {"expert": expert, "context": context, "tensor": tensor}
                    yield {"data": data, "fsdp": rest // data, **others}


def _choose(
    pool: DevicePool,
    degrees: dict[str, int],
    candidate: MeshEstimate,
    rejected: list[tuple[str, str]],
    estimate: EstimateMesh,
) -> MeshChoice:
    """Choose these degrees, or data parallelism alone in place of fsdp if the state is small."""
    why = "the simplest mesh" if not rejected else f"the simplest valid mesh ({rejected[0][0]}: {rejected[0][1]})"
    # The batch is split as before, since rows are split over data and fsdp alike.
    # Copies of the state need one all-reduce of gradients per step; fsdp gathers the parameters in every pass as well.
    copies = {**degrees, "data": degrees["data"] * degrees["fsdp"], "fsdp": 1}
    if pool.usable_bytes and degrees["fsdp"] > 1:
        replicated = estimate(_with_slices(copies, pool.slices))
        whole_state = replicated.state_bytes + replicated.fetched_bytes
        if not replicated.problems and whole_state <= SMALL_STATE_FRACTION * pool.usable_bytes:
            degrees, candidate = copies, replicated
            why += f"; the state takes {size(whole_state)}, little enough to be replicated"
    memory = (
        f"estimated {candidate}, of {size(pool.usable_bytes)} per device"
        if pool.usable_bytes
        else "the memory of these devices is not known"
    )
    return MeshChoice(degrees, _dcn_degrees(pool.slices), f"{_name(degrees, pool.slices)}: {why}; {memory}")


def _name(degrees: Mapping[str, int], slices: int) -> str:
    over = "" if slices == 1 else f", times data={slices} over slices"
    return f"{_format_degrees(degrees) or 'one device'}{over}"


def _with_slices(degrees: Mapping[str, int], slices: int) -> dict[str, int]:
    return {**degrees, "data": degrees["data"] * slices}


def _dcn_degrees(slices: int) -> dict[str, int]:
    return {axis: slices if axis == "data" else 1 for axis in AXES}


def _divisors(count: int) -> list[int]:
    return [degree for degree in range(1, count + 1) if count % degree == 0]


def _format_degrees(degrees: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={degree}" for axis, degree in degrees.items() if degree > 1)


def choose_sharding(
    run: RunConfig,
    rules: Rules,
    devices: Sequence[Any],
    params: tuple[PyTree, PyTree],
    state: tuple[PyTree, PyTree],
    opt_state: tuple[PyTree, PyTree],
) -> tuple[ShardingConfig, str]:
    """Choose the mesh of a run with `sharding.auto`; return its configuration with the degrees, and the reason.

    Args:
      run: The run.
      rules: Its rules.
      devices: The devices that it will run on, or described ones.
      params: Logical axes and shapes of the parameters.
      state: Logical axes and shapes of parameters, gradients, and whatever else stays on the devices during a step.
      opt_state: Logical axes and shapes of the optimizer state.

    Raises:
      ConfigError: No mesh is valid.
    """
    accelerator = accelerator_of(devices[0].device_kind)
    usable = 0 if accelerator is None else accelerator.usable_bytes // accelerator.devices_per_chip
    pool = DevicePool(len(devices), known_slices(devices) or 1, usable)
    activations, all_logits = _activations(run, devices[0].platform)
    # The degree must divide the number of experts of every stack that has experts; a dense stack does not limit it.
    experts = math.gcd(*(stack.experts.num_experts for stack in run.model.stacks.values() if stack.experts)) or 1

    stays, fetched = logical_leaves(*state), list[LogicalArray]()
    for leaf in logical_leaves(*opt_state):
        (fetched if keeps_optimizer_state(run) and goes_to_host(leaf.array) else stays).append(leaf)

    def estimate(degrees: Mapping[str, int]) -> MeshEstimate:
        mesh = AbstractMesh(tuple(degrees.values()), tuple(degrees))
        # The checks of a mesh that a user writes, so that the choice is never refused later.
        problems = validate_sharding(run, mesh, rules, *params)
        if problems:
            return MeshEstimate(problems, 0, 0)

        def bytes_per_device(axes: LogicalAxes, table: Table, shape: Sequence[int], itemsize: float) -> float:
            # An abstract mesh has no shard shapes: divide by the size of all mesh axes that the specification names.
            shards = math.prod(
                mesh.shape[axis]
                for entry in spec(axes, table, shape, mesh)
                for axis in ((entry,) if isinstance(entry, str) else entry or ())
            )
            return itemsize * math.prod(shape) / shards

        state_bytes, fetched_bytes = (
            sum(
                bytes_per_device(leaf.axes, rules.parameters, leaf.array.shape, leaf.array.dtype.itemsize)
                for leaf in leaves
            )
            for leaves in (stays, fetched)
        )
        activation_bytes = sum(
            array.count * bytes_per_device(array.axes, rules.activations, array.shape, array.itemsize)
            for array in activations
        )
        for array in all_logits:
            rows, length, vocabulary = (
                count // math.prod(mesh.shape[axis] for axis in split_axes(name, rules.activations, count, mesh))
                for name, count in zip(array.axes, array.shape, strict=True)
            )
            share = chunk_share(run, rows * length, vocabulary)
            activation_bytes += (share or 1.0) * rows * length * vocabulary * array.itemsize
            if share is not None:
                # The gradient of the head is added up, chunk by chunk, in float32.
                table = run.model.padded_vocab_size, run.model.lm_head_width
                activation_bytes += bytes_per_device(("vocab", "embed"), rules.activations, table, 4)
        return MeshEstimate((), int(state_bytes), int(activation_bytes), int(fetched_bytes))

    choice = choose_degrees(pool, experts, estimate)
    degrees: dict[str, Any] = {"auto": False, **choice.degrees, "dcn": DcnConfig(**choice.dcn)}
    config = dataclasses.replace(run.sharding, **degrees)
    return config, choice.reason


def _activations(run: RunConfig, platform: str) -> tuple[list[SavedArray], list[SavedArray]]:
    """Return the saved activations of one accumulation step, and the logits of its sub-batches: in float32, with their
    cotangents."""
    parts = run.training.gradient_accumulation_steps
    saved, all_logits = list[SavedArray](), list[SavedArray]()
    for sub_batch in batch_spec(run).values():
        features = accumulation_part(sub_batch, parts)
        for arrays in saved_activations(run.model, features, platform).values():
            saved += arrays
        if run.model.stacks and run.model.task_head is None:
            # The largest arrays of a step with a large vocabulary: logits in float32, cotangents in the model's type.
            all_logits.append(logits(run.model, features, 4 + itemsize(run.model)))
    return saved, all_logits
