"""Ahead-of-time compilation of a run's own step by XLA's TPU compiler, for a machine that need not exist.

The compiled function is `build_program(run, devices).train_step`, the function that training calls, for devices that
are only described. Peak memory, buffers and collectives are therefore those of the program that would run. The time of
a step is not known; `roofline` gives lower bounds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from t5x_like.config import RunConfig
from t5x_like.hardware.topologies import Topology
from t5x_like.planning.estimate.flops import executed_flops
from t5x_like.planning.xla import compiler_formats
from t5x_like.planning.xla.collectives import Collective, collectives
from t5x_like.planning.xla.hlo_text import parse
from t5x_like.planning.xla.libtpu import captured_stderr, compiler_devices
from t5x_like.planning.xla.memory_report import Buffer, allocated_bytes, live_at_peak
from t5x_like.planning.xla.memory_traffic import memory_traffic
from t5x_like.program import Program, build_program
from t5x_like.utils.type_aliases import PyTree

Effort = Literal["low", "default"]
"""Effort of the compiler. low: optimization level O0, several times faster; its peaks can be well below those of the
default. default: the level that a run gets."""
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step as XLA compiled it, or the reason why it did not. Bytes are per device.

    Attributes:
      step: "train" or "decode".
      work: Description of the step's input.
      executed_flops: FLOPs of all devices, by formula.
      mesh: Axis -> degree, the product of the degrees within and between slices.
      seconds: Duration of the compilation.
      fits: Whether XLA accepted the program.
      limit_bytes: Memory of a device that a program can use.
      peak_bytes: Memory at the peak; for a refused program the memory that it would need.
      argument_bytes: State and batch, which are in memory before the step; 0 for a refused program.
      host_bytes: Bytes in the memory of the host, of arguments and in between; 0 for a refused program.
      error: XLA's error of a refused program; "" if it fits.
      buffers: Buffers that are alive at the peak, largest first.
      collectives: Collectives by kind and axes; empty for a refused program.
      traffic_bytes: Bytes between memory and cores; 0 for a refused program.
      warnings: XLA's warnings of shardings that it reaches only by gathering whole arrays.
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
    host_bytes: int = 0
    error: str = ""
    buffers: tuple[Buffer, ...] = ()
    collectives: tuple[Collective, ...] = ()
    traffic_bytes: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def free_bytes(self) -> int:
        """Bytes that are free at the peak; negative if the program needs more than there is."""
        return self.limit_bytes - self.peak_bytes


def compile_train_step(run: RunConfig, topology: Topology, *, effort: Effort = "low") -> CompiledStep:
    """Compile a run's training step.

    Raises:
      UserError: XLA's TPU compiler is not installed.
      ConfigError: The run does not fit the topology's number of devices, or the topology has no TPUs.
    """
    program = build_program(run, compiler_devices(topology))
    step: Any = program.train_step
    lowered = step.lower(carried_state(program), abstract_batch(program))
    parts = run.training.gradient_accumulation_steps
    work = (
        f"{run.training.global_batch_size} rows"
        + (f" in {parts} parts" if parts > 1 else "")
        + f", remat {run.model.remat}"
    )
    compiled = compile_lowered("train", lowered, program, topology, effort=effort)
    return dataclasses.replace(compiled, work=work, executed_flops=executed_flops(run))


def carried_state(program: Program) -> PyTree:
    """Return the state that the train step takes, as shapes with shardings."""
    frozen = {"base": program.abstract_base, "teacher": program.abstract_teacher_params}
    return {**program.abstract_state, **{name: params for name, params in frozen.items() if params is not None}}


def abstract_batch(program: Program) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Return the batch that the train step takes, as shapes."""
    return {
        name: {key: jax.ShapeDtypeStruct(array.shape, array.dtype) for key, array in features.items()}
        for name, features in program.batch_spec.items()
    }


def compile_lowered(step: str, lowered: Any, program: Program, topology: Topology, *, effort: Effort) -> CompiledStep:
    """Compile a lowered function on a program's mesh and read XLA's reports of it."""
    mesh = dict(program.mesh.shape)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="t5x_like_xla_") as folder, _settings(effort):
        dump = Path(folder)
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        error = ""
        with captured_stderr() as lines:
            try:
                executable = lowered.compile(compiler_options=options)
            except jax.errors.JaxRuntimeError as refusal:
                error = str(refusal)
                if "RESOURCE_EXHAUSTED" not in error:
                    raise
        compiled = CompiledStep(
            step=step,
            work="",
            executed_flops=0.0,
            topology=topology,
            mesh=mesh,
            effort=effort,
            seconds=time.monotonic() - start,
            fits=not error,
            limit_bytes=topology.usable_bytes,
            peak_bytes=allocated_bytes(dump) or 0,
            error=error,
            buffers=tuple(live_at_peak(dump)),
            warnings=tuple(line for line in lines if compiler_formats.REMATERIALIZATION in line),
        )
    if error:
        return dataclasses.replace(compiled, peak_bytes=_required_bytes(error) or compiled.peak_bytes)
    memory = executable.memory_analysis()
    module = parse(executable.as_text())
    slices = [getattr(device, "slice_index", 0) or 0 for device in program.mesh.devices.flatten()]
    return dataclasses.replace(
        compiled,
        # XLA (libtpu 0.0.42.1) counts arguments in the memory of the host as well; its limit does not.
        peak_bytes=memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        host_bytes=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        collectives=tuple(collectives(module, mesh, slices)),
        traffic_bytes=memory_traffic(module),
    )


@contextlib.contextmanager
def _settings(effort: Effort) -> Iterator[None]:
    """Set the effort, and disable the compilation cache, which cannot read back programs for described devices."""
    settings = {"jax_optimization_level": "O0"} if effort == "low" else {}
    settings["jax_enable_compilation_cache"] = False  # type: ignore[assignment]
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _required_bytes(error: str) -> int | None:
    """Return the bytes that a refused program needs according to XLA's error."""
    match = compiler_formats.REQUIRED_MEMORY.search(error)
    return int(float(match[1]) * _UNITS[match[2].upper()]) if match else None
