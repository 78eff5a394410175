"""Ahead-of-time compilation: what XLA's TPU compiler says of a run's own step on a machine that need not be there.

What is compiled is `assemble(run, devices).train_step`, the function that training calls, for devices that are only
described. Peak memory, buffers and collectives are those of the program that would run. Time is not known: `roofline`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from t5x_like.config import RunConfig
from t5x_like.planning.buffers import Buffer, allocated_bytes, live_at_peak
from t5x_like.planning.collectives import Collective, collectives
from t5x_like.planning.compiler import captured_stderr, compiler_devices
from t5x_like.planning.flops import executed_flops
from t5x_like.planning.hlo import parse
from t5x_like.planning.topologies import Topology
from t5x_like.planning.traffic import memory_traffic
from t5x_like.program import Program, assemble

Effort = Literal["low", "default"]
"""low: XLA's optimization level O0, several times faster, whose peaks can be well below. default: what a run gets."""
Tree = Any

REMATERIALIZATION = "Involuntary full rematerialization"
"""XLA's complaint of a sharding that it cannot reach but by gathering the whole array."""
_NEEDED = re.compile(r"\(?(\d+(?:\.\d+)?)([KMGT])\)?(?: of (?:\d|\.)+[KMGT] hbm|\)? exceeds available)", re.IGNORECASE)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step as XLA compiled it, or why it did not. Bytes are those of one device.

    Attributes:
      step: "train" or "decode".
      work: What the step is given.
      executed_flops: Of all devices, by formula.
      mesh: Axis -> degree, those between slices included.
      seconds: That the compilation took, here.
      fits: Whether XLA accepted it.
      limit_bytes: What a program can have of the device's memory.
      peak_bytes: At the fullest moment; of a refused program what it would need.
      argument_bytes: State and batch, which lie there before the step; 0 of a refused program.
      words: XLA's own of the refusal; "" if it fits.
      buffers: What is alive at the fullest moment, largest first.
      collectives: By kind and axes; empty of a refused program.
      traffic_bytes: Between memory and cores; 0 of a refused program.
      complaints: XLA's warnings of shardings that it reaches only by gathering whole arrays.
    """

    step: str
    work: str
    executed_flops: float
    topology: Topology
    mesh: Mapping[str, int]
    effort: Effort
    seconds: float
    fits: bool
    limit_bytes: int
    peak_bytes: int
    argument_bytes: int = 0
    words: str = ""
    buffers: tuple[Buffer, ...] = ()
    collectives: tuple[Collective, ...] = ()
    traffic_bytes: int = 0
    complaints: tuple[str, ...] = ()

    @property
    def room_bytes(self) -> int:
        """What is left at the fullest moment; negative: what is missing."""
        return self.limit_bytes - self.peak_bytes


def compile_train_step(run: RunConfig, topology: Topology, *, effort: Effort = "low") -> Compiled:
    """Compiles a run's training step.

    Raises:
      UserError: XLA's TPU compiler is not installed.
      ConfigError: the run does not fit the topology's number of devices, or the topology is none of TPUs.
    """
    program = assemble(run, compiler_devices(topology))
    step: Any = program.train_step
    lowered = step.lower(carried_state(program), abstract_batch(program))
    parts = run.training.gradient_accumulation_steps
    work = (
        f"{run.training.batch_size} rows" + (f" in {parts} parts" if parts > 1 else "") + f", remat {run.model.remat}"
    )
    found = compile_lowered("train", lowered, program, topology, effort=effort)
    return dataclasses.replace(found, work=work, executed_flops=executed_flops(run))


def carried_state(program: Program) -> Tree:
    """The state that the train step takes, as shapes with shardings."""
    if program.adaptation is None:
        return program.abstract_state
    return {**program.abstract_state, "base": program.abstract_base}


def abstract_batch(program: Program) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    return {
        name: {key: jax.ShapeDtypeStruct(array.shape, array.dtype) for key, array in features.items()}
        for name, features in program.batch_spec.items()
    }


def compile_lowered(step: str, lowered: Any, program: Program, topology: Topology, *, effort: Effort) -> Compiled:
    """Compiles a lowered function of a program's mesh and reads what XLA says of it."""
    mesh = dict(program.mesh.shape)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="t5x_like_xla_") as folder, _settings(effort):
        dump = Path(folder)
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        refusal = ""
        with captured_stderr() as said:
            try:
                compiled = lowered.compile(compiler_options=options)
            except jax.errors.JaxRuntimeError as error:
                refusal = str(error)
                if "RESOURCE_EXHAUSTED" not in refusal:
                    raise
        found = Compiled(
            step=step,
            work="",
            executed_flops=0.0,
            topology=topology,
            mesh=mesh,
            effort=effort,
            seconds=time.monotonic() - start,
            fits=not refusal,
            limit_bytes=topology.usable_bytes,
            peak_bytes=allocated_bytes(dump) or 0,
            words=refusal,
            buffers=tuple(live_at_peak(dump)),
            complaints=tuple(line for line in said if REMATERIALIZATION in line),
        )
    if refusal:
        return dataclasses.replace(found, peak_bytes=_needed(refusal) or found.peak_bytes)
    memory = compiled.memory_analysis()
    module = parse(compiled.as_text())
    slices = [getattr(device, "slice_index", 0) or 0 for device in program.mesh.devices.flatten()]
    return dataclasses.replace(
        found,
        peak_bytes=memory.peak_memory_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        collectives=tuple(collectives(module, mesh, slices)),
        traffic_bytes=memory_traffic(module),
    )


@contextlib.contextmanager
def _settings(effort: Effort) -> Iterator[None]:
    """The effort, and no cache of compilations: what is compiled for described devices cannot be read back from it."""
    wanted = {"jax_optimization_level": "O0"} if effort == "low" else {}
    wanted["jax_enable_compilation_cache"] = False  # type: ignore[assignment]
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _needed(words: str) -> int | None:
    """The bytes that XLA says a refused program needs."""
    found = _NEEDED.search(words)
    return int(float(found[1]) * _UNITS[found[2].upper()]) if found else None
