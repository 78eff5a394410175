"""SkyPilot: a task, whose processes find each other by the SKYPILOT variables that the start-up reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from t5x_like.config import ConfigError, Problem
from t5x_like.launching.clouds import accelerator_type, chips_per_host, cloud_names, expectations
from t5x_like.launching.job import Job
from t5x_like.launching.manifests import to_yaml
from t5x_like.launching.rendering import Rendering, Step
from t5x_like.launching.shell import command_line
from t5x_like.planning.topologies import Topology

TASK = "task.yaml"
_PYTHON = ".venv/bin/python"


@dataclasses.dataclass(frozen=True)
class SkyPilot:
    """Attributes:
    topology: `h100:16`, two nodes of eight; or one TPU slice.
    spot: Preemptible machines, which managed jobs replace.
    infra: Where, as `gcp/us-central1`; None leaves it to SkyPilot.
    bucket: URL of a bucket that all nodes see at `mount`.
    source: The folder that is copied to the nodes.
    """

    job: Job
    topology: Topology
    spot: bool = False
    infra: str | None = None
    bucket: str | None = None
    mount: str = "/mnt/runs"
    source: str = "."
    directory: Path = Path("launch")


def render(spec: SkyPilot) -> Rendering:
    """The task and the commands around it.

    Raises:
      ConfigError: several TPU slices, which SkyPilot does not join, or a CPU topology.
    """
    name = spec.job.resource
    given = [word for secret in spec.job.secrets for word in ("--secret", secret)]
    return Rendering(
        directory=spec.directory,
        files={TASK: to_yaml(task(spec))},
        steps=(
            Step(
                "a managed job, which is recovered after preemption",
                ("sky", "jobs", "launch", "--yes", "--detach-run", "--name", name, *given, str(spec.directory / TASK)),
            ),
            Step("where it stands", ("sky", "jobs", "queue"), "follow"),
            Step("its output", ("sky", "jobs", "logs", "--name", name), "follow"),
            Step("end it", ("sky", "jobs", "cancel", "--yes", "--name", name), "stop"),
        ),
        notes=tuple(f"{secret}, a secret, is taken from the shell that calls sky" for secret in spec.job.secrets),
    )


def task(spec: SkyPilot) -> dict[str, Any]:
    """The task as SkyPilot's YAML has it."""
    job = spec.job
    document: dict[str, Any] = {
        "name": job.resource,
        "resources": _resources(spec),
        "num_nodes": 1 if spec.topology.accelerator.platform == "tpu" else spec.topology.num_hosts,
        "workdir": spec.source,
    }
    if spec.bucket is not None:
        document["file_mounts"] = {spec.mount: {"source": spec.bucket, "mode": "MOUNT"}}
    if job.env:
        document["envs"] = dict(job.env)
    if job.secrets:
        # Without values: SkyPilot takes them from the command line and shows them nowhere.
        document["secrets"] = dict.fromkeys(job.secrets)
    document["setup"] = _setup(spec.topology)
    document["run"] = _run(spec)
    return document


def _resources(spec: SkyPilot) -> dict[str, Any]:
    topology = spec.topology
    resources: dict[str, Any] = {} if spec.infra is None else {"infra": spec.infra}
    if topology.accelerator.platform == "tpu":
        if topology.num_slices > 1:
            fix = "the targets tpu-vm and gke start several"
            raise ConfigError([Problem("--num-slices", str(topology.num_slices), "1 with skypilot", fix)])
        resources["accelerators"] = f"tpu-{accelerator_type(topology)}"
        version = cloud_names(topology).runtime_version
        if version is not None:
            resources["accelerator_args"] = {"runtime_version": version}
    elif topology.accelerator.platform == "gpu":
        resources["accelerators"] = f"{cloud_names(topology).skypilot}:{chips_per_host(topology)}"
    else:
        raise ConfigError([Problem("--topology", str(topology), "TPUs or GPUs", "the target local simulates devices")])
    if spec.spot:
        resources["use_spot"] = True
    # Exits that can be resumed are recovered however often they come; any other ends the job.
    resources["job_recovery"] = {
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": list(spec.job.restart_codes),
    }
    return resources


def _setup(topology: Topology) -> str:
    extra = "[tpu]" if topology.accelerator.platform == "tpu" else "[cuda]"
    install = ("uv", "pip", "install", "--python", _PYTHON, "--constraint", "constraints.txt", f".{extra}")
    return "\n".join(
        [
            "set -euo pipefail",
            command_line(("python3", "-m", "pip", "install", "--quiet", "--user", "uv")),
            'export PATH="$HOME/.local/bin:$PATH"',
            command_line(("uv", "venv", "--quiet", "--clear", "--python", "3.12", ".venv")),
            command_line(install),
            "",
        ]
    )


def _run(spec: SkyPilot) -> str:
    # On TPU VMs the numbers of the processes are those of the slice, which jax asks the machine for.
    launcher = "gcetpu" if spec.topology.accelerator.platform == "tpu" else "skypilot"
    command = spec.job.train(_PYTHON, "--launcher", launcher, *expectations(spec.topology))
    return f"set -euo pipefail\nexec {command_line(command)}\n"
