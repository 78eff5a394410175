"""Kubernetes on Google Cloud: a JobSet whose replicas are TPU slices, or one of GPU nodes, queued by Kueue.

How it fails is rendered from the table of exit codes. A Job fails with its first pod. The pod failure policy marks two
kinds of failure: a pod that was evicted (DisruptionTarget), and an exit code after which a restart cannot help. Both
have the reason PodFailurePolicy; Kubernetes' message tells them apart. The JobSet starts again after the first kind
however often it comes, gives up after the second, and counts all others against its limit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5x_like.config import ConfigError, Problem
from t5x_like.launching.clouds import chips_per_host, cloud_names, expectations, shape_text
from t5x_like.launching.job import Job
from t5x_like.launching.manifests import to_yaml
from t5x_like.launching.rendering import Rendering, Step
from t5x_like.planning.topologies import Topology

MANIFEST = "jobset.yaml"
CONTAINERFILE = "launch/Containerfile"
CONTAINER = "train"
SLICES = "slice-job"
"""Of the JobSet: the name of its only replicated job, as xpk has it."""
USER = 1000
"""Of the container file."""
PORT = 8476
"""At which process 0 of GPU nodes waits for the others."""
_MEMLOCK_KIB = 64 * 2**20
_LABEL = "kueue.x-k8s.io/queue-name"
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@dataclasses.dataclass(frozen=True)
class Gke:
    """Attributes:
    image: Of the container, built from `launch/Containerfile`.
    queue: Kueue's local queue; None where there is no Kueue.
    service_account: Of the cluster, through which pods may reach buckets.
    claim: A volume claim that all pods mount at `mount`; the run's directory belongs there.
    secret: The Secret with the job's secrets, a key for each.
    priority: A priority class.
    privileged: Of TPU containers, as xpk has it; otherwise they may raise their limit of locked memory only.
    host_network: Pods are in their node's network, which DCN between slices is faster with; None: TPUs of many hosts.
    node_selector: Further labels of the nodes.
    ttl_seconds: After its end the JobSet is deleted.
    """

    job: Job
    topology: Topology
    image: str
    namespace: str = "default"
    queue: str | None = "multislice-queue"
    service_account: str | None = None
    claim: str | None = None
    mount: str = "/mnt/runs"
    secret: str | None = None
    priority: str | None = None
    privileged: bool = True
    host_network: bool | None = None
    node_selector: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ttl_seconds: int = 12 * 3600
    directory: Path = Path("launch")

    @property
    def is_tpu(self) -> bool:
        return self.topology.accelerator.platform == "tpu"

    @property
    def in_host_network(self) -> bool:
        default = self.is_tpu and self.topology.num_hosts > 1
        return default if self.host_network is None else self.host_network


def render(spec: Gke) -> Rendering:
    """The manifest and the commands around it.

    Raises:
      ConfigError: a CPU topology.
    """
    if spec.topology.accelerator.platform == "cpu":
        raise ConfigError([Problem("--topology", str(spec.topology), "TPUs or GPUs")])
    name, manifest = spec.job.resource, str(spec.directory / MANIFEST)
    kubectl = ("kubectl", f"--namespace={spec.namespace}")
    extra = "tpu" if spec.is_tpu else "cuda"
    build = ("docker", "build", f"--file={CONTAINERFILE}", f"--build-arg=EXTRA={extra}", f"--tag={spec.image}", ".")
    pods = f"--selector=jobset.sigs.k8s.io/jobset-name={name}"
    logs = ("logs", pods, "--prefix", "--follow", f"--max-log-requests={max(5, spec.topology.num_hosts)}")
    return Rendering(
        directory=spec.directory,
        files={MANIFEST: to_yaml(jobset(spec))},
        steps=(
            Step("build the image", build, "before"),
            Step("push it", ("docker", "push", spec.image), "before"),
            Step("hand it to the cluster", (*kubectl, "apply", f"--filename={manifest}")),
            Step("where it stands", (*kubectl, "get", "jobset", name), "follow"),
            Step("its pods", (*kubectl, "get", "pods", pods, "--output=wide"), "follow"),
            Step("their output", (*kubectl, *logs), "follow"),
            Step("end it and delete it", (*kubectl, "delete", "jobset", name), "stop"),
        ),
        notes=_notes(spec),
    )


def jobset(spec: Gke) -> dict[str, Any]:
    """The JobSet as Kubernetes has it."""
    job = spec.job
    metadata: dict[str, Any] = {"name": job.resource, "namespace": spec.namespace}
    if spec.queue is not None:
        metadata["labels"] = {_LABEL: spec.queue}
    annotations = {"t5x-like/run": job.name}
    if spec.is_tpu:
        # A slice is a node pool: all pods of a job in one, and no other job's.
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    metadata["annotations"] = annotations
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "ttlSecondsAfterFinished": spec.ttl_seconds,
            "failurePolicy": jobset_failure_policy(job),
            "replicatedJobs": [
                {
                    "name": SLICES,
                    "replicas": spec.topology.num_slices,
                    "template": {"spec": job_spec(spec)},
                }
            ],
        },
    }


def jobset_failure_policy(job: Job) -> dict[str, Any]:
    """When all jobs start again together. The first rule that fits counts; without one, a restart that is counted."""
    return {
        "maxRestarts": job.max_restarts,
        "rules": [
            {
                "name": "evicted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": ["has condition DisruptionTarget"],
            },
            {"name": "notToBeRestarted", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
        ],
    }


def pod_failure_policy(job: Job) -> dict[str, Any]:
    """Which failures of a pod are marked. The first rule that fits counts; eviction may have any exit code."""
    return {
        "rules": [
            {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {
                "action": "FailJob",
                "onExitCodes": {
                    "containerName": CONTAINER,
                    "operator": "NotIn",
                    "values": sorted(set(job.restart_codes)),
                },
            },
        ]
    }


def job_spec(spec: Gke) -> dict[str, Any]:
    """One slice: an indexed Job with a pod for each host."""
    hosts = spec.topology.hosts_per_slice
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": pod_failure_policy(spec.job),
        "template": {"spec": _pod(spec)},
    }


def _pod(spec: Gke) -> dict[str, Any]:
    resource = "google.com/tpu" if spec.is_tpu else "nvidia.com/gpu"
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": spec.job.grace_seconds,
        "nodeSelector": _node_selector(spec),
        "tolerations": [{"key": resource, "operator": "Exists"}],
    }
    if spec.in_host_network:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if spec.service_account is not None:
        pod["serviceAccountName"] = spec.service_account
    if spec.priority is not None:
        pod["priorityClassName"] = spec.priority
    if not spec.is_tpu:
        pod["securityContext"] = {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
    pod["containers"] = [_container(spec, resource)]
    pod["volumes"] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    if spec.claim is not None:
        pod["volumes"].append({"name": "runs", "persistentVolumeClaim": {"claimName": spec.claim}})
    return pod


def _node_selector(spec: Gke) -> dict[str, str]:
    names = cloud_names(spec.topology)
    if spec.is_tpu:
        labels = {
            "cloud.google.com/gke-tpu-accelerator": names.gke,
            "cloud.google.com/gke-tpu-topology": shape_text(spec.topology),
        }
    else:
        labels = {"cloud.google.com/gke-accelerator": names.gke}
    return labels | dict(spec.node_selector)


def _container(spec: Gke, resource: str) -> dict[str, Any]:
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    if spec.claim is not None:
        mounts.append({"name": "runs", "mountPath": spec.mount})
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": spec.image,
        "command": [literal(word) for word in _command(spec)],
        "env": _env(spec),
        "securityContext": _security(spec),
        "resources": {"limits": {resource: chips_per_host(spec.topology)}},
        "volumeMounts": mounts,
    }
    if spec.is_tpu:
        # Between the workers of a slice, between slices, and for metrics.
        container["ports"] = [{"containerPort": port} for port in (8471, 8080, 8431)]
    return {name: value for name, value in container.items() if value}


def _command(spec: Gke) -> tuple[str, ...]:
    launcher = () if spec.is_tpu else ("--launcher", "jax")
    train = spec.job.train("python", *launcher, *expectations(spec.topology))
    if spec.is_tpu and not spec.privileged:
        # The words of the command are this shell's arguments, not its text.
        return ("bash", "-c", f'ulimit -l {_MEMLOCK_KIB} && exec "$@"', "bash", *train)
    return train


def _env(spec: Gke) -> list[dict[str, Any]]:
    job = spec.job
    env: list[dict[str, Any]] = [{"name": name, "value": literal(value)} for name, value in job.env.items()]
    for name in job.secrets:
        reference = {"name": spec.secret or job.resource, "key": name}
        env.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    if not spec.is_tpu:
        # What the start-up reads first; of TPU slices, GKE itself tells their pods.
        first = f"{job.resource}-{SLICES}-0-0.{job.resource}"
        env += [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{first}:{PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(spec.topology.num_hosts)},
            {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}},
        ]
    return env


def literal(text: str) -> str:
    """`text` as Kubernetes gives it on unchanged: in commands and variables it replaces `$(NAME)`, and `$$` by `$`."""
    return text.replace("$", "$$")


def _security(spec: Gke) -> dict[str, Any]:
    if not spec.is_tpu:
        return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    if spec.privileged:
        return {"privileged": True, "runAsUser": 0}
    return {"runAsUser": 0, "capabilities": {"drop": ["ALL"], "add": ["SYS_RESOURCE"]}}


def _notes(spec: Gke) -> tuple[str, ...]:
    notes = ["the failure policy needs JobSet 0.10 or newer in the cluster"]
    if spec.topology.num_hosts > 1 and spec.claim is None:
        notes.append("all pods write the run's directory together: --claim NAME mounts a volume that they share")
    if spec.job.secrets:
        keys = ", ".join(spec.job.secrets)
        notes.append(f"the Secret {spec.secret or spec.job.resource} must have the keys {keys}")
    return tuple(notes)
