"""Which process of which launch this is: every precedence, every half, and the GPUs that belong to it."""

from __future__ import annotations

import itertools
import socket
import threading

import pytest

from t5x_like.config import ConfigError, UserError
from t5x_like.config.processes import ProcessFlags
from t5x_like.partitioning.launchers import (
    DEFAULT_PORT,
    Resolved,
    count_problems,
    is_loopback,
    known_hosts,
    resolve,
)
from t5x_like.partitioning.roll_call import RollCallError, roll_call

FLAGS = ProcessFlags(coordinator="10.0.0.1:1234", num_processes=4, process_id=3)
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


def found(environment: dict[str, str], flags: ProcessFlags | None = None, *, on_tpu_vm: bool = False) -> Resolved:
    return resolve(flags or ProcessFlags(), environment, on_tpu_vm=on_tpu_vm)


@pytest.mark.parametrize("first, second", list(itertools.combinations(range(len(LAUNCHERS)), 2)))
def test_the_first_launcher_that_is_there_decides(first: int, second: int) -> None:
    environment = LAUNCHERS[second][1] | LAUNCHERS[first][1]
    assert found(environment).launcher == LAUNCHERS[first][0]
    # Each of them can be named, and is then the only one.
    named = ProcessFlags(launcher=LAUNCHERS[second][0])  # type: ignore[arg-type]
    assert found(environment, named).launcher == LAUNCHERS[second][0]


def test_flags_come_before_everything_and_single_behind_it() -> None:
    everything = {name: value for _, environment in LAUNCHERS for name, value in environment.items()}
    resolved = found(everything, FLAGS)
    assert (resolved.launcher, resolved.coordinator) == ("flags", "10.0.0.1:1234")
    assert (resolved.process_index, resolved.process_count) == (3, 4)
    assert found({}).is_single and found({}).launcher == "single"
    assert found(everything, ProcessFlags(launcher="single")).is_single


def test_tpu_machines_stand_between_slurm_and_kubernetes() -> None:
    assert found(GCE_TPU, on_tpu_vm=True) == Resolved("gcetpu")
    gke = found(GKE_TPU | KUBERNETES, on_tpu_vm=True)
    assert (gke.launcher, gke.detection, gke.hosts) == ("gketpu", "gketpu", 2)
    assert found(SLURM, on_tpu_vm=True).launcher == "slurm"
    assert found(GKE_TPU).launcher == "single", "the variables alone make no TPU"


def test_what_each_launcher_says() -> None:
    assert found(JAX) == Resolved("jax", "10.0.0.2:1234", 4, 2)
    assert found(SKYPILOT) == Resolved("skypilot", f"10.0.0.3:{DEFAULT_PORT}", 2, 1, hosts=2)
    assert found(SKYPILOT | {"JAX_COORDINATOR_PORT": "99"}).coordinator == "10.0.0.3:99"
    assert found(TORCHRUN) == Resolved("torchrun", "10.0.0.5:29500", 8, 5)
    # torchrun itself listens on its port; those who only use its names do not.
    assert found(TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}).coordinator == "10.0.0.5:29501"
    assert found(OMPI) == Resolved("ompi", None, 4, 1, None, "ompi")
    assert found(SLURM) == Resolved("slurm", None, 16, 3, None, "slurm")
    assert found(SKYPILOT | {"SKYPILOT_NODE_IPS": "fe80::1 fe80::2"}).coordinator == f"[fe80::1]:{DEFAULT_PORT}"


@pytest.mark.parametrize("name, environment", LAUNCHERS[:3])
def test_every_half_is_refused_with_what_is_missing(name: str, environment: dict[str, str]) -> None:
    for size in range(1, len(environment)):
        for kept in itertools.combinations(environment, size):
            with pytest.raises(ConfigError) as refusal:
                found({variable: environment[variable] for variable in kept})
            message = str(refusal.value)
            missing = message.split("expected ")[1].split(" beside")[0].split(", ")
            assert set(missing) == environment.keys() - set(kept)
            assert all(variable in message.split("expected")[0] for variable in kept)
            # An empty variable is one that is not there.
            with pytest.raises(ConfigError):
                found({variable: environment[variable] if variable in kept else "" for variable in environment})


def test_every_half_of_the_flags_is_refused() -> None:
    whole = {"coordinator": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}
    for size in (1, 2):
        for kept in itertools.combinations(whole, size):
            with pytest.raises(ConfigError) as refusal:
                found(JAX, ProcessFlags(**{name: whole[name] for name in kept}))  # type: ignore[arg-type]
            for name in whole.keys() - set(kept):
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
        # An allocation of many tasks, and a process that was started in it by hand.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, "start the command by `srun`"),
    ],
)
def test_what_cannot_be_right_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        found(environment)
    assert refusal.value.exit_code == 2


def test_a_launcher_that_is_named_has_to_be_there() -> None:
    for name in ("flags", "jax", "skypilot", "torchrun", "ompi", "slurm", "gcetpu", "gketpu", "kubernetes"):
        with pytest.raises(ConfigError):
            found({}, ProcessFlags(launcher=name))  # type: ignore[arg-type]


def test_one_task_or_one_node_is_a_process_of_its_own() -> None:
    one = SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert found(one).is_single
    assert found({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}).is_single
    assert found({"SKYPILOT_NODE_IPS": "::1", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}).is_single
    # In a pod that is no worker of an indexed job, there is nobody to meet.
    assert found({"KUBERNETES_SERVICE_HOST": "10.0.0.9"}).is_single


