"""Target gke: a JobSet on Kubernetes whose replicas are TPU slices, or with one replica of GPU nodes, queued by Kueue.

Its failure policies are rendered from the table of exit codes. A Job fails with its first pod. The pod failure policy
marks two kinds of failure: a pod that was evicted (DisruptionTarget), and an exit code after which a restart cannot
help. Both have the reason PodFailurePolicy; Kubernetes' message distinguishes them. The JobSet restarts after the first
kind without limit, fails after the second, and counts all other failures against its limit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5x_like.distributed.cluster_detection import DEFAULT_PORT
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.hardware.topologies import Topology
from t5x_like.launching.accelerator_names import chips_per_host, cloud_names, expectations, shape_text
from t5x_like.launching.job import SHARED_MOUNT, Job
from t5x_like.launching.rendering import Rendering, Step, bucket_notes
from t5x_like.launching.text import to_yaml

MANIFEST = "jobset.yaml"
CONTAINERFILE = "launch/Containerfile"
CONTAINER = "train"
SLICES = "slice-job"
"""Name of the JobSet's only replicated job, the same as in xpk."""
USER = 1000
"""User of the container file."""
_MEMLOCK_KIB = 64 * 2**20
_LABEL = "kueue.x-k8s.io/queue-name"
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@dataclasses.dataclass(frozen=True)
class Gke:
    """Options of the target.

    Attributes:
      job: The job.
      topology: TPU slices or GPUs.
      image: Container image, built from `launch/Containerfile`.
      namespace: Kubernetes namespace.
      queue: Kueue's local queue; None for a cluster without Kueue.
      service_account: Kubernetes service account, with which pods can access buckets.
      claim: Volume claim that all pods mount at `mount`, for the run directory.
      mount: Mount point of the claim.
      secret: Secret object with a key for each secret of the job.
      priority: Priority class.
      privileged: Whether TPU containers are privileged, as in xpk; otherwise they may only raise their limit of locked
        memory.
      host_network: Whether pods use their node's network, which makes DCN between slices faster; None for TPU jobs with
        several hosts.
      node_selector: Further labels of the nodes.
      ttl_seconds: Seconds after the end until the JobSet is deleted.
      directory: Directory of the rendered files.
    """

    job: Job
    topology: Topology
    image: str
    namespace: str = "default"
    queue: str | None = "multislice-queue"
    service_account: str | None = None
    claim: str | None = None
    mount: str = SHARED_MOUNT
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
    """Render the manifest and its commands.

    Raises:
      ConfigError: The topology is a CPU topology.
    """
    if spec.topology.accelerator.platform == "cpu":
        raise ConfigError([ConfigProblem("--topology", str(spec.topology), "TPUs or GPUs")])
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
            Step("push the image", ("docker", "push", spec.image), "before"),
            Step("create the JobSet", (*kubectl, "apply", f"--filename={manifest}")),
            Step("show the status", (*kubectl, "get", "jobset", name), "follow"),
            Step("show the pods", (*kubectl, "get", "pods", pods, "--output=wide"), "follow"),
            Step("show the output", (*kubectl, *logs), "follow"),
            Step("stop and delete the JobSet", (*kubectl, "delete", "jobset", name), "stop"),
        ),
        notes=_notes(spec),
    )


def jobset(spec: Gke) -> dict[str, Any]:
    """Return the JobSet manifest."""
    job = spec.job
    metadata: dict[str, Any] = {"name": job.resource, "namespace": spec.namespace}
    if spec.queue is not None:
        metadata["labels"] = {_LABEL: spec.queue}
    annotations = {"t5x-like/run": job.name}
    if spec.is_tpu:
        # A slice is a node pool: all pods of a job run in one, and no pods of another job.
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
    """Return the policy for restarting all jobs together: the first matching rule, else a counted restart."""
    return {
        "maxRestarts": job.max_restarts,
        "rules": [
            {
                "name": "evicted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": ["has condition DisruptionTarget"],
            },
            {"name": "notRestartable", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
        ],
    }


def pod_failure_policy(job: Job) -> dict[str, Any]:
    """Return the policy that marks pod failures: the first matching rule; an eviction can have any exit code."""
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
    """Return the specification of one slice: an indexed Job with one pod per host."""
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
        # Ports for the workers of a slice, for communication between slices, and for metrics.
        container["ports"] = [{"containerPort": port} for port in (8471, 8080, 8431)]
    return {name: value for name, value in container.items() if value}


def _command(spec: Gke) -> tuple[str, ...]:
    launcher = () if spec.is_tpu else ("--launcher", "jax")
    train = spec.job.train("python", *launcher, *expectations(spec.topology))
    if spec.is_tpu and not spec.privileged:
        # The command is passed to the shell as arguments, not as text.
        return ("bash", "-c", f'ulimit -l {_MEMLOCK_KIB} && exec "$@"', "bash", *train)
    return train


def _env(spec: Gke) -> list[dict[str, Any]]:
    job = spec.job
    env: list[dict[str, Any]] = [{"name": name, "value": literal(value)} for name, value in job.env.items()]
    for name in job.secrets:
        reference = {"name": spec.secret or job.resource, "key": name}
        env.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    if not spec.is_tpu:
        # Read by cluster detection; for TPU slices GKE itself sets the variables of the pods.
        first = f"{job.resource}-{SLICES}-0-0.{job.resource}"
        env += [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{first}:{DEFAULT_PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(spec.topology.num_hosts)},
            {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}},
        ]
    return env


def literal(text: str) -> str:
    """Return `text` escaped: Kubernetes replaces `$(NAME)` in commands and variables, and `$$` by `$`."""
    return text.replace("$", "$$")


def _security(spec: Gke) -> dict[str, Any]:
    if not spec.is_tpu:
        return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    if spec.privileged:
        return {"privileged": True, "runAsUser": 0}
    return {"runAsUser": 0, "capabilities": {"drop": ["ALL"], "add": ["SYS_RESOURCE"]}}


def _notes(spec: Gke) -> tuple[str, ...]:
    notes = ["the failure policy needs JobSet 0.10 or newer in the cluster"]
    notes += bucket_notes(spec.job, "the pods' Kubernetes service account (--service-account)")
    if spec.job.secrets:
        keys = ", ".join(spec.job.secrets)
        notes.append(f"the Secret {spec.secret or spec.job.resource} must have the keys {keys}")
    return tuple(notes)
