"""Start-up summary: sizes, costs, devices, and the first batch as text, printed before the first step."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
from rich import box
from rich.table import Table
from rich.text import Text

from t5x_like.adapters.base_weights import Base
from t5x_like.config import RunConfig
from t5x_like.config.batch_sizes import batch_sizes
from t5x_like.data.stream.data_source import DataSource
from t5x_like.hardware import cpu_allocator
from t5x_like.hardware.topologies import accelerator_of
from t5x_like.interop.huggingface.family_matching import describe_export
from t5x_like.monitoring.throughput import Peak, measured_peak
from t5x_like.planning.estimate.flops import training_flops
from t5x_like.planning.estimate.memory import estimate
from t5x_like.planning.estimate.parameters import parameter_parts
from t5x_like.planning.estimate.tokens import tokens_per_step
from t5x_like.planning.plan_file import PLAN, differences, read_plan
from t5x_like.program import Program
from t5x_like.utils import formatting
from t5x_like.utils.console import Console
from t5x_like.utils.sanitize import visible

_ROWS_SHOWN, _TOKENS_SHOWN = 2, 60
_PACKAGES = ("t5x-like", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect numeric results, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak(program: Program) -> Peak:
    """Return the peak of the program's devices: from the table of accelerators, or measured for unknown kinds."""
    devices = program.mesh.devices.flatten()
    known = accelerator_of(devices[0].device_kind)
    if known is not None:
        rate = known.flops_per_second / known.devices_per_chip * devices.size
        return Peak(rate, f"{devices.size} x {devices[0].device_kind}, dense bfloat16 by data sheet")
    # CPU devices share the machine's cores, whatever their number.
    copies = 1 if devices[0].platform == "cpu" else devices.size
    return measured_peak(copies * _matrix_product_rate())


def _matrix_product_rate(size: int = 1024, repeats: int = 8) -> float:
    """Return FLOP/s of a float32 matrix product on the default device: the best of several, for busy machines."""
    product = jax.jit(jnp.matmul)
    matrix = jnp.ones((size, size))
    jax.block_until_ready(product(matrix, matrix))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)


def show(
    program: Program,
    source: DataSource,
    workdir: Path,
    step: int,
    first_row: int,
    console: Console,
    base: Base | None = None,
) -> None:
    """Print the tables at the start of a run, and the first rows that it will train on as text."""
    run = program.run
    total = run.training.num_train_steps
    devices = program.mesh.devices.flatten()
    size = jnp.dtype(run.training.parameter_type).itemsize
    summary = StartSummary(
        name=run.name,
        model=_model(run),
        attention=program.attention,
        run_dir=str(workdir),
        resume=f"resumes from step {step} of {total}" if step else f"new run of {total} steps",
        parts={name: Part(part.count, size * part.count) for name, part in parameter_parts(program).items()},
        total_steps=total,
        tokens_per_step=tokens_per_step(run),
        total_tokens=tokens_per_step(run) * batch_sizes(run.training).in_full_batches(total),
        flops_per_step=training_flops(run),
        memory=estimate(program).parts,
        devices=f"{devices.size} x {devices[0].device_kind}",
        mesh=dict(program.mesh.shape),
        versions=versions(),
    )
    print_summary(summary, console)
    console.print(describe_export(run.model, run.data.layout), highlight=False, markup=False)
    if devices[0].platform == "cpu":
        console.print(f"memory allocator: {cpu_allocator.status()}", highlight=False, markup=False)
    if program.mesh_reason is not None:
        console.print(f"mesh chosen: {program.mesh_reason}", highlight=False, markup=False)
    if base is not None and program.lora is not None:
        adapters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.abstract_params))
        console.print(
            f"adapters of rank {program.lora.rank} on {len(program.lora.kernels)} kernels: {adapters:,} "
            f"parameters are trained, those above are frozen. Base: {base.record['path']}, step {base.record['step']}, "
            f"fingerprint {base.record['fingerprint']}",
            markup=False,
        )
        for line in base.differences:
            console.print(f"the model is not the base's: {line}", markup=False)
    _compare_with_plan(program, workdir / PLAN, console)
    sizes = batch_sizes(run.training)
    last_row = first_row + sizes.rows_before(total) - sizes.rows_before(step)
    if epochs := source.epochs(last_row):
        passes = ", ".join(f"{count:.2f} of {name}" for name, count in epochs.items())
        console.print(f"passes over the data by step {total}: {passes}")
    console.print(*source.describe(first_row, _ROWS_SHOWN, _TOKENS_SHOWN))


