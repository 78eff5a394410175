"""Target skypilot: a task whose processes are detected by SkyPilot's environment variables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.hardware.topologies import Topology
from t5x_like.launching.accelerator_names import accelerator_type, chips_per_host, cloud_names, expectations
from t5x_like.launching.job import Job
from t5x_like.launching.rendering import Rendering, Step, bucket_notes
from t5x_like.launching.text import command_line, to_yaml

TASK = "task.yaml"
_PYTHON = ".venv/bin/python"


@dataclasses.dataclass(frozen=True)
class SkyPilot:
    """Options of the target.

    Attributes:
      job: The job.
      topology: Topology, such as `h100:16` for two nodes of eight GPUs; or one TPU slice.
      spot: Whether to use preemptible machines, which managed jobs replace.
      infra: Cloud and region, such as `gcp/us-central1`; None lets SkyPilot choose.
      source: Directory that is copied to the nodes.
      directory: Directory of the rendered files.
    """

    job: Job
    topology: Topology
    spot: bool = False
    infra: str | None = None
    source: str = "."
    directory: Path = Path("launch")


def render(spec: SkyPilot) -> Rendering:
    """Render the task and its commands.

    Raises:
      ConfigError: The topology has several TPU slices, which SkyPilot does not support, or is a CPU topology.
    """
    name = spec.job.resource
    secrets = [word for secret in spec.job.secrets for word in ("--secret", secret)]
    return Rendering(
        directory=spec.directory,
        files={TASK: to_yaml(task(spec))},
        steps=(
            Step(
                "start a managed job, which is recovered after preemption",
                (
                    "sky",
                    "jobs",
                    "launch",
                    "--yes",
                    "--detach-run",
                    "--name",
                    name,
                    *secrets,
                    str(spec.directory / TASK),
                ),
            ),
            Step("show the status", ("sky", "jobs", "queue"), "follow"),
            Step("show the output", ("sky", "jobs", "logs", "--name", name), "follow"),
            Step("cancel the job", ("sky", "jobs", "cancel", "--yes", "--name", name), "stop"),
        ),
        notes=(
            *bucket_notes(spec.job, "the nodes' service account or role"),
            *(f"the secret {secret} is read from the environment of the sky command" for secret in spec.job.secrets),
        ),
    )


def task(spec: SkyPilot) -> dict[str, Any]:
    """Return the task in SkyPilot's format."""
    job = spec.job
    document: dict[str, Any] = {
        "name": job.resource,
        "resources": _resources(spec),
        "num_nodes": 1 if spec.topology.accelerator.platform == "tpu" else spec.topology.num_hosts,
        "workdir": spec.source,
    }
    if job.env:
        document["envs"] = dict(job.env)
    if job.secrets:
        # Without values: SkyPilot takes them from the command line and does not display them.
        document["secrets"] = dict.fromkeys(job.secrets)
    document["setup"] = _setup(spec.topology)
    document["run"] = _run(spec)
    return document


def _resources(spec: SkyPilot) -> dict[str, Any]:
    topology = spec.topology
    resources: dict[str, Any] = {} if spec.infra is None else {"infra": spec.infra}
    if topology.accelerator.platform == "tpu":
        if topology.num_slices > 1:
            fix = "use the target tpu-vm or gke for several slices"
            raise ConfigError([ConfigProblem("--num-slices", str(topology.num_slices), "1 with skypilot", fix)])
        resources["accelerators"] = f"tpu-{accelerator_type(topology)}"
        version = cloud_names(topology).runtime_version
        if version is not None:
            resources["accelerator_args"] = {"runtime_version": version}
    elif topology.accelerator.platform == "gpu":
        resources["accelerators"] = f"{cloud_names(topology).skypilot}:{chips_per_host(topology)}"
    else:
        raise ConfigError(
            [ConfigProblem("--topology", str(topology), "TPUs or GPUs", "the target local simulates devices")]
        )
    if spec.spot:
        resources["use_spot"] = True
    # Resumable exits are recovered without limit; any other exit ends the job.
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
    # On TPU VMs jax reads the process indices of the slice from the metadata server.
    launcher = "gcetpu" if spec.topology.accelerator.platform == "tpu" else "skypilot"
    command = spec.job.train(_PYTHON, "--launcher", launcher, *expectations(spec.topology))
    return f"set -euo pipefail\nexec {command_line(command)}\n"
