"""The plan of a run on a machine: everything that is known of it before it is compiled, as one document."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from t5x_like.config import RunConfig
from t5x_like.planning import flops, tokens
from t5x_like.planning.cache import cache_bytes, cache_per_token
from t5x_like.planning.memory import MemoryEstimate, estimate, trained_params
from t5x_like.planning.outlines import device_outlines
from t5x_like.planning.parameters import Part, cross_attention_share, parameter_parts, total
from t5x_like.planning.scaling import BESIROGLU, CAVEAT, HOFFMANN, compute_optimal, tokens_for
from t5x_like.planning.topologies import Topology, accelerator_of
from t5x_like.program import Program, assemble

VERSION = 1
"""Of the document."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices that a plan is for, or that a run has found.

    Attributes:
      topology: As it was asked for; None for the devices of this machine.
      processes: Hosts of a topology.
      usable_bytes: Of a device's memory, what a program can have; 0 where it is not known.
      flops_per_second: Peak of all devices together; 0 where it is not known.
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


def machine_of_topology(topology: Topology) -> Machine:
    return Machine(
        topology=str(topology),
        device_kind=topology.device_kind,
        devices=topology.num_devices,
        processes=topology.num_hosts,
        usable_bytes=topology.usable_bytes,
        flops_per_second=topology.flops_per_second,
    )


def machine_of_devices(devices: Sequence[Any]) -> Machine:
    """Of real devices. Memory is what they say themselves, or else the table; a CPU's is not known."""
    first = devices[0]
    known = accelerator_of(first.device_kind)
    memory = first.memory_stats() if hasattr(first, "memory_stats") else None
    usable = 0 if known is None else known.usable_bytes // known.devices_per_chip
    return Machine(
        topology=None,
        device_kind=first.device_kind,
        devices=len(devices),
        processes=len({device.process_index for device in devices}),
        usable_bytes=int((memory or {}).get("bytes_limit", usable)),
        flops_per_second=0.0 if known is None else known.flops_per_second / known.devices_per_chip * len(devices),
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs on a machine. Bytes are of one device unless it says otherwise.

    Attributes:
      trained: Parameters that have gradients.
      program: What it was made of, for shardings.
    """

    run: RunConfig
    machine: Machine
    parts: Mapping[str, Part]
    trained: int
    memory: MemoryEstimate
    program: Program

    def as_dict(self) -> dict[str, Any]:
        """For a file: numbers, and nothing that is not in `json`."""
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
            "memory": {
                "peak_bytes": self.memory.peak_bytes,
                "usable_bytes": self.memory.usable_bytes,
                "fits": self.memory.fits,
                "moment": self.memory.moment,
                "parts": self.memory.parts,
                "moments": {
                    name: sum(self.memory.state.values()) + sum(parts.values())
                    for name, parts in self.memory.moments.items()
                },
            },
            "tokens": self.tokens(),
            "cache": self.cache(),
            "scaling": self.scaling(),
        }

    def compute(self) -> dict[str, Any]:
        """FLOPs of a step, of a cell, and what they consist of."""
        run = self.run
        model = flops.training_flops(run)
        executed = flops.executed_flops(run)
        peak = self.machine.flops_per_second
        return {
            "flops_per_step": model,
            "flops_per_cell": model / tokens.tokens_per_step(run),
            "executed_flops_per_step": executed,
            "flops_of_the_run": model * run.training.num_train_steps,
            "forward_parts": flops.forward_flops(run),
            "six_n_d": flops.six_n_d(run, total(self.parts).active),
            "cross_attention_flops": flops.cross_attention_premium(run),
            "cross_attention_parameters": cross_attention_share(self.parts),
            "least_seconds_per_step": executed / peak if peak else None,
        }

    def tokens(self) -> dict[str, Any]:
        """Of a step: cells, and of each denoiser rows, raw tokens and loss tokens."""
        denoisers = tokens.denoiser_tokens(self.run)
        return {
            "cells": tokens.stream_cells(self.run),
            "raw": sum(each.raw_tokens for each in denoisers) if denoisers else None,
            "loss": sum(each.loss_tokens for each in denoisers) if denoisers else None,
            "denoisers": [dataclasses.asdict(each) for each in denoisers],
        }

    def cache(self) -> dict[str, Any] | None:
        """Of generation, over all devices; None without a decoder."""
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
        """What the run's operations would best be spent on, by the Chinchilla fits. N counts the parameters that a
        token goes through; D the raw tokens of the run, or its cells where they are not known."""
        budget = flops.training_flops(self.run) * self.run.training.num_train_steps
        steps = self.run.training.num_train_steps
        per_step = self.tokens()["raw"] or tokens.tokens_per_step(self.run)
        active = total(self.parts).active
        return {
            "flops": budget,
            "parameters": active,
            "tokens": per_step * steps,
            "optima": [dataclasses.asdict(compute_optimal(budget, fit)) for fit in (BESIROGLU, HOFFMANN)],
            "tokens_for_these_parameters": tokens_for(active),
            "steps_for_these_parameters": tokens_for(active) / per_step,
            "caveat": CAVEAT,
        }


def plan_run(run: RunConfig, topology: Topology | None = None) -> Plan:
    """The plan of a run for a topology, whose devices need not exist, or for the devices of this machine.

    Raises:
      ConfigError: the run does not fit the devices; all problems are listed.
    """
    if topology is not None:
        return plan_program(assemble(run, device_outlines(topology)), machine_of_topology(topology))
    devices = jax.devices()
    return plan_program(assemble(run, devices), machine_of_devices(devices))


def plan_program(program: Program, machine: Machine) -> Plan:
    """The plan of a program that is assembled already."""
    trained = trained_params(program)
    return Plan(
        run=program.run,
        machine=machine,
        parts=parameter_parts(program),
        trained=sum(leaf.size for leaf in jax.tree.leaves(trained)),
        memory=estimate(program, machine.usable_bytes),
        program=program,
    )
