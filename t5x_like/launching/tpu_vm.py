"""Target tpu-vm: gcloud creates slices, copies the source to all workers and starts a process on each."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.hardware.topologies import Topology
from t5x_like.launching.accelerator_names import accelerator_type, cloud_names, expectations
from t5x_like.launching.job import SHARED_MOUNT, Job
from t5x_like.launching.rendering import Recovery, Rendering, Step, bucket_notes
from t5x_like.launching.text import command_line, exports, script

SETUP = "setup.sh"
RUN = "run.sh"
SOURCE = "source.tar.gz"
_PYTHON = "../venv/bin/python"
_SUSPENDED = ("FAILED", "SUSPENDED", "SUSPENDING")
"""States of a queued resource without slices."""


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """Options of the target.

    Attributes:
      job: The job.
      topology: One slice, or several of one shape, which are created as a queued resource.
      zone: Google Cloud zone.
      project: Google Cloud project; None for gcloud's default.
      runtime_version: Software version of the VMs; None for the default of the accelerator.
      queued: Whether to wait in the queue for capacity; always true for several slices.
      spot: Whether to use preemptible capacity.
      reserved: Whether to use capacity of a reservation. Without spot and reserved, capacity is on demand.
      valid_until: Time for which a queued request waits, such as `6h`; None without a limit.
      nfs: `HOST:/EXPORT` that all workers mount at /mnt/runs.
      source: Directory that is copied to the workers and installed.
      flags: Further flags of the command that creates the VMs, such as `--network=default`.
      directory: Directory of the rendered files.
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
    """Render the scripts for the workers and the gcloud commands.

    Raises:
      ConfigError: There are no TPU VMs of this kind or shape.
    """
    return Rendering(
        directory=spec.directory,
        files={SETUP: setup_script(spec), RUN: run_script(spec)},
        steps=(*_create(spec), *_start(spec), *_follow_and_stop(spec)),
        notes=_notes(spec),
        recovery=_recovery(spec) if spec.spot else None,
    )


def setup_script(spec: TpuVm) -> str:
    """Return the script that installs the source, run once on each worker in the job's directory."""
    uv = ("python3", "-m", "uv")
    install = (*uv, "pip", "install", "--quiet", "--python", "venv/bin/python")
    return script(
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        "mkdir -p source",
        command_line(("tar", "--extract", "--gzip", f"--file={SOURCE}", "--directory=source")),
        *_mount(spec),
        "# Transparent huge pages, which jax recommends on v5e and later.",
        "echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null",
        "python3 -m pip install --quiet --user uv",
        command_line((*uv, "venv", "--quiet", "--clear", "--python", "3.12", "venv")),
        command_line((*install, "--constraint", "source/constraints.txt", "./source[tpu]")),
    )


def run_script(spec: TpuVm) -> str:
    """Return the script of a worker's process, which is restarted after resumable exits."""
    job = spec.job
    restart_loop = (_PYTHON, "-P", "-m", "t5x_like.launching.restart_loop", "--pid-file", "../pid")
    limits = ("--max-restarts", str(job.max_restarts), "--restart-on", *map(str, job.restart_codes))
    train = job.train(_PYTHON, "--launcher", "gcetpu", *expectations(spec.topology))
    return script(
        "set -euo pipefail",
        'cd "$(dirname "$0")/source"',
        *exports(job.env),
        *(line for name in job.secrets for line in _secret(name)),
        # The supervisor of spot slices reads the exit code.
        "rm -f ../code",
        "code=0",
        f"{command_line((*restart_loop, *limits, '--', *train))} || code=$?",
        'echo "$code" >../code',
        'exit "$code"',
    )


def _secret(name: str) -> list[str]:
    """Return lines that read a secret from Secret Manager with the worker's service account."""
    read = ("gcloud", "secrets", "versions", "access", "latest", f"--secret={name}")
    return [f'{name}="$({shlex.join(read)})"', f"export {name}"]


def _mount(spec: TpuVm) -> list[str]:
    if spec.nfs is None:
        return []
    mount = command_line(("sudo", "mount", "-t", "nfs", spec.nfs, SHARED_MOUNT))
    return [
        "sudo apt-get install -y -qq nfs-common",
        f"sudo mkdir -p {SHARED_MOUNT}",
        f"mountpoint -q {SHARED_MOUNT} || {mount}",
        f"sudo chmod 1777 {SHARED_MOUNT}",
    ]


def _location(spec: TpuVm) -> list[str]:
    return [f"--zone={spec.zone}", *([f"--project={spec.project}"] if spec.project else [])]


