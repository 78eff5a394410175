"""`t5x-like launch`: renders how a run is started elsewhere; `--execute` starts it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5x_like.commands import train
from t5x_like.commands.arguments import Parser, configured_run, not_negative, positive
from t5x_like.config import EXIT_OK, ConfigError, Problem, RunConfig
from t5x_like.launching import gke, local, skypilot, slurm, tpu_vm
from t5x_like.launching.execute import execute, write
from t5x_like.launching.job import Job
from t5x_like.launching.rendering import Rendering, to_text
from t5x_like.planning.topologies import Topology, parse_topology

Render = Callable[[argparse.Namespace, RunConfig, Job, Path], Rendering]


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "launch",
        help="show how to start a run on many machines, or start it",
        description="Renders the files and commands that start `t5x-like train RECIPE` elsewhere, and prints them.",
        epilog="What stands behind -- is for `train`: ... launch slurm smoke --nodes 2 -- --training.batch-size 64",
    )
    targets = parser.add_subparsers(metavar="TARGET", required=True, parser_class=Parser)
    _add_local(targets)
    _tpu_vm_options(_add_target(targets, "tpu-vm", _tpu_vm, "TPU VMs of Google Cloud, by gcloud"))
    _gke_options(_add_target(targets, "gke", _gke, "a JobSet on Kubernetes with TPUs or GPUs, queued by Kueue"))
    _slurm_options(_add_target(targets, "slurm", _slurm, "a SLURM cluster, a process per GPU"))
    _skypilot_options(_add_target(targets, "skypilot", _skypilot, "a managed job of SkyPilot, on any cloud"))


def _add_target(targets: Any, name: str, render: Render, where: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = targets.add_parser(name, help=where, description=f"Starts a run on {where}.")
    parser.set_defaults(run=_run, render=render, parser=parser, overrides=True)
    parser.add_argument("recipe", metavar="RECIPE", help="as `train` takes it; it is read here, too, and checked")
    parser.add_argument("--execute", action="store_true", help="start it; without this nothing is run")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the files there")
    job = parser.add_argument_group("the job")
    job.add_argument("--name", help="of the job (default: the run's)")
    job.add_argument(
        "--workdir", metavar="DIR", help="the run's directory there (default: NAME in the shared volume or in runs)"
    )
    job.add_argument(
        "--env", type=_assignment, action="append", default=[], metavar="NAME=VALUE", help="of every process"
    )
    job.add_argument(
        "--secret", action="append", default=[], metavar="NAME", help="a variable whose value is nowhere written down"
    )
    job.add_argument("--max-restarts", type=not_negative, default=Job.max_restarts, metavar="N", help="(default: 10)")
    job.add_argument(
        "--restart-on",
        type=positive,
        nargs="+",
        default=[],
        metavar="CODE",
        help=f"exit codes to restart after, besides {', '.join(map(str, Job.restart_codes))}",
    )
    job.add_argument(
        "--grace-seconds", type=positive, default=Job.grace_seconds, metavar="S", help="that a save may take"
    )
    return parser


def _add_local(targets: Any) -> None:
    where = "this machine, in several processes"
    parser: argparse.ArgumentParser = targets.add_parser("local", help=where, description=f"Starts a run on {where}.")
    parser.set_defaults(run=_run_local, parser=parser, overrides=True)
    parser.add_argument("recipe", metavar="RECIPE", help="as `train` takes it; it is checked once, here")
    parser.add_argument("--execute", action="store_true", help="start it; without this nothing is run")
    parser.add_argument("-n", "--processes", type=positive, required=True, metavar="N", help="how many")
    parser.add_argument(
        "--devices-per-process", type=positive, metavar="N", help="GPUs of each, or CPU devices without GPUs"
    )
    parser.add_argument("--workdir", metavar="DIR", help="the run's directory (default: runs/NAME)")
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="gets what process N prints, as process.N.txt")


def _run_local(options: argparse.Namespace, extra: list[str]) -> int:
    run = _checked(options, extra)
    workdir = options.workdir or str(Path("runs") / run.name)
    arguments = ["-m", "t5x_like", "train", options.recipe, "--workdir", workdir, *extra]
    count, devices = options.processes, options.devices_per_process
    if not options.execute:
        print(local.describe(["python", *arguments], count, devices))
        return EXIT_OK
    return local.launch_local(
        [sys.executable, *arguments], processes=count, devices_per_process=devices, log_dir=options.log_dir
    )


def _run(options: argparse.Namespace, extra: list[str]) -> int:
    run = _checked(options, extra)
    name = options.name or run.name
    job = Job(
        name=name,
        recipe=options.recipe,
        workdir=options.workdir or f"{_shared(options) or 'runs'}/{name}",
        arguments=tuple(extra),
        env=dict(options.env),
        secrets=tuple(options.secret),
        max_restarts=options.max_restarts,
        restart_codes=tuple(sorted({*Job.restart_codes, *options.restart_on})),
        grace_seconds=options.grace_seconds,
    )
    rendering = options.render(options, run, job, options.output or Path("runs") / f"{job.resource}.launch")
    if options.execute:
        return execute(rendering, lambda line: print(f"t5x-like: {line}", file=sys.stderr))
    print(to_text(rendering), end="")
    if options.output is not None:
        write(rendering)
    return EXIT_OK


def _checked(options: argparse.Namespace, arguments: list[str]) -> RunConfig:
    """The run that `train` would make of the arguments: what it would refuse is refused here."""
    parser = Parser(prog="t5x-like")
    train.register(parser.add_subparsers(parser_class=Parser))
    of_train, overrides = parser.parse_known_args(["train", options.recipe, *arguments])
    if of_train.workdir is not None or of_train.print_config:
        options.parser.error("of the options of train, --workdir goes before --, and --print-config nowhere")
    return configured_run(of_train, overrides, options.parser.option_strings)


def _shared(options: argparse.Namespace) -> str | None:
    """Where a target's shared volume is on the machines, if one is asked for."""
    if getattr(options, "nfs", None):
        return tpu_vm.MOUNT
    is_mounted = getattr(options, "claim", None) or getattr(options, "bucket", None)
    return options.mount.rstrip("/") if is_mounted else None


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=VALUE")
    return name, value


