"""Cluster detection: precedence of launchers, incomplete settings, and the GPUs of a process."""

from __future__ import annotations

import itertools
import socket
import threading

import pytest

from t5x_like.distributed.cluster_detection import (
    DEFAULT_PORT,
    ClusterInfo,
    count_problems,
    detect_cluster,
    is_loopback,
    known_hosts,
)
from t5x_like.distributed.flags import DistributedFlags
from t5x_like.distributed.rendezvous import RendezvousError, rendezvous
from t5x_like.errors import ConfigError, UserError

FLAGS = DistributedFlags(coordinator="10.0.0.1:1234", num_processes=4, process_id=3)
JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.3\n10.0.0.4\n", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
TORCHRUN = {"MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "29500", "WORLD_SIZE": "8", "RANK": "5"}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
GCE_TPU: dict[str, str] = {}
GKE_TPU = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "true"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.9", "JOB_COMPLETION_INDEX": "1"}

# In the order of precedence, each with its environment.
LAUNCHERS = [
    ("jax", JAX),
    ("skypilot", SKYPILOT),
    ("torchrun", TORCHRUN),
    ("ompi", OMPI),
    ("slurm", SLURM),
    ("kubernetes", KUBERNETES),
]


def detect(
    environment: dict[str, str], flags: DistributedFlags | None = None, *, on_tpu_vm: bool = False
) -> ClusterInfo:
    return detect_cluster(flags or DistributedFlags(), environment, on_tpu_vm=on_tpu_vm)


@pytest.mark.parametrize("first, second", list(itertools.combinations(range(len(LAUNCHERS)), 2)))
def test_first_launcher_present_decides(first: int, second: int) -> None:
    environment = LAUNCHERS[second][1] | LAUNCHERS[first][1]
    assert detect(environment).launcher == LAUNCHERS[first][0]
    # A launcher named by --launcher is the only one considered.
    named = DistributedFlags(launcher=LAUNCHERS[second][0])  # type: ignore[arg-type]
    assert detect(environment, named).launcher == LAUNCHERS[second][0]


def test_flags_come_first_and_single_last() -> None:
    everything = {name: value for _, environment in LAUNCHERS for name, value in environment.items()}
    resolved = detect(everything, FLAGS)
    assert (resolved.launcher, resolved.coordinator) == ("flags", "10.0.0.1:1234")
    assert (resolved.process_index, resolved.process_count) == (3, 4)
    assert detect({}).is_single and detect({}).launcher == "single"
    assert detect(everything, DistributedFlags(launcher="single")).is_single


def test_tpu_vms_come_between_slurm_and_kubernetes() -> None:
    assert detect(GCE_TPU, on_tpu_vm=True) == ClusterInfo("gcetpu")
    gke = detect(GKE_TPU | KUBERNETES, on_tpu_vm=True)
    assert (gke.launcher, gke.detection, gke.hosts) == ("gketpu", "gketpu", 2)
    assert detect(SLURM, on_tpu_vm=True).launcher == "slurm"
    assert detect(GKE_TPU).launcher == "single", "the variables alone do not make a TPU VM"


def test_settings_are_read_for_each_launcher() -> None:
    assert detect(JAX) == ClusterInfo("jax", "10.0.0.2:1234", 4, 2)
    assert detect(SKYPILOT) == ClusterInfo("skypilot", f"10.0.0.3:{DEFAULT_PORT}", 2, 1, hosts=2)
    assert detect(SKYPILOT | {"JAX_COORDINATOR_PORT": "99"}).coordinator == "10.0.0.3:99"
    assert detect(TORCHRUN) == ClusterInfo("torchrun", "10.0.0.5:29500", 8, 5)
    # torchrun itself listens on its port; launchers that only set its variables do not.
    assert detect(TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}).coordinator == "10.0.0.5:29501"
    assert detect(OMPI) == ClusterInfo("ompi", None, 4, 1, None, "ompi")
    assert detect(SLURM) == ClusterInfo("slurm", None, 16, 3, None, "slurm")
    assert detect(SKYPILOT | {"SKYPILOT_NODE_IPS": "fe80::1 fe80::2"}).coordinator == f"[fe80::1]:{DEFAULT_PORT}"