def _create(spec: TpuVm) -> list[Step]:
    name, location = spec.job.resource, _location(spec)
    version = spec.runtime_version or cloud_names(spec.topology).runtime_version
    if version is None:
        found, fix = spec.topology.accelerator.name, "use the target gke"
        raise ConfigError([ConfigProblem("--topology", found, "an accelerator that is available as TPU VMs", fix)])
    kind = f"--accelerator-type={accelerator_type(spec.topology)}"
    capacity = [f"--{name}" for name in ("spot", "reserved") if getattr(spec, name)]
    if not spec.is_queued:
        create = _gcloud("tpu-vm", "create", name, *location, kind, f"--version={version}", *capacity, *spec.flags)
        return [Step("create the slice", create)]
    slices = spec.topology.num_slices
    # The service connects the nodes of one request with each other, which makes them a multislice.
    nodes = [f"--node-id={name}"] if slices == 1 else [f"--node-count={slices}", f"--node-prefix={name}"]
    valid = [f"--valid-until-duration={spec.valid_until}"] if spec.valid_until else []
    create = _gcloud(
        "queued-resources", "create", name, *location, *nodes, kind, f"--runtime-version={version}", *capacity, *valid,
        *spec.flags,
    )  # fmt: skip
    return [
        Step("request the slices", create),
        Step("wait for the slices", _state(spec), until="ACTIVE", never=(*_SUSPENDED, "DELETING")),
    ]


def _state(spec: TpuVm) -> tuple[str, ...]:
    resource, field = ("queued-resources", "state.state") if spec.is_queued else ("tpu-vm", "state")
    return _gcloud(resource, "describe", spec.job.resource, *_location(spec), f"--format=value({field})")


def _recovery(spec: TpuVm) -> Recovery:
    """Return the recovery of a spot slice: after a preemption its name is used until it is deleted."""
    name = spec.job.resource
    first = ["--node=0", "--worker=0"] if spec.topology.num_slices > 1 else ["--worker=0"]
    resource = "queued-resources" if spec.topology.num_slices > 1 else "tpu-vm"
    read = f"--command={shlex.join(('cat', f'{name}/code'))}"
    return Recovery(
        state=_state(spec),
        lost=_SUSPENDED if spec.is_queued else ("PREEMPTED", "TERMINATED"),
        result=_gcloud(resource, "ssh", name, *first, *_location(spec), read),
        remove=_delete(spec),
    )


def _delete(spec: TpuVm) -> tuple[str, ...]:
    resource, forced = ("queued-resources", ["--force"]) if spec.is_queued else ("tpu-vm", [])
    return _gcloud(resource, "delete", spec.job.resource, *_location(spec), *forced, "--quiet")


def _start(spec: TpuVm) -> list[Step]:
    name = spec.job.resource
    files = [str(spec.directory / file) for file in (SETUP, RUN, SOURCE)]
    # Exclude hidden directories (environments, version control, caches) and the outputs of runs and builds.
    excluded = [f"--exclude={pattern}" for pattern in ("./.[!.]*", "./runs", "./build", "./dist", "__pycache__")]
    pack = ("tar", "--create", "--gzip", f"--file={spec.directory / SOURCE}", *excluded, f"--directory={spec.source}")
    return [
        Step("pack the source", (*pack, ".")),
        Step("create a directory on all workers", _ssh(spec, ("mkdir", "-p", name))),
        Step("copy to all workers", _scp(spec, files, f"{name}/")),
        Step("install on all workers", _ssh(spec, ("bash", f"{name}/{SETUP}"))),
        Step("start on all workers", _ssh(spec, ("bash", "-c", _detached(name)))),
    ]


def _detached(name: str) -> str:
    return f"setsid --fork bash {name}/{RUN} >>{name}/log.txt 2>&1 </dev/null"


def _follow_and_stop(spec: TpuVm) -> list[Step]:
    name = spec.job.resource
    log, pid = f"{name}/log.txt", f"{name}/pid"
    return [
        Step("show the logs of all workers", _ssh(spec, ("tail", "--lines=+1", "--follow=name", log)), "follow"),
        Step("save and stop without a restart", _ssh(spec, ("pkill", "--signal", "TERM", "--pidfile", pid)), "stop"),
        Step("delete the VMs", _delete(spec), "stop"),
    ]


def _gcloud(*words: str) -> tuple[str, ...]:
    return ("gcloud", "compute", "tpus", *words)


def _ssh(spec: TpuVm, command: Sequence[str]) -> tuple[str, ...]:
    return _gcloud(*_on_all(spec, "ssh", [spec.job.resource]), f"--command={shlex.join(command)}")


def _scp(spec: TpuVm, files: Sequence[str], to: str) -> tuple[str, ...]:
    return _gcloud(*_on_all(spec, "scp", [*files, f"{spec.job.resource}:{to}"]))


def _on_all(spec: TpuVm, verb: str, operands: Sequence[str]) -> list[str]:
    if spec.topology.num_slices > 1:
        return ["queued-resources", verb, *operands, "--node=all", "--worker=all", *_location(spec)]
    return ["tpu-vm", verb, *operands, "--worker=all", *_location(spec)]


def _notes(spec: TpuVm) -> tuple[str, ...]:
    secrets = [f"{name} is read from Secret Manager on each worker" for name in spec.job.secrets]
    return (*bucket_notes(spec.job, "the VMs' service account"), *secrets)