def slurm(tasks_per_node: str, gpus: str, local: int, node: int = 0, **more: str) -> tuple[int, ...] | None:
    environment = SLURM | {
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
        "SLURM_GPUS_ON_NODE": gpus,
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
    }
    return found(environment | more).local_device_ids


def test_a_slurm_task_gets_the_gpus_that_are_its_own() -> None:
    """jax would give the task number i of a node the GPU number i, and nothing else."""
    assert slurm("8(x2)", "8", local=3) == (3,)
    assert slurm("1(x2)", "8", local=0) == tuple(range(8)), "one task that owns all of them"
    assert slurm("2(x2)", "8", local=1) == (4, 5, 6, 7)
    assert slurm("1,4", "4", local=2, node=1) == (2,)
    assert slurm("1,4", "4", local=0, node=0) == (0, 1, 2, 3)
    # With --gpus-per-task, SLURM hides those of the others: the first that is seen is the task's own.
    assert slurm("8(x2)", "8", local=3, CUDA_VISIBLE_DEVICES="5") == (0,)
    assert slurm("4(x2)", "8", local=3, CUDA_VISIBLE_DEVICES="6,7", SLURM_GPUS_PER_TASK="2") == (0, 1)
    with pytest.raises(ConfigError, match="--ntasks-per-node=8"):
        slurm("3(x2)", "8", local=1)


def test_stated_gpus_come_before_those_of_the_launcher() -> None:
    many = SLURM | {"SLURM_GPUS_ON_NODE": "8"}
    assert found(many | {"JAX_LOCAL_DEVICE_IDS": "6,7"}).local_device_ids == (6, 7)
    assert found(many, ProcessFlags(local_device_ids=(5,))).local_device_ids == (5,)
    local = TORCHRUN | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert found(local).local_device_ids == (1,)
    assert found(local | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}).local_device_ids == (2, 3)
    assert found(local | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}).local_device_ids is None


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:1", "127.0.1.1:1", "[::1]:1"])
def test_loopback_is_refused_where_there_are_several_hosts(address: str) -> None:
    assert is_loopback(address)
    ours = JAX | {"JAX_COORDINATOR_ADDRESS": address}
    assert found(ours).coordinator == address, "on one machine it is right"
    for hosts in ({"SLURM_NNODES": "2"}, {"TPU_WORKER_HOSTNAMES": "a,b"}, {"SKYPILOT_NUM_NODES": "2"}):
        environment = {name: value for name, value in (ours | hosts).items()}
        with pytest.raises(ConfigError, match="which each of 2 hosts takes for itself"):
            found(environment)
    several = TORCHRUN | {"MASTER_ADDR": address.rpartition(":")[0], "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert known_hosts(several) == 2
    with pytest.raises(ConfigError, match="2 hosts"):
        found(several)
    assert not is_loopback("node001:1") and not is_loopback("10.0.0.1:1")


def counted(resolved: Resolved, environment: dict[str, str], **values: object) -> str:
    standard = dict(processes=2, devices=2, local_devices=1, platform="gpu", expect_processes=None, expect_devices=None)
    problems = count_problems(resolved, environment=environment, **(standard | values))  # type: ignore[arg-type]
    return "\n".join(map(str, problems))


def test_counts_that_are_not_the_expected_ones_come_with_their_reason() -> None:
    task = Resolved("slurm", None, 2, 0, (0,), "slurm")
    assert not counted(task, {}, expect_processes=2, expect_devices=2)
    message = counted(task, {"SLURM_GPUS_ON_NODE": "8"}, expect_devices=16)
    assert "found 2 of platform gpu" in message and "expected 16" in message and "--ntasks-per-node=8" in message
    alone = counted(Resolved("single", None, 1, 0), {}, processes=1, devices=1, expect_processes=4)
    assert "found 1 (single), expected 4" in alone and "JAX_NUM_PROCESSES" in alone
    on_cpu = counted(task, {"CUDA_VISIBLE_DEVICES": "0,1"}, platform="cpu", expect_devices=4)
    assert "jax does not use the 2 GPUs here" in on_cpu


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def meet(*who: tuple[int, int], seconds: float) -> dict[int, str]:
    """Calls the roll from threads of (index, count); what each of them says in the end, by place."""
    port = free_port()
    said: dict[int, str] = {}

    def one(place: int, index: int, count: int) -> None:
        try:
            roll_call(f"127.0.0.1:{port}", index, count, seconds, {"JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"})
            said[place] = "there"
        except (RollCallError, UserError) as error:
            said[place] = str(error)

    threads = [threading.Thread(target=one, args=(place, *each)) for place, each in enumerate(who)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The port is free again for the service that is to come.
    socket.create_server(("127.0.0.1", port)).close()
    return said


def test_all_meet() -> None:
    assert set(meet((2, 3), (1, 3), (0, 3), seconds=20).values()) == {"there"}


def test_everybody_is_told_who_is_missing() -> None:
    said = meet((0, 5), (2, 5), (4, 5), seconds=0.8)
    assert len(said) == 3
    for message in said.values():
        assert "these processes had not come: 1, 3." in message


def test_two_of_one_number_and_other_counts_are_refused() -> None:
    twice = meet((0, 4), (1, 4), (1, 4), seconds=2)
    assert all("two processes say that they are number 1" in message for message in twice.values())
    counts = meet((0, 3), (1, 2), seconds=2)
    assert all("process 1 counts 2 processes, process 0 counts 3" in message for message in counts.values())


def test_a_coordinator_that_is_not_there_is_named() -> None:
    said = meet((1, 2), seconds=0.5)
    assert "did not reach process 0 at 127.0.0.1" in said[0] and "Connection refused" in said[0]