@pytest.mark.parametrize("name, environment", LAUNCHERS[:3])
def test_incomplete_variables_are_refused_with_the_missing_ones(name: str, environment: dict[str, str]) -> None:
    for size in range(1, len(environment)):
        for subset in itertools.combinations(environment, size):
            with pytest.raises(ConfigError) as refusal:
                detect({variable: environment[variable] for variable in subset})
            message = str(refusal.value)
            missing = message.split("expected ")[1].split(" as well")[0].split(", ")
            assert set(missing) == environment.keys() - set(subset)
            assert all(variable in message.split("expected")[0] for variable in subset)
            # An empty variable counts as missing.
            with pytest.raises(ConfigError):
                detect({variable: environment[variable] if variable in subset else "" for variable in environment})


def test_incomplete_flags_are_refused() -> None:
    complete = {"coordinator": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}
    for size in (1, 2):
        for subset in itertools.combinations(complete, size):
            with pytest.raises(ConfigError) as refusal:
                detect(JAX, DistributedFlags(**{name: complete[name] for name in subset}))  # type: ignore[arg-type]
            for name in complete.keys() - set(subset):
                assert f"--{name.replace('_', '-')}" in str(refusal.value).split("expected ")[1]


@pytest.mark.parametrize(
    "environment, message",
    [
        ({**JAX, "JAX_PROCESS_ID": "4"}, "4 of 4"),
        ({**JAX, "JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID"),
        ({**JAX, "JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES"),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "10.0.0.2"}, "HOST:PORT"),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "10.0.0.2:70000"}, "HOST:PORT"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "many"}, "SLURM_NTASKS"),
        ({**TORCHRUN, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE"),
        ({**TORCHRUN, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "0", "CUDA_VISIBLE_DEVICES": "0,1"}, "0 processes"),
        ({**SKYPILOT, "SKYPILOT_NUM_NODES": "3"}, "2 addresses for SKYPILOT_NUM_NODES=3"),
        ({**JAX, "JAX_LOCAL_DEVICE_IDS": "0;1"}, "JAX_LOCAL_DEVICE_IDS"),
        # A process that was started by hand within an allocation of many tasks.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, "start the command with `srun`"),
    ],
)
def test_inconsistent_settings_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        detect(environment)
    assert refusal.value.exit_code == 2


def test_named_launcher_must_be_present() -> None:
    for name in ("flags", "jax", "skypilot", "torchrun", "ompi", "slurm", "gcetpu", "gketpu", "kubernetes"):
        with pytest.raises(ConfigError):
            detect({}, DistributedFlags(launcher=name))  # type: ignore[arg-type]


def test_single_task_or_node_runs_alone() -> None:
    one = SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert detect(one).is_single
    assert detect({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}).is_single
    assert detect({"SKYPILOT_NODE_IPS": "::1", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}).is_single
    # A pod that is not a worker of an indexed job has no other processes.
    assert detect({"KUBERNETES_SERVICE_HOST": "10.0.0.9"}).is_single


def slurm(tasks_per_node: str, gpus: str, local: int, node: int = 0, **more: str) -> tuple[int, ...] | None:
    environment = SLURM | {
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
        "SLURM_GPUS_ON_NODE": gpus,
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
    }
    return detect(environment | more).local_device_ids


def test_slurm_task_gets_all_gpus_that_it_owns() -> None:
    """jax would give task i of a node only GPU i."""
    assert slurm("8(x2)", "8", local=3) == (3,)
    assert slurm("1(x2)", "8", local=0) == tuple(range(8)), "one task that owns all of them"
    assert slurm("2(x2)", "8", local=1) == (4, 5, 6, 7)
    assert slurm("1,4", "4", local=2, node=1) == (2,)
    assert slurm("1,4", "4", local=0, node=0) == (0, 1, 2, 3)
    # With --gpus-per-task SLURM hides the GPUs of other tasks: the first visible GPU belongs to the task.
    assert slurm("8(x2)", "8", local=3, CUDA_VISIBLE_DEVICES="5") == (0,)
    assert slurm("4(x2)", "8", local=3, CUDA_VISIBLE_DEVICES="6,7", SLURM_GPUS_PER_TASK="2") == (0, 1)
    with pytest.raises(ConfigError, match="--ntasks-per-node=8"):
        slurm("3(x2)", "8", local=1)


