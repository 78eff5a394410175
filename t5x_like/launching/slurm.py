"""SLURM: a batch script that starts one process per GPU, and asks for itself again after exits that can be resumed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from t5x_like.config import ConfigError, Problem
from t5x_like.launching.job import Job
from t5x_like.launching.rendering import Rendering, Step
from t5x_like.launching.shell import command_line, exports, script

SCRIPT = "train.sbatch"

# sbatch splits the lines of directives by rules of its own: what stands there has no need of them.
_DIRECTIVE = re.compile(r"[A-Za-z0-9_@:.,+&|*()\[\]/%=-]+")


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Attributes:
    nodes: Nodes of the job.
    gpus_per_node: One process is started for each; with 0 the job is one of CPUs.
    tasks_per_node: Processes of a node without GPUs.
    cpus_per_task: Cores of a process; None leaves it to the cluster.
    time: Limit as SLURM writes it, `1-00:00:00`; None leaves it to the cluster.
    signal_seconds: Before the limit, SIGTERM goes to the processes, which save and leave; None for the grace period.
    directives: Further `#SBATCH` options, such as `("partition", "gpu")`.
    python: The interpreter on the nodes.
    prologue: Shell lines of the user's own, such as `module load cuda`, as they are.
    container_image: For clusters with the pyxis plugin: processes run in it.
    container_mounts: For pyxis, `/data:/data`.
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
    """The batch script and the commands around it.

    Raises:
      ConfigError: a directive that sbatch would take for several words.
    """
    path, name = str(spec.directory / SCRIPT), spec.job.resource
    return Rendering(
        directory=spec.directory,
        files={SCRIPT: batch_script(spec)},
        steps=(
            Step("hand it to the scheduler", ("sbatch", path)),
            Step("where it stands", ("squeue", "--me", f"--name={name}"), "follow"),
            Step("save and leave; it is started again", ("scancel", "--signal=TERM", f"--name={name}", "--me"), "stop"),
            Step("end it for good", ("scancel", f"--name={name}", "--me"), "stop"),
        ),
        notes=(
            "the working directory, the recipe and the run's directory must be the same files on all nodes",
            *(f"sbatch hands on {name}, a secret, from the shell that calls it" for name in spec.job.secrets),
        ),
    )


def batch_script(spec: Slurm) -> str:
    """The file for sbatch."""
    job = spec.job
    return script(
        *(f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in _directives(spec)),
        "",
        "set -euo pipefail",
        *exports(job.env),
        *(f': "${{{name}:?is a secret of this job: set it where you call sbatch}}"' for name in job.secrets),
        *([spec.prologue.rstrip("\n")] if spec.prologue else []),
        "",
        "# SIGTERM is for the processes, which save; this script waits for them.",
        "trap : TERM",
        "code=0",
        f"{command_line(_srun(spec))} || code=$?",
        "",
        *_again(job),
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
        # To the processes, not to this script: before the limit, and SLURM itself before it preempts.
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
            problems.append(Problem(f"--sbatch {key}", repr(value), "a word without spaces and quotes"))
        yield key, str(value)
    if problems:
        raise ConfigError(problems)


def _srun(spec: Slurm) -> tuple[str, ...]:
    """One task per process. JAX gives each the device of its local number, so each must see all of its node."""
    # When one has ended, the others end by themselves with what they know of it; who hangs is ended after this time.
    options = ["--kill-on-bad-exit=0", f"--wait={spec.job.grace_seconds}", "--label"]
    if spec.gpus_per_node:
        options.append("--gpu-bind=none")
    if spec.cpus_per_task is not None:
        # srun does not take this from the job.
        options.append(f"--cpus-per-task={spec.cpus_per_task}")
    if spec.container_image is not None:
        options.append(f"--container-image={spec.container_image}")
    if spec.container_mounts is not None:
        options.append(f"--container-mounts={spec.container_mounts}")
    expect = ["--launcher", "slurm", "--expect-processes", str(spec.num_processes)]
    if spec.gpus_per_node:
        expect += ["--expect-devices", str(spec.num_processes)]
    return ("srun", *options, *spec.job.train(spec.python, *expect))


def _again(job: Job) -> list[str]:
    codes = "|".join(map(str, job.restart_codes))
    return [
        "# The exit codes after which the same command goes on.",
        f'case "$code" in {codes})',
        f'  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_restarts} ]; then',
        '    echo "exit code $code: the job is asked for again" >&2',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "  fi ;;",
        "esac",
    ]
