"""Targets of `t5x-like launch`: the options of each, and its rendering."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from t5x_like.cli.arguments import local_path, local_text, not_negative, positive
from t5x_like.config import RunConfig
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.hardware.topologies import Topology, parse_topology
from t5x_like.launching import gke, skypilot, slurm, tpu_vm
from t5x_like.launching.job import SHARED_MOUNT, Job
from t5x_like.launching.rendering import Rendering
from t5x_like.utils.trusted_urls import unsupported_url


@dataclasses.dataclass(frozen=True)
class Target:
    """Target that runs can be launched on.

    Attributes:
      name: Name on the command line.
      description: Description for the help text.
      add_options: Adds the options of the target to its parser.
      render: Renders a job from the parsed options, for a directory.
    """

    name: str
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    render: Callable[[argparse.Namespace, RunConfig, Job, Path], Rendering]


def assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=VALUE")
    return name, value


def _add_bucket(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bucket",
        type=_bucket,
        metavar="URL",
        help="gs://BUCKET or s3://BUCKET, with or without a path: the run directory is URL/runs/NAME, and the token "
        "stores are in URL/stores",
    )


def _bucket(text: str) -> str:
    if problems := unsupported_url(text, ("gs", "s3"), "--bucket"):
        raise ConfigError(problems)
    return text.rstrip("/")


def _add_topology(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology",
        metavar="T",
        help="v5e:16x16, v5p:4x4x8, h100:16, ... (default: the recipe's sharding.topology)",
    )
    parser.add_argument("--num-slices", type=positive, metavar="N", help="number of TPU slices (default: 1)")


def _topology(options: argparse.Namespace, run: RunConfig) -> Topology:
    text = options.topology or run.sharding.topology
    if text is None:
        found, expected = "none, and none in the recipe", "a topology such as v5e:16x16 or h100:16"
        raise ConfigError([ConfigProblem("--topology", found, expected)])
    return parse_topology(text, options.num_slices or 1)


def _add_source(parser: argparse.ArgumentParser) -> None:
    help = "directory to copy and install (default: current)"
    parser.add_argument("--source", type=local_text, default=".", metavar="DIR", help=help)


def _tpu_vm_options(parser: argparse.ArgumentParser) -> None:
    _add_topology(parser)
    parser.add_argument("--zone", required=True, help="zone of the VMs")
    parser.add_argument("--project", help="project (default: gcloud's)")
    parser.add_argument("--runtime-version", metavar="V", help="software version of the VMs (default: by accelerator)")
    parser.add_argument("--queued", action="store_true", help="create a queued resource; several slices always are one")
    capacity = parser.add_mutually_exclusive_group()
    capacity.add_argument("--spot", action="store_true", help="use preemptible capacity")
    parser.add_argument(
        "--recreate",
        action="store_true",
        help="with --execute --spot: stay, and request the slices again when they are preempted, until the run ends",
    )
    capacity.add_argument("--reserved", action="store_true", help="use capacity of a reservation")
    parser.add_argument("--valid-until", metavar="6h", help="time for which a queued request waits (default: no limit)")
    _add_bucket(parser)
    help = f"in place of a bucket: volume for all workers, mounted at {SHARED_MOUNT}"
    parser.add_argument("--nfs", metavar="HOST:/EXPORT", help=help)
    _add_source(parser)
    parser.add_argument(
        "--gcloud-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="flag of the create command, as in --gcloud-flag=--network=default",
    )


def _tpu_vm(options: argparse.Namespace, run: RunConfig, job: Job, directory: Path) -> Rendering:
    return tpu_vm.render(
        tpu_vm.TpuVm(
            job=job,
            topology=_topology(options, run),
            zone=options.zone,
            project=options.project,
            runtime_version=options.runtime_version,
            queued=options.queued,
            spot=options.spot,
            reserved=options.reserved,
            valid_until=options.valid_until,
            nfs=options.nfs,
            source=options.source,
            flags=tuple(options.gcloud_flag),
            directory=directory,
        )
    )


def _gke_options(parser: argparse.ArgumentParser) -> None:
    _add_topology(parser)
    parser.add_argument("--image", required=True, help="image built from launch/Containerfile")
    parser.add_argument("--namespace", default="default", help="namespace (default: default)")
    parser.add_argument("--queue", default=gke.Gke.queue, help=f"Kueue's local queue (default: {gke.Gke.queue})")
    parser.add_argument("--no-queue", action="store_true", help="for a cluster without Kueue")
    parser.add_argument("--service-account", metavar="NAME", help="Kubernetes service account")
    _add_bucket(parser)
    help = "in place of a bucket: volume claim for all pods, for the run directory"
    parser.add_argument("--claim", metavar="NAME", help=help)
    help = f"mount point of the claim (default: {gke.Gke.mount})"
    parser.add_argument("--mount", type=local_text, default=gke.Gke.mount, metavar="DIR", help=help)
    parser.add_argument(
        "--secret-object", metavar="NAME", help="Secret object with the secrets (default: the job's name)"
    )
    parser.add_argument("--priority", metavar="CLASS", help="priority class")
    parser.add_argument("--unprivileged", action="store_true", help="TPU containers get only the right to lock memory")
    parser.add_argument(
        "--host-network", choices=("yes", "no"), help="use the host's network (default: for TPUs on several hosts)"
    )
    parser.add_argument(
        "--node-selector",
        type=assignment,
        action="append",
        default=[],
        metavar="LABEL=VALUE",
        help="further node labels",
    )


def _gke(options: argparse.Namespace, run: RunConfig, job: Job, directory: Path) -> Rendering:
    return gke.render(
        gke.Gke(
            job=job,
            topology=_topology(options, run),
            image=options.image,
            namespace=options.namespace,
            queue=None if options.no_queue else options.queue,
            service_account=options.service_account,
            claim=options.claim,
            mount=options.mount,
            secret=options.secret_object,
            priority=options.priority,
            privileged=not options.unprivileged,
            host_network={None: None, "yes": True, "no": False}[options.host_network],
            node_selector=dict(options.node_selector),
            directory=directory,
        )
    )


def _slurm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nodes", type=positive, metavar="N", help="number of nodes (default: those of the topology, or 1)"
    )
    parser.add_argument(
        "--gpus-per-node", type=not_negative, metavar="N", help="GPUs per node, with a process each; 0 for a CPU job"
    )
    parser.add_argument("--topology", metavar="T", help="replaces both, such as h100:16 (default: the recipe's)")
    parser.add_argument(
        "--tasks-per-node", type=positive, default=1, metavar="N", help="processes per node without GPUs (default: 1)"
    )
    parser.add_argument("--cpus-per-task", type=positive, metavar="N", help="cores per process")
    parser.add_argument("--time", metavar="D-HH:MM:SS", help="time limit, before which the run saves and is requeued")
    parser.add_argument(
        "--signal-seconds",
        type=positive,
        metavar="S",
        help="seconds before the limit to stop (default: the grace period)",
    )
    parser.add_argument("--partition", help="partition of the cluster")
    parser.add_argument("--account", help="account to charge")
    parser.add_argument(
        "--sbatch",
        type=assignment,
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="further sbatch option, such as qos=high",
    )
    parser.add_argument("--python", default="python", help="Python interpreter on the nodes (default: python)")
    parser.add_argument(
        "--prologue", type=local_path, metavar="FILE", help="shell lines to run first, such as module load"
    )
    parser.add_argument("--container-image", metavar="IMAGE", help="for the pyxis plugin")
    parser.add_argument("--container-mounts", metavar="FROM:TO", help="for the pyxis plugin")


def _slurm(options: argparse.Namespace, run: RunConfig, job: Job, directory: Path) -> Rendering:
    nodes, gpus = options.nodes, options.gpus_per_node
    text = options.topology or (None if gpus is not None else run.sharding.topology)
    if text is not None:
        topology = parse_topology(text)
        if topology.accelerator.platform != "gpu":
            fix = "use --nodes and --gpus-per-node, or a topology of GPUs"
            raise ConfigError([ConfigProblem("--topology", str(topology), "GPUs, such as h100:16", fix)])
        machine = (("--nodes", nodes, topology.num_hosts), ("--gpus-per-node", gpus, topology.devices_per_host))
        for flag, given, expected in machine if options.topology else ():
            if given not in (None, expected):
                found = f"{given} together with --topology {topology}"
                raise ConfigError([ConfigProblem(flag, found, f"{expected}, or only one of both options")])
        nodes, gpus = nodes or topology.num_hosts, topology.devices_per_host if gpus is None else gpus
    if gpus is None:
        raise ConfigError([ConfigProblem("--gpus-per-node", "none", "a number, or a --topology of GPUs")])
    named = [(key, getattr(options, key)) for key in ("partition", "account") if getattr(options, key)]
    return slurm.render(
        slurm.Slurm(
            job=job,
            nodes=nodes or 1,
            gpus_per_node=gpus,
            tasks_per_node=options.tasks_per_node,
            cpus_per_task=options.cpus_per_task,
            time=options.time,
            signal_seconds=options.signal_seconds,
            directives=(*named, *options.sbatch),
            python=options.python,
            prologue=_text(options.prologue),
            container_image=options.container_image,
            container_mounts=options.container_mounts,
            directory=directory,
        )
    )


def _text(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([ConfigProblem(str(path), str(error), "a text file")]) from None


def _skypilot_options(parser: argparse.ArgumentParser) -> None:
    _add_topology(parser)
    parser.add_argument("--spot", action="store_true", help="use preemptible machines")
    parser.add_argument("--infra", metavar="CLOUD/REGION", help="cloud and region (default: SkyPilot's choice)")
    _add_bucket(parser)
    _add_source(parser)


def _skypilot(options: argparse.Namespace, run: RunConfig, job: Job, directory: Path) -> Rendering:
    return skypilot.render(
        skypilot.SkyPilot(
            job=job,
            topology=_topology(options, run),
            spot=options.spot,
            infra=options.infra,
            source=options.source,
            directory=directory,
        )
    )


TARGETS = (
    Target("tpu-vm", "TPU VMs of Google Cloud, with gcloud", _tpu_vm_options, _tpu_vm),
    Target("gke", "Kubernetes with TPUs or GPUs, as a JobSet queued by Kueue", _gke_options, _gke),
    Target("slurm", "a SLURM cluster, with one process per GPU", _slurm_options, _slurm),
    Target("skypilot", "any cloud, as a managed job of SkyPilot", _skypilot_options, _skypilot),
)