def test_explicit_gpus_override_those_of_the_launcher() -> None:
    many = SLURM | {"SLURM_GPUS_ON_NODE": "8"}
    assert detect(many | {"JAX_LOCAL_DEVICE_IDS": "6,7"}).local_device_ids == (6, 7)
    assert detect(many, DistributedFlags(local_device_ids=(5,))).local_device_ids == (5,)
    local = TORCHRUN | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert detect(local).local_device_ids == (1,)
    assert detect(local | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}).local_device_ids == (2, 3)
    assert detect(local | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}).local_device_ids is None


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:1", "127.0.1.1:1", "[::1]:1"])
def test_loopback_coordinator_is_refused_with_several_hosts(address: str) -> None:
    assert is_loopback(address)
    loopback = JAX | {"JAX_COORDINATOR_ADDRESS": address}
    assert detect(loopback).coordinator == address, "it is valid on one host"
    for hosts in ({"SLURM_NNODES": "2"}, {"TPU_WORKER_HOSTNAMES": "a,b"}, {"SKYPILOT_NUM_NODES": "2"}):
        environment = {name: value for name, value in (loopback | hosts).items()}
        with pytest.raises(ConfigError, match="on each of the 2 hosts"):
            detect(environment)
    several = TORCHRUN | {"MASTER_ADDR": address.rpartition(":")[0], "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert known_hosts(several) == 2
    with pytest.raises(ConfigError, match="2 hosts"):
        detect(several)
    assert not is_loopback("node001:1") and not is_loopback("10.0.0.1:1")


def problem_text(resolved: ClusterInfo, environment: dict[str, str], **values: object) -> str:
    standard = dict(processes=2, devices=2, local_devices=1, platform="gpu", expect_processes=None, expect_devices=None)
    problems = count_problems(resolved, environment=environment, **(standard | values))  # type: ignore[arg-type]
    return "\n".join(map(str, problems))


def test_unexpected_counts_are_reported_with_their_cause() -> None:
    task = ClusterInfo("slurm", None, 2, 0, (0,), "slurm")
    assert not problem_text(task, {}, expect_processes=2, expect_devices=2)
    message = problem_text(task, {"SLURM_GPUS_ON_NODE": "8"}, expect_devices=16)
    assert "found 2 of platform gpu" in message and "expected 16" in message and "--ntasks-per-node=8" in message
    alone = problem_text(ClusterInfo("single", None, 1, 0), {}, processes=1, devices=1, expect_processes=4)
    assert "found 1 (single), expected 4" in alone and "JAX_NUM_PROCESSES" in alone
    on_cpu = problem_text(task, {"CUDA_VISIBLE_DEVICES": "0,1"}, platform="cpu", expect_devices=4)
    assert "jax does not use the 2 GPUs of this host" in on_cpu


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def rendezvous_of(*processes: tuple[int, int], seconds: float) -> dict[int, str]:
    """Run a rendezvous of threads with (index, count); return "connected" or the error of each, by position."""
    port = free_port()
    results: dict[int, str] = {}

    def connect(position: int, index: int, count: int) -> None:
        try:
            rendezvous(
                f"127.0.0.1:{port}", index, count, seconds, {"JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
            )
            results[position] = "connected"
        except (RendezvousError, UserError) as error:
            results[position] = str(error)

    threads = [
        threading.Thread(target=connect, args=(position, *process)) for position, process in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The port must be free again for jax's service.
    socket.create_server(("127.0.0.1", port)).close()
    return results


def test_all_processes_connect() -> None:
    assert set(rendezvous_of((2, 3), (1, 3), (0, 3), seconds=20).values()) == {"connected"}


def test_every_process_reports_the_missing_ones() -> None:
    results = rendezvous_of((0, 5), (2, 5), (4, 5), seconds=0.8)
    assert len(results) == 3
    for message in results.values():
        assert "these processes had not connected: 1, 3." in message


def test_duplicate_indices_and_different_counts_are_refused() -> None:
    twice = rendezvous_of((0, 4), (1, 4), (1, 4), seconds=2)
    assert all("two processes with index 1" in message for message in twice.values())
    counts = rendezvous_of((0, 3), (1, 2), seconds=2)
    assert all("process 1 has a process count of 2, process 0 of 3" in message for message in counts.values())


def test_unreachable_coordinator_is_named() -> None:
    results = rendezvous_of((1, 2), seconds=0.5)
    assert "could not connect to process 0 at 127.0.0.1" in results[0] and "Connection refused" in results[0]
