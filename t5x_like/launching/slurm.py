"""Target slurm: a batch script that starts one process per GPU and requeues itself after resumable exits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.launching.job import Job
from t5x_like.launching.rendering import Rendering, Step
from t5x_like.launching.text import command_line, exports, script

SCRIPT = "train.sbatch"

# sbatch has its own rules for splitting directive lines; values that would need quoting are refused.
_DIRECTIVE = re.compile(r"[A-Za-z0-9_@:.,+&|*()\[\]/%=-]+")


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Options of the target.

    Attributes:
      job: The job.
      nodes: Number of nodes.
      gpus_per_node: GPUs per node, with one process each; 0 for a CPU job.
      tasks_per_node: Processes per node without GPUs.
      cpus_per_task: Cores per process; None for the cluster's default.
      time: Time limit in SLURM's format, `1-00:00:00`; None for the cluster's default.
      signal_seconds: Seconds before the limit at which SIGTERM makes the processes save and exit; None for the grace
        period.
      directives: Further `#SBATCH` options, such as `("partition", "gpu")`.
      python: Python interpreter on the nodes.
      prologue: Shell lines of the user, such as `module load cuda`, copied unchanged.
      container_image: Container image of the processes, on clusters with the pyxis plugin.
      container_mounts: Mounts for pyxis, `/data:/data`.
      directory: Directory of the rendered files.
    """

    job: Job
    nodes: int = 1
    gpus_per_node: int = 8
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    time: str | None = None
    signal_seconds: int | None = None
    directives: tuple[tuple[str, str], ...] = ()
    python: str = "python"
    prologue: str = ""
    container_image: str | None = None
    container_mounts: str | None = None
    directory: Path = Path("launch")

    @property
    def processes_per_node(self) -> int:
        return self.gpus_per_node or self.tasks_per_node

    @property
    def num_processes(self) -> int:
        return self.nodes * self.processes_per_node


def render(spec: Slurm) -> Rendering:
    """Render the batch script and its commands.

    Raises:
      ConfigError: sbatch would split a directive into several words.
    """
    path, name = str(spec.directory / SCRIPT), spec.job.resource
    return Rendering(
        directory=spec.directory,
        files={SCRIPT: batch_script(spec)},
        steps=(
            Step("submit the job", ("sbatch", path)),
            Step("show the status", ("squeue", "--me", f"--name={name}"), "follow"),
            Step("save and stop; the job is requeued", ("scancel", "--signal=TERM", f"--name={name}", "--me"), "stop"),
            Step("cancel the job", ("scancel", f"--name={name}", "--me"), "stop"),
        ),
        notes=(
            "the working directory, the recipe and the run directory must be on a file system that all nodes share",
            *(f"the secret {name} is read from the environment of the sbatch command" for name in spec.job.secrets),
        ),
    )


def batch_script(spec: Slurm) -> str:
    """Return the text of the batch script."""
    job = spec.job
    return script(
        *(f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in _directives(spec)),
        "",
        "set -euo pipefail",
        *exports(job.env),
        *(f': "${{{name}:?is a secret of this job: set it in the environment of sbatch}}"' for name in job.secrets),
        *([spec.prologue.rstrip("\n")] if spec.prologue else []),
        "",
        "# SIGTERM makes the processes save and exit; this script ignores it and waits for them.",
        "trap : TERM",
        "code=0",
        f"{command_line(_srun(spec))} || code=$?",
        "",
        *_requeue(job),
        'exit "$code"',
    )


def _directives(spec: Slurm) -> Iterator[tuple[str, str]]:
    signal = spec.job.grace_seconds if spec.signal_seconds is None else spec.signal_seconds
    lines: dict[str, str | int | None] = {
        "job-name": spec.job.resource,
        "nodes": spec.nodes,
        "ntasks-per-node": spec.processes_per_node,
        "gpus-per-node": spec.gpus_per_node or None,
        "cpus-per-task": spec.cpus_per_task,
        "time": spec.time,
        # Sent to the processes, not to this script, before the time limit; SLURM also sends SIGTERM before a
        # preemption.
        "signal": f"TERM@{signal}",
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.log",
        "export": "ALL",
        **dict(spec.directives),
    }
    problems = []
    for key, value in lines.items():
        if value is None:
            continue
        if not _DIRECTIVE.fullmatch(key) or (value != "" and not _DIRECTIVE.fullmatch(str(value))):
            problems.append(ConfigProblem(f"--sbatch {key}", repr(value), "a word without spaces and quotes"))
        yield key, str(value)
    if problems:
        raise ConfigError(problems)


def _srun(spec: Slurm) -> tuple[str, ...]:
    """Return the srun command with one task per process.

    JAX gives each process the device with its local index, so each must see all devices of its node.
    """
    # When one process ends, the others exit by themselves with their own messages; --wait kills those that hang.
    options = ["--kill-on-bad-exit=0", f"--wait={spec.job.grace_seconds}", "--label"]
    if spec.gpus_per_node:
        options.append("--gpu-bind=none")
    if spec.cpus_per_task is not None:
        # srun does not inherit this option from the job.
        options.append(f"--cpus-per-task={spec.cpus_per_task}")
    if spec.container_image is not None:
        options.append(f"--container-image={spec.container_image}")
    if spec.container_mounts is not None:
        options.append(f"--container-mounts={spec.container_mounts}")
    expect = ["--launcher", "slurm", "--expect-processes", str(spec.num_processes)]
    if spec.gpus_per_node:
        expect += ["--expect-devices", str(spec.num_processes)]
    return ("srun", *options, *spec.job.train(spec.python, *expect))


def _requeue(job: Job) -> list[str]:
    codes = "|".join(map(str, job.restart_codes))
    return [
        "# Exit codes after which the same command resumes.",
        f'case "$code" in {codes})',
        f'  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_restarts} ]; then',
        '    echo "exit code $code: the job is requeued" >&2',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "  fi ;;",
        "esac",
    ]
