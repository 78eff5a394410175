"""What is said of a run before its first step: sizes, costs, devices, and the first batch as text."""

from __future__ import annotations

import math
import platform
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from t5x_like.bases import Base
from t5x_like.config import RunConfig
from t5x_like.data.batches import Source
from t5x_like.models.parameters import count_parameters
from t5x_like.monitoring.summary import Part, StartSummary, print_summary
from t5x_like.monitoring.throughput import Peak, measured_peak
from t5x_like.planning.flops import training_flops
from t5x_like.planning.memory import estimate
from t5x_like.planning.saved import PLAN, differences, read_plan
from t5x_like.planning.tokens import tokens_per_step
from t5x_like.planning.topologies import accelerator_of
from t5x_like.program import Program

_ROWS_SHOWN, _TOKENS_SHOWN = 2, 60
_PACKAGES = ("t5x-like", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Of Python and the packages that decide the numbers, as far as they are installed by name."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak(program: Program) -> Peak:
    """What the program's devices could do: from the table of accelerators, or measured for kinds that are not there."""
    devices = program.mesh.devices.flatten()
    known = accelerator_of(devices[0].device_kind)
    if known is not None:
        rate = known.flops_per_second / known.devices_per_chip * devices.size
        return Peak(rate, f"{devices.size} x {devices[0].device_kind}, dense bfloat16 by data sheet")
    # CPU devices share the machine's cores, whatever their number.
    copies = 1 if devices[0].platform == "cpu" else devices.size
    return measured_peak(copies * _matrix_product_rate())


def _matrix_product_rate(size: int = 1024, repeats: int = 8) -> float:
    """FLOP/s of a float32 matrix product on the default device: the best of a few, since others may use the machine."""
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
    source: Source,
    workdir: Path,
    step: int,
    first_row: int,
    console: Console,
    base: Base | None = None,
) -> None:
    """Prints the tables at the start of a run, and the first rows that it will train on as text."""
    run = program.run
    total = run.training.num_train_steps
    devices = program.mesh.devices.flatten()
    counts = count_parameters(run.model)
    summary = StartSummary(
        name=run.name,
        model=_model(run),
        run_dir=str(workdir),
        resume=f"resumes from step {step} of {total}" if step else f"new run of {total} steps",
        parts={name: Part(count, 4 * count) for name, count in counts.items() if count},
        total_steps=total,
        tokens_per_step=tokens_per_step(run),
        flops_per_step=training_flops(run),
        memory=estimate(program).parts,
        devices=f"{devices.size} x {devices[0].device_kind}",
        mesh=dict(program.mesh.shape),
        versions=versions(),
    )
    print_summary(summary, console)
    if program.mesh_reason is not None:
        console.print(f"mesh chosen: {program.mesh_reason}", highlight=False, markup=False)
    if base is not None and program.adaptation is not None:
        adapters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.abstract_params))
        console.print(
            f"adapters of rank {program.adaptation.rank} on {len(program.adaptation.kernels)} kernels: {adapters:,} "
            f"parameters are trained, those above are frozen. Base: {base.record['path']}, step {base.record['step']}, "
            f"fingerprint {base.record['fingerprint']}",
            markup=False,
        )
        for line in base.differences:
            console.print(f"the model is not the base's: {line}", markup=False)
    _compare_with_plan(program, workdir / PLAN, console)
    last_row = first_row + (total - step) * run.training.batch_size
    if epochs := source.epochs(last_row):
        passes = ", ".join(f"{count:.2f} of {name}" for name, count in epochs.items())
        console.print(f"passes over the data by step {total}: {passes}")
    console.print(*source.describe(first_row, _ROWS_SHOWN, _TOKENS_SHOWN))


def _compare_with_plan(program: Program, path: Path, console: Console) -> None:
    """Says where what the run finds is not as it was planned, if it was."""
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
    return f"{run.model.architecture} ({'; '.join(stacks)}), vocabulary {run.model.vocab_size}, {run.data.layout}"