def _compare_with_plan(program: Program, path: Path, console: Console) -> None:
    """Print the differences between the run and its saved plan, if there is one."""
    if not path.exists():
        return
    found = differences(read_plan(path), program, list(program.mesh.devices.flat))
    for line in found or ["devices, mesh, parameters, operations and memory are as planned"]:
        console.print(f"{path.name}: {line}", markup=False, highlight=False)


def _model(run: RunConfig) -> str:
    stacks = [
        f"{name} of {stack.num_layers} layers, d_model {stack.d_model}, {stack.num_heads} heads"
        for name, stack in {**run.model.stacks, "generator": run.model.generator}.items()
        if stack is not None
    ]
    rows = run.model.padded_vocab_size
    padded = "" if rows == run.model.vocab_size else f" (padded to {rows})"
    vocabulary = f"vocabulary {run.model.vocab_size}{padded}"
    return f"{run.model.architecture} ({'; '.join(stacks)}), {vocabulary}, {run.data.layout}"


@dataclasses.dataclass(frozen=True)
class Part:
    """Number of parameters of one part of the model, and their bytes over all devices."""

    parameters: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class StartSummary:
    """Content of the tables at the start of a run.

    Attributes:
      name: Name of the run.
      model: Architecture in a few words.
      attention: Backends of the attentions, and why preferred ones were passed over.
      run_dir: Run directory.
      resume: "new run of 2000 steps" or "resumes from step 400 of 2000".
      parts: Parameters by part of the model.
      total_steps: Step at which the run ends.
      tokens_per_step: Maximum number of token positions of a global batch of full size that are not padding.
      total_tokens: The same of the whole run.
      flops_per_step: Model FLOPs of a training step.
      memory: Estimated bytes per device by purpose ("parameters", "optimizer state", "activations").
      devices: Number and kind of the devices.
      mesh: Size of each mesh axis.
      versions: Versions of Python and of the packages that affect numeric results.
    """

    name: str
    model: str
    attention: str
    run_dir: str
    resume: str
    parts: Mapping[str, Part]
    total_steps: int
    tokens_per_step: int
    total_tokens: float
    flops_per_step: float
    memory: Mapping[str, int]
    devices: str
    mesh: Mapping[str, int]
    versions: Mapping[str, str]


def print_summary(summary: StartSummary, console: Console) -> None:
    """Print two tables: the run, and its parameters by part."""
    console.print(_run_table(summary))
    console.print(_parameter_table(summary.parts))


def _run_table(summary: StartSummary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title_justify="left", pad_edge=False)
    table.title = Text(visible(summary.name), style="bold")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    axes = " x ".join(f"{size} {axis}" for axis, size in summary.mesh.items() if size > 1)
    memory = ", ".join(f"{purpose} {formatting.size(size)}" for purpose, size in summary.memory.items())
    total_tokens = formatting.count(summary.total_tokens)
    rows = {
        "run directory": f"{summary.run_dir} ({summary.resume})",
        "model": summary.model,
        "attention": summary.attention,
        "tokens": f"{formatting.count(summary.tokens_per_step)} per step, "
        f"{total_tokens} in {summary.total_steps:,} steps",
        "compute": f"{formatting.flops(summary.flops_per_step)} per step",
        "memory": f"{memory}; in all {formatting.size(sum(summary.memory.values()))} per device (estimate)",
        "devices": f"{summary.devices}; mesh {axes or 'of one device'}",
        "versions": ", ".join(f"{package} {version}" for package, version in summary.versions.items()),
    }
    for name, value in rows.items():
        table.add_row(name, Text(visible(value)))
    return table


def _parameter_table(parts: Mapping[str, Part]) -> Table:
    total = Part(sum(part.parameters for part in parts.values()), sum(part.bytes for part in parts.values()))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("parameters", Text("total"))
    table.add_column("count", Text(f"{total.parameters:,}"), justify="right")
    table.add_column("", Text(formatting.count(total.parameters)), justify="right")
    table.add_column("bytes", Text(formatting.size(total.bytes)), justify="right")
    for name, part in parts.items():
        count = f"{part.parameters:,}"
        table.add_row(Text(visible(name)), count, formatting.count(part.parameters), formatting.size(part.bytes))
    return table
