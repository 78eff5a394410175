"""The degrees of a mesh, chosen for a run and the devices it finds, with the reason in words.

The rule, in this order:
  1. Slices are copies of the model (data over DCN): of all axes, data asks least of a slow network.
  2. Devices share the experts as far as their number allows.
  3. Of tensor and context, the least product with which the rows of a batch can be split over the other devices and
     state and activations fit; tensor up to 8 before context, because beyond that its exchanges outweigh its products.
  4. The rest is fsdp, as far as it divides the parameters, and data; or data alone where the whole state takes less
     than a tenth of a device's memory, because then there is nothing to gain from gathering parameters.
A mesh that `check` would refuse is never chosen. Where nothing fits, it is the mesh that needs least memory, and the
reason says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh

from t5x_like.config import ConfigError, DcnConfig, PartitioningConfig, Problem, RunConfig
from t5x_like.config.partitioning import AXES
from t5x_like.partitioning.activations import activations
from t5x_like.partitioning.check import check_partitioning
from t5x_like.partitioning.mesh import known_slices
from t5x_like.partitioning.rules import LogicalAxes, Rules, Table, spec
from t5x_like.partitioning.shardings import leaves
from t5x_like.planning.topologies import accelerator_of

Tree = Any
MOST_TENSOR = 8
SHARE_OF_MEMORY = 0.9
"""What may be taken by what is estimated; the rest is for what is not."""
SMALL_STATE = 0.1
GIB = 2**30


class Look(NamedTuple):
    """What a mesh would be like.

    Attributes:
      problems: Why it cannot be; empty if it can.
      state_bytes: Of parameters, optimizer and gradients, on a device.
      activation_bytes: The same of what the backward pass finds kept.
    """

    problems: Sequence[Problem]
    state_bytes: int
    activation_bytes: int

    @property
    def total(self) -> int:
        return self.state_bytes + self.activation_bytes


class Machine(NamedTuple):
    """Attributes:
    devices: Of all slices.
    slices: Of equal size.
    usable_bytes: A device's memory; 0 where it is not known.
    """

    devices: int
    slices: int
    usable_bytes: int


class Choice(NamedTuple):
    """Attributes:
    degrees: Within a slice.
    dcn: Between slices.
    reason: A sentence or two.
    """

    degrees: dict[str, int]
    dcn: dict[str, int]
    reason: str


def choose_degrees(machine: Machine, experts: int, look: Callable[[Mapping[str, int]], Look]) -> Choice:
    """The degrees by the rule above.

    Args:
      machine: The devices.
      experts: Of a layer; 1 without.
      look: What a mesh with these axis sizes, slices included, would be like.

    Raises:
      ConfigError: there is no valid mesh; the problems are those of the simplest one.
    """
    room = int(SHARE_OF_MEMORY * machine.usable_bytes)
    rejected: list[tuple[str, str]] = []
    first_problems: Sequence[Problem] = ()
    least: tuple[int, dict[str, int], Look] | None = None
    for degrees in _candidates(machine.devices // machine.slices, experts):
        found = look(_with_slices(degrees, machine.slices))
        name = _stated(degrees) or "one device"
        if found.problems:
            first_problems = first_problems or found.problems
            first = found.problems[0]
            rejected.append((name, f"{first.where} is {first.found}, and not {first.expected}"))
            continue
        if not room or found.total <= room:
            return _chosen(machine, degrees, found, rejected, look)
        rejected.append((name, f"{_gib(found.total)} a device, of {_gib(room)}"))
        if least is None or found.total < least[0]:
            least = found.total, degrees, found
    if least is None:
        raise ConfigError(first_problems)
    _, degrees, found = least
    memory = f"{_gib(found.state_bytes)} of state and {_gib(found.activation_bytes)} of activations"
    reason = (
        f"{_name(degrees, machine.slices)}: no mesh is estimated to fit {_gib(room)} a device; this one needs least, "
        f"{memory}: use more devices, training.gradient_accumulation_steps or model.remat"
    )
    return Choice(degrees, _slices(machine.slices), reason)


def _candidates(devices: int, experts: int) -> Iterator[dict[str, int]]:
    """Degrees within a slice, best first; all of them multiply to `devices`."""
    shares = [degree for degree in _divisors(devices) if experts % degree == 0]
    pairs = [
        (tensor * context, context, tensor)
        for tensor in _divisors(devices)
        if tensor <= MOST_TENSOR
        for context in _divisors(devices // tensor)
    ]
    for _, context, tensor in sorted(pairs):
        for expert in reversed(shares):
            if devices % (expert * context * tensor) == 0:
                rest = devices // (expert * context * tensor)
                for data in _divisors(rest):
                    others = {"expert": expert, "context": context, "tensor": tensor}
                    yield {"data": data, "fsdp": rest // data, **others}


def _chosen(
    machine: Machine,
    degrees: dict[str, int],
    found: Look,
    rejected: list[tuple[str, str]],
    look: Callable[[Mapping[str, int]], Look],
) -> Choice:
    why = "the simplest mesh" if not rejected else f"the simplest mesh that can be ({rejected[0][0]}: {rejected[0][1]})"
    copies = {**degrees, "data": degrees["data"] * degrees["fsdp"], "fsdp": 1}
    if machine.usable_bytes and degrees["fsdp"] > 1:
        whole = look(_with_slices(copies, machine.slices))
        if not whole.problems and whole.state_bytes <= SMALL_STATE * machine.usable_bytes:
            degrees, found = copies, whole
            why += f"; the state takes {_gib(whole.state_bytes)}, little enough to be whole on each device"
    memory = (
        f"estimated {_gib(found.state_bytes)} of state and {_gib(found.activation_bytes)} of activations, of "
        f"{_gib(machine.usable_bytes)} a device"
        if machine.usable_bytes
        else "the memory of these devices is not known"
    )
    return Choice(degrees, _slices(machine.slices), f"{_name(degrees, machine.slices)}: {why}; {memory}")


def _name(degrees: Mapping[str, int], slices: int) -> str:
    over = "" if slices == 1 else f", times data={slices} over slices"
    return f"{_stated(degrees) or 'one device'}{over}"


def _with_slices(degrees: Mapping[str, int], slices: int) -> dict[str, int]:
    return {**degrees, "data": degrees["data"] * slices}


def _slices(slices: int) -> dict[str, int]:
    return {axis: slices if axis == "data" else 1 for axis in AXES}


def _divisors(count: int) -> list[int]:
    return [degree for degree in range(1, count + 1) if count % degree == 0]


def _stated(degrees: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={degree}" for axis, degree in degrees.items() if degree > 1)


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def choose_partitioning(
    run: RunConfig,
    rules: Rules,
    devices: Sequence[Any],
    params: tuple[Tree, Tree],
    state: tuple[Tree, Tree],
) -> tuple[PartitioningConfig, str]:
    """The configuration of a run whose mesh is to be chosen, with its degrees, and the reason.

    Args:
      run: The run.
      rules: Its rules.
      devices: What it will run on, or described ones.
      params: Logical axes and shapes of the parameters.
      state: The same of parameters, optimizer state and gradients.

    Raises:
      ConfigError: no mesh can be.
    """
    accelerator = accelerator_of(devices[0].device_kind)
    usable = 0 if accelerator is None else accelerator.usable_bytes // accelerator.devices_per_chip
    machine = Machine(len(devices), known_slices(devices) or 1, usable)
    kept = activations(run)
    experts = math.gcd(*(stack.experts.num_experts if stack.experts else 1 for stack in run.model.stacks.values()))

    def look(degrees: Mapping[str, int]) -> Look:
        mesh = AbstractMesh(tuple(degrees.values()), tuple(degrees))
        problems = check_partitioning(run, mesh, rules, *params)
        if problems:
            return Look(problems, 0, 0)

        def size(axes: LogicalAxes, table: Table, shape: Sequence[int], itemsize: float) -> float:
            ways = math.prod(
                mesh.shape[axis]
                for entry in spec(axes, table, shape, mesh)
                for axis in ((entry,) if isinstance(entry, str) else entry or ())
            )
            return itemsize * math.prod(shape) / ways

        of_state = sum(
            size(leaf.axes, rules.parameters, leaf.array.shape, leaf.array.dtype.itemsize) for leaf in leaves(*state)
        )
        of_activations = sum(
            _times_kept(run, x.path) * size(x.axes, rules.activations, x.shape, x.itemsize) for x in kept
        )
        return Look((), int(of_state), int(of_activations))

    choice = choose_degrees(machine, experts, look)
    degrees: dict[str, Any] = {"auto": False, **choice.degrees, "dcn": DcnConfig(**choice.dcn)}
    config = dataclasses.replace(run.partitioning, **degrees)
    return config, choice.reason


def _times_kept(run: RunConfig, path: str) -> float:
    """How many arrays of a kind the backward pass finds, roughly: `planning.memory` counts them."""
    name = path.rpartition("/")[2]
    if name == "logits":
        return 2.0
    layers = run.model.stacks[path.split("/")[1]].num_layers
    per_layer = {
        "full": {"residual": 1.0},
        "dots": {"residual": 3.0, "query": 1.0, "key": 2.0, "mlp": 2.0, "experts": 2.0},
        "none": {"residual": 4.0, "block_input": 2.0, "query": 2.0, "key": 2.0, "mlp": 3.0, "experts": 6.0},
    }[run.model.remat]
    return layers * per_layer.get(name, 0.0)
