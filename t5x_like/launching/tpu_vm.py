"""TPU VMs: gcloud makes a slice, or several, copies the source to all workers and starts a process on each."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from t5x_like.config import ConfigError, Problem
from t5x_like.launching.clouds import accelerator_type, cloud_names, expectations
from t5x_like.launching.job import Job
from t5x_like.launching.rendering import Rendering, Step
from t5x_like.launching.shell import command_line, exports, script
from t5x_like.planning.topologies import Topology

SETUP = "setup.sh"
RUN = "run.sh"
SOURCE = "source.tar.gz"
_PYTHON = "../venv/bin/python"
MOUNT = "/mnt/runs"


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """Attributes:
    topology: One slice, or several of one shape, which come as a queued resource.
    runtime_version: Software of the VMs; None for the usual one of the kind.
    queued: Wait in the queue for capacity, also for one slice.
    spot, reserved: Which capacity; neither is on demand.
    valid_until: For how long a queued request waits, `6h`; None for good.
    nfs: `HOST:/EXPORT` that all workers mount at /mnt/runs.
    source: The folder that is copied to the workers and installed.
    flags: Further flags of the command that creates the VMs, `--network=default`.
    """

    job: Job
    topology: Topology
    zone: str
    project: str | None = None
    runtime_version: str | None = None
    queued: bool = False
    spot: bool = False
    reserved: bool = False
    valid_until: str | None = None
    nfs: str | None = None
    source: str = "."
    flags: tuple[str, ...] = ()
    directory: Path = Path("launch")

    @property
    def is_queued(self) -> bool:
        return self.queued or self.topology.num_slices > 1 or self.valid_until is not None


def render(spec: TpuVm) -> Rendering:
    """The scripts for the workers and the gcloud commands.

    Raises:
      ConfigError: a kind or shape that TPU VMs do not have.
    """
    return Rendering(
        directory=spec.directory,
        files={SETUP: setup_script(spec), RUN: run_script(spec)},
        steps=(*_create(spec), *_start(spec), *_later(spec)),
        notes=_notes(spec),
    )


def setup_script(spec: TpuVm) -> str:
    """Runs once on each worker, in the home directory's folder of the job."""
    uv = ("python3", "-m", "uv")
    install = (*uv, "pip", "install", "--quiet", "--python", "venv/bin/python")
    return script(
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        "mkdir -p source",
        command_line(("tar", "--extract", "--gzip", f"--file={SOURCE}", "--directory=source")),
        *_mount(spec),
        "# Large pages, which jax asks for on v5e and later.",
        "echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null",
        "python3 -m pip install --quiet --user uv",
        command_line((*uv, "venv", "--quiet", "--clear", "--python", "3.12", "venv")),
        command_line((*install, "--constraint", "source/constraints.txt", "./source[tpu]")),
    )


def run_script(spec: TpuVm) -> str:
    """The process of a worker, which is started again after exits that can be resumed."""
    job = spec.job
    supervise = (_PYTHON, "-m", "t5x_like.launching.supervise", "--pid-file", "../pid")
    limits = ("--max-restarts", str(job.max_restarts), "--restart-on", *map(str, job.restart_codes))
    train = job.train(_PYTHON, "--launcher", "gcetpu", *expectations(spec.topology))
    return script(
        "set -euo pipefail",
        'cd "$(dirname "$0")/source"',
        *exports(job.env),
        *(line for name in job.secrets for line in _secret(name)),
        f"exec {command_line((*supervise, *limits, '--', *train))}",
    )


def _secret(name: str) -> list[str]:
    """From Secret Manager, where the worker's service account may read it."""
    read = ("gcloud", "secrets", "versions", "access", "latest", f"--secret={name}")
    return [f'{name}="$({shlex.join(read)})"', f"export {name}"]


def _mount(spec: TpuVm) -> list[str]:
    if spec.nfs is None:
        return []
    mount = command_line(("sudo", "mount", "-t", "nfs", spec.nfs, MOUNT))
    return [
        "sudo apt-get install -y -qq nfs-common",
        f"sudo mkdir -p {MOUNT}",
        f"mountpoint -q {MOUNT} || {mount}",
        f"sudo chmod 1777 {MOUNT}",
    ]


def _where(spec: TpuVm) -> list[str]:
    return [f"--zone={spec.zone}", *([f"--project={spec.project}"] if spec.project else [])]


