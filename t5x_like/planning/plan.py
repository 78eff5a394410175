"""Plan of a run on a machine: everything that is known before compilation, as one document."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from t5x_like.config import RunConfig
from t5x_like.config.batch_sizes import batch_sizes
from t5x_like.hardware.fake_devices import fake_devices
from t5x_like.hardware.topologies import Topology, accelerator_of
from t5x_like.planning.estimate import flops, tokens
from t5x_like.planning.estimate.data_reads import DataReads, data_reads
from t5x_like.planning.estimate.kv_cache_bytes import cache_bytes, cache_per_token
from t5x_like.planning.estimate.memory import MemoryEstimate, estimate, trained_params
from t5x_like.planning.estimate.parameters import (
    ParameterCount,
    cross_attention_share,
    parameter_parts,
    total,
)
from t5x_like.planning.estimate.scaling_laws import BESIROGLU, CAVEAT, HOFFMANN, compute_optimal, tokens_for
from t5x_like.program import Program, build_program

VERSION = 2
"""Version of the plan document."""


@dataclasses.dataclass(frozen=True)
class MachineSpec:
    """Devices that a plan is for, or that a run uses.

    Attributes:
      topology: Topology of the plan; None for the devices of this machine.
      processes: Number of processes, one per host of a topology.
      usable_bytes: Memory of a device that a program can use; 0 if unknown.
      flops_per_second: Peak of all devices together; 0 if unknown.
    """

    topology: str | None
    device_kind: str
    devices: int
    processes: int
    usable_bytes: int
    flops_per_second: float

    def __str__(self) -> str:
        if self.topology is None:
            return f"{self.devices} x {self.device_kind}"
        hosts = "1 host" if self.processes == 1 else f"{self.processes} hosts"
        return f"{self.topology}: {self.devices} x {self.device_kind}, {hosts}"


def machine_of_topology(topology: Topology) -> MachineSpec:
    return MachineSpec(
        topology=str(topology),
        device_kind=topology.device_kind,
        devices=topology.num_devices,
        processes=topology.num_hosts,
        usable_bytes=topology.usable_bytes,
        flops_per_second=topology.flops_per_second,
    )


def machine_of_devices(devices: Sequence[Any]) -> MachineSpec:
    """Return the specification of real devices.

    The memory is the limit that the devices report, or else the one in the table of accelerators; a CPU's is unknown.
    """
    first = devices[0]
    known = accelerator_of(first.device_kind)
    memory = first.memory_stats() if hasattr(first, "memory_stats") else None
    usable = 0 if known is None else known.usable_bytes // known.devices_per_chip
    return MachineSpec(
        topology=None,
        device_kind=first.device_kind,
        devices=len(devices),
        processes=len({device.process_index for device in devices}),
        usable_bytes=int((memory or {}).get("bytes_limit", usable)),
        flops_per_second=0.0 if known is None else known.flops_per_second / known.devices_per_chip * len(devices),
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Requirements of a run on a machine. Bytes are per device unless stated otherwise.

    Attributes:
      parts: Part of the model -> its parameters.
      trained: Number of parameters that have gradients.
      program: The program that the plan was computed from, for its shardings.
    """

    run: RunConfig
    machine: MachineSpec
    parts: Mapping[str, ParameterCount]
    trained: int
    memory: MemoryEstimate
    program: Program

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as a JSON document."""
        return {
            "version": VERSION,
            "run": self.run.name,
            "machine": dataclasses.asdict(self.machine),
            "mesh": dict(self.program.mesh.shape),
            "mesh_reason": self.program.mesh_reason,
            "parameters": {
                "total": total(self.parts).count,
                "active": total(self.parts).active,
                "trained": self.trained,
                "parts": {name: dataclasses.asdict(part) for name, part in self.parts.items()},
            },
            "compute": self.compute(),
            "attention": self.program.attention,
            "memory": {
                "peak_bytes": self.memory.peak_bytes,
                "usable_bytes": self.memory.usable_bytes,
                "fits": self.memory.fits,
                "moment": self.memory.moment,
                "parts": self.memory.parts,
                "host_parts": dict(self.memory.host),
                "host_bytes": self.host_bytes,
                "moments": {
                    name: sum(self.memory.state.values()) + sum(parts.values())
                    for name, parts in self.memory.moments.items()
                },
            },
            "tokens": self.tokens(),
            "data": None if (reads := self.reads()) is None else reads.as_dict(),
            "cache": self.cache(),
            "scaling": self.scaling(),
        }

    @property
    def host_bytes(self) -> int:
        """Bytes in the memory of each host, of all its devices."""
        return sum(self.memory.host.values()) * self.machine.devices // self.machine.processes

    @property
    def full_steps(self) -> float:
        """Number of steps of full size that have as many rows as the run."""
        training = self.run.training
        return batch_sizes(training).in_full_batches(training.num_train_steps)

    def compute(self) -> dict[str, Any]:
        """Return FLOPs per step of full size, per token position, and by part."""
        run = self.run
        model = flops.training_flops(run)
        executed = flops.executed_flops(run)
        peak = self.machine.flops_per_second
        return {
            "flops_per_step": model,
            "flops_per_token": model / tokens.tokens_per_step(run),
            "executed_flops_per_step": executed,
            "total_flops": model * self.full_steps,
            "forward_parts": flops.forward_flops(run),
            "six_n_d": flops.six_n_d(run, total(self.parts).active),
            "cross_attention_flops": flops.cross_attention_premium(run),
            "cross_attention_parameters": cross_attention_share(self.parts),
            "min_seconds_per_step": executed / peak if peak else None,
        }

    def tokens(self) -> dict[str, Any]:
        """Return the token positions per step, and rows, raw tokens and loss tokens of each denoiser."""
        denoisers = tokens.denoiser_tokens(self.run)
        return {
            "positions": tokens.token_positions(self.run),
            "raw": sum(each.raw_tokens for each in denoisers) if denoisers else None,
            "loss": sum(each.loss_tokens for each in denoisers) if denoisers else None,
            "denoisers": [dataclasses.asdict(each) for each in denoisers],
        }

    def reads(self) -> DataReads | None:
        """Return the windows of text that a host reads; None if seqio reads the data."""
        return data_reads(self.run, self.machine.processes, self.compute()["min_seconds_per_step"])

    def cache(self) -> dict[str, Any] | None:
        """Return the size of the KV cache for generation, over all devices; None without a decoder."""
        model, data = self.run.model, self.run.data
        if model.decoder is None or model.task_head is not None:
            return None
        source = data.inputs_length if model.encoder is not None else 0
        length = data.targets_length if model.encoder is not None else data.row_length
        return {
            "dtype": model.dtype,
            **dataclasses.asdict(cache_per_token(model)),
            "per_token_int8": cache_per_token(model, "int8").per_token,
            "row": {"length": length, "encoder_length": source},
            "per_row": cache_bytes(model, rows=1, length=length, encoder_length=source),
        }

    def scaling(self) -> dict[str, Any]:
        """Return the compute-optimal use of the run's FLOPs by the Chinchilla fits.

        N counts the active parameters; D the raw tokens of the run, or its token positions if these are unknown.
        """
        budget = flops.training_flops(self.run) * self.full_steps
        per_step = self.tokens()["raw"] or tokens.tokens_per_step(self.run)
        active = total(self.parts).active
        return {
            "flops": budget,
            "parameters": active,
            "tokens": per_step * self.full_steps,
            "optima": [dataclasses.asdict(compute_optimal(budget, fit)) for fit in (BESIROGLU, HOFFMANN)],
            "tokens_for_these_parameters": tokens_for(active),
            "steps_for_these_parameters": tokens_for(active) / per_step,
            "caveat": CAVEAT,
        }


def plan_run(run: RunConfig, topology: Topology | None = None) -> Plan:
    """Return the plan of a run for a topology, whose devices need not exist, or for the devices of this machine.

    Raises:
      ConfigError: The run does not fit the devices; all problems are listed.
    """
    if topology is not None:
        return plan_program(build_program(run, fake_devices(topology)), machine_of_topology(topology))
    devices = jax.devices()
    return plan_program(build_program(run, devices), machine_of_devices(devices))


def plan_program(program: Program, machine: MachineSpec) -> Plan:
    """Return the plan of an existing program."""
    trained = trained_params(program)
    return Plan(
        run=program.run,
        machine=machine,
        parts=parameter_parts(program),
        trained=sum(leaf.size for leaf in jax.tree.leaves(trained)),
        memory=estimate(program, machine.usable_bytes),
        program=program,
    )