def _add_topology(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology",
        metavar="T",
        help="v5e:16x16, v5p:4x4x8, h100:16, ... (default: the recipe's, partitioning.topology)",
    )
    parser.add_argument("--num-slices", type=positive, metavar="N", help="TPU slices (default: 1)")


def _topology(options: argparse.Namespace, run: RunConfig) -> Topology:
    text = options.topology or run.partitioning.topology
    if text is None:
        found, expected = "none, and none in the recipe", "a machine such as v5e:16x16 or h100:16"
        raise ConfigError([Problem("--topology", found, expected)])
    return parse_topology(text, options.num_slices or 1)


def _tpu_vm_options(parser: argparse.ArgumentParser) -> None:
    _add_topology(parser)
    parser.add_argument("--zone", required=True, help="of the VMs")
    parser.add_argument("--project", help="(default: gcloud's)")
    parser.add_argument("--runtime-version", metavar="V", help="software of the VMs (default: the usual one)")
    parser.add_argument("--queued", action="store_true", help="as a queued resource; several slices always are")
    capacity = parser.add_mutually_exclusive_group()
    capacity.add_argument("--spot", action="store_true", help="preemptible capacity")
    capacity.add_argument("--reserved", action="store_true", help="capacity of a reservation")
    parser.add_argument("--valid-until", metavar="6h", help="how long a queued request waits (default: for good)")
    parser.add_argument("--nfs", metavar="HOST:/EXPORT", help=f"a volume for all workers, mounted at {tpu_vm.MOUNT}")
    parser.add_argument("--source", default=".", metavar="DIR", help="what is copied and installed (default: here)")
    parser.add_argument(
        "--gcloud-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="of the command that creates, as in --gcloud-flag=--network=default",
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
    parser.add_argument("--image", required=True, help="built from launch/Containerfile")
    parser.add_argument("--namespace", default="default", help="(default: default)")
    parser.add_argument("--queue", default=gke.Gke.queue, help=f"Kueue's local queue (default: {gke.Gke.queue})")
    parser.add_argument("--no-queue", action="store_true", help="a cluster without Kueue")
    parser.add_argument("--service-account", metavar="NAME", help="of the cluster")
    parser.add_argument("--claim", metavar="NAME", help="a volume claim for all pods, which holds the run's directory")
    parser.add_argument(
        "--mount", default=gke.Gke.mount, metavar="DIR", help=f"of the claim (default: {gke.Gke.mount})"
    )
    parser.add_argument("--secret-object", metavar="NAME", help="the Secret with the secrets (default: the job's name)")
    parser.add_argument("--priority", metavar="CLASS", help="priority class")
    parser.add_argument("--unprivileged", action="store_true", help="TPU containers may only lock memory")
    parser.add_argument("--host-network", choices=("yes", "no"), help="(default: TPUs of several hosts)")
    parser.add_argument(
        "--node-selector", type=_assignment, action="append", default=[], metavar="LABEL=VALUE", help="further labels"
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
    parser.add_argument("--nodes", type=positive, metavar="N", help="(default: those of the topology, or 1)")
    parser.add_argument("--gpus-per-node", type=not_negative, metavar="N", help="a process each; 0: a job of CPUs")
    parser.add_argument("--topology", metavar="T", help="instead of both: h100:16 (default: the recipe's)")
    parser.add_argument("--tasks-per-node", type=positive, default=1, metavar="N", help="without GPUs (default: 1)")
    parser.add_argument("--cpus-per-task", type=positive, metavar="N", help="cores of a process")
    parser.add_argument("--time", metavar="D-HH:MM:SS", help="limit, before which the run saves and asks again")
    parser.add_argument("--signal-seconds", type=positive, metavar="S", help="before it (default: the grace period)")
    parser.add_argument("--partition", help="of the cluster")
    parser.add_argument("--account", help="that pays")
    parser.add_argument(
        "--sbatch",
        type=_assignment,
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="further, as in qos=high",
    )
    parser.add_argument("--python", default="python", help="the interpreter on the nodes (default: python)")
    parser.add_argument("--prologue", type=Path, metavar="FILE", help="shell lines in front, such as module load")
    parser.add_argument("--container-image", metavar="IMAGE", help="with the pyxis plugin")
    parser.add_argument("--container-mounts", metavar="FROM:TO", help="with the pyxis plugin")


def _slurm(options: argparse.Namespace, run: RunConfig, job: Job, directory: Path) -> Rendering:
    nodes, gpus = options.nodes, options.gpus_per_node
    text = options.topology or (None if gpus is not None else run.partitioning.topology)
    if text is not None:
        topology = parse_topology(text)
        if topology.accelerator.platform != "gpu":
            fix = "give --nodes and --gpus-per-node, or a topology of GPUs"
            raise ConfigError([Problem("--topology", str(topology), "GPUs, as in h100:16", fix)])
        machine = (("--nodes", nodes, topology.num_hosts), ("--gpus-per-node", gpus, topology.devices_per_host))
        for flag, given, its_own in machine if options.topology else ():
            if given not in (None, its_own):
                found = f"{given} beside --topology {topology}"
                raise ConfigError([Problem(flag, found, f"{its_own}, or one of both")])
        nodes, gpus = nodes or topology.num_hosts, topology.devices_per_host if gpus is None else gpus
    if gpus is None:
        raise ConfigError([Problem("--gpus-per-node", "none", "a number, or a --topology of GPUs")])
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
        raise ConfigError([Problem(str(path), str(error), "a text file")]) from None


def _skypilot_options(parser: argparse.ArgumentParser) -> None:
    _add_topology(parser)
    parser.add_argument("--spot", action="store_true", help="preemptible machines")
    parser.add_argument("--infra", metavar="CLOUD/REGION", help="(default: SkyPilot's choice)")
    parser.add_argument("--bucket", metavar="URL", help="for all nodes, which holds the run's directory")
    parser.add_argument("--mount", default=skypilot.SkyPilot.mount, metavar="DIR", help="of the bucket")
    parser.add_argument("--source", default=".", metavar="DIR", help="what is copied and installed (default: here)")


def _skypilot(options: argparse.Namespace, run: RunConfig, job: Job, directory: Path) -> Rendering:
    return skypilot.render(
        skypilot.SkyPilot(
            job=job,
            topology=_topology(options, run),
            spot=options.spot,
            infra=options.infra,
            bucket=options.bucket,
            mount=options.mount,
            source=options.source,
            directory=directory,
        )
    )