def _create(spec: TpuVm) -> list[Step]:
    name, where = spec.job.resource, _where(spec)
    version = spec.runtime_version or cloud_names(spec.topology).runtime_version
    if version is None:
        found, fix = spec.topology.accelerator.name, "the target gke has it"
        raise ConfigError([Problem("--topology", found, "a kind of which there are TPU VMs", fix)])
    kind = f"--accelerator-type={accelerator_type(spec.topology)}"
    capacity = [f"--{name}" for name in ("spot", "reserved") if getattr(spec, name)]
    if not spec.is_queued:
        create = _gcloud("tpu-vm", "create", name, *where, kind, f"--version={version}", *capacity, *spec.flags)
        return [Step("create the slice", create)]
    slices = spec.topology.num_slices
    # The service tells several nodes of one request of each other: that makes them a multislice.
    nodes = [f"--node-id={name}"] if slices == 1 else [f"--node-count={slices}", f"--node-prefix={name}"]
    valid = [f"--valid-until-duration={spec.valid_until}"] if spec.valid_until else []
    create = _gcloud(
        "queued-resources", "create", name, *where, *nodes, kind, f"--runtime-version={version}", *capacity, *valid,
        *spec.flags,
    )  # fmt: skip
    state = _gcloud("queued-resources", "describe", name, *where, "--format=value(state.state)")
    return [
        Step("ask for the slices", create),
        Step("wait for them", state, until="ACTIVE", never=("FAILED", "SUSPENDED", "SUSPENDING", "DELETING")),
    ]


def _start(spec: TpuVm) -> list[Step]:
    name = spec.job.resource
    files = [str(spec.directory / file) for file in (SETUP, RUN, SOURCE)]
    # Environments, histories and caches are hidden; what runs and builds leave is not wanted there either.
    left_out = [f"--exclude={pattern}" for pattern in ("./.[!.]*", "./runs", "./build", "./dist", "__pycache__")]
    pack = ("tar", "--create", "--gzip", f"--file={spec.directory / SOURCE}", *left_out, f"--directory={spec.source}")
    return [
        Step("pack the source", (*pack, ".")),
        Step("a folder on all workers", _ssh(spec, ("mkdir", "-p", name))),
        Step("copy to all workers", _scp(spec, files, f"{name}/")),
        Step("install there", _ssh(spec, ("bash", f"{name}/{SETUP}"))),
        Step("start on all workers", _ssh(spec, ("bash", "-c", _detached(name)))),
    ]


def _detached(name: str) -> str:
    return f"setsid --fork bash {name}/{RUN} >>{name}/log.txt 2>&1 </dev/null"


def _later(spec: TpuVm) -> list[Step]:
    name, where = spec.job.resource, _where(spec)
    log, pid = f"{name}/log.txt", f"{name}/pid"
    resource, forced = ("queued-resources", ["--force"]) if spec.is_queued else ("tpu-vm", [])
    return [
        Step("the logs of all workers", _ssh(spec, ("tail", "--lines=+1", "--follow=name", log)), "follow"),
        Step("save and leave, for good", _ssh(spec, ("pkill", "--signal", "TERM", "--pidfile", pid)), "stop"),
        Step("give the machines back", _gcloud(resource, "delete", name, *where, *forced, "--quiet"), "stop"),
    ]


def _gcloud(*words: str) -> tuple[str, ...]:
    return ("gcloud", "compute", "tpus", *words)


def _ssh(spec: TpuVm, command: Sequence[str]) -> tuple[str, ...]:
    return _gcloud(*_on_all(spec, "ssh", [spec.job.resource]), f"--command={shlex.join(command)}")


def _scp(spec: TpuVm, files: Sequence[str], to: str) -> tuple[str, ...]:
    return _gcloud(*_on_all(spec, "scp", [*files, f"{spec.job.resource}:{to}"]))


def _on_all(spec: TpuVm, verb: str, operands: Sequence[str]) -> list[str]:
    if spec.topology.num_slices > 1:
        return ["queued-resources", verb, *operands, "--node=all", "--worker=all", *_where(spec)]
    return ["tpu-vm", verb, *operands, "--worker=all", *_where(spec)]


def _notes(spec: TpuVm) -> tuple[str, ...]:
    notes = [f"{name} is read from Secret Manager on each worker" for name in spec.job.secrets]
    if spec.topology.num_hosts > 1 and not os.path.isabs(spec.job.workdir):
        hosts = spec.topology.num_hosts
        notes.append(f"{hosts} hosts write the run's directory together: --nfs HOST:/EXPORT mounts one at {MOUNT}")
    return tuple(notes)
