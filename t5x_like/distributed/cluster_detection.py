"""Cluster detection: the launcher of this process and its rank, resolved from flags and environment variables.

The first of these sources that is present decides, and is printed; an incomplete source is refused:

1. flags: --coordinator, --num-processes and --process-id
2. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
3. SkyPilot: SKYPILOT_NODE_IPS, SKYPILOT_NUM_NODES and SKYPILOT_NODE_RANK
4. torchrun's names: MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK
5. jax's own detection: Open MPI, SLURM, TPU VMs of Compute Engine and of GKE, Kubernetes
6. a single process

The functions are pure: they use neither jax nor the network.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import get_args

from t5x_like.distributed.flags import DistributedFlags, Launcher
from t5x_like.errors import ConfigError, ConfigProblem

DEFAULT_PORT = 8476
"""Port of the coordinator if the launcher gives only a host; JAX_COORDINATOR_PORT overrides it."""

Environment = Mapping[str, str]
_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SKYPILOT = ("SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK")
_TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_RUN_ALONE = "or use --launcher single to run this process alone"


@dataclasses.dataclass(frozen=True)
class ClusterInfo:
    """Facts known before the processes connect.

    Attributes:
      launcher: Name of the launcher.
      coordinator: "host:port" of process 0; None if jax detects it.
      process_count: Number of processes; None if jax detects it.
      process_index: Index of this process; None if jax detects it.
      local_device_ids: GPUs of this process among those that it can see; None for all.
      detection: jax's own detection method to use; None for any that applies.
      hosts: Number of hosts that are known to take part; None if unknown.
    """

    launcher: Launcher
    coordinator: str | None = None
    process_count: int | None = None
    process_index: int | None = None
    local_device_ids: tuple[int, ...] | None = None
    detection: str | None = None
    hosts: int | None = None

    @property
    def is_single(self) -> bool:
        """True if there are no other processes."""
        return self.launcher == "single" or self.process_count == 1


def detect_cluster(flags: DistributedFlags, environment: Environment, *, on_tpu_vm: bool = False) -> ClusterInfo:
    """Detect the launcher and the rank of this process.

    Args:
      flags: Flags of the command line.
      environment: Environment variables, as in `os.environ`.
      on_tpu_vm: Whether jax considers this machine a TPU VM.

    Raises:
      ConfigError: The settings of a launcher are incomplete or inconsistent.
    """
    info = _first_source(flags, environment, on_tpu_vm)
    local = flags.local_device_ids or _explicit_devices(environment) or info.local_device_ids
    info = dataclasses.replace(info, local_device_ids=local, hosts=known_hosts(environment))
    _require_consistent(info)
    return info


def _first_source(flags: DistributedFlags, environment: Environment, on_tpu_vm: bool) -> ClusterInfo:
    wanted = flags.launcher
    if wanted == "single":
        return ClusterInfo("single", process_count=1, process_index=0)
    given = {
        "--coordinator": flags.coordinator,
        "--num-processes": flags.num_processes,
        "--process-id": flags.process_id,
    }
    if wanted in ("auto", "flags") and _is_complete(given, "the flags", required=wanted == "flags"):
        return ClusterInfo("flags", flags.coordinator, flags.num_processes, flags.process_id)
    if wanted in ("auto", "jax") and _is_complete(
        _values(environment, _JAX), "jax's variables", required=wanted == "jax"
    ):
        count, index = (_number(environment, name) for name in _JAX[1:])
        return ClusterInfo("jax", environment[_JAX[0]], count, index)
    for name, names, read in (("skypilot", _SKYPILOT, _skypilot), ("torchrun", _TORCHRUN, _torchrun)):
        variables = f"{name}'s variables"
        if wanted in ("auto", name) and _is_complete(_values(environment, names), variables, required=wanted == name):
            return read(environment)
    if wanted not in ("auto", "ompi", "slurm", "gcetpu", "gketpu", "kubernetes"):
        raise ConfigError([ConfigProblem("--launcher", wanted, f"one of {', '.join(get_args(Launcher))}")])
    return _detected_by_jax(wanted, environment, on_tpu_vm)


def _detected_by_jax(wanted: str, environment: Environment, on_tpu_vm: bool) -> ClusterInfo:
    """Detect the launchers that jax supports, in its order, with the rank if the environment gives it."""
    if "OMPI_MCA_orte_hnp_uri" in environment and wanted in ("auto", "ompi"):
        count, index, local = (
            _number(environment, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK", "LOCAL_RANK")
        )
        on_host = _number_or(environment, "OMPI_COMM_WORLD_LOCAL_SIZE", count)
        ids = _own_devices(_visible_gpus(environment), on_host, local, "Open MPI")
        return ClusterInfo("ompi", None, count, index, ids, "ompi")
    if all(name in environment for name in _SLURM) and wanted in ("auto", "slurm"):
        return _slurm(environment)
    if wanted in ("auto", "slurm") and _number_or(environment, "SLURM_NTASKS", 1) > 1:
        missing = ", ".join(name for name in _SLURM if name not in environment)
        raise ConfigError(
            [
                ConfigProblem(
                    "SLURM",
                    f"an allocation of {environment['SLURM_NTASKS']} tasks without {missing}",
                    "a task of a job step",
                    f"start the command with `srun`, {_RUN_ALONE}",
                )
            ]
        )
    names_hosts = "TPU_PROCESS_ADDRESSES" in environment or "TPU_WORKER_HOSTNAMES" in environment
    skips_metadata = "TPU_SKIP_MDS_QUERY" in environment
    if on_tpu_vm and not skips_metadata and wanted in ("auto", "gcetpu"):
        # If the metadata server gives no worker number, jax itself continues with GKE's variables.
        return ClusterInfo("gketpu" if "KUBERNETES_SERVICE_HOST" in environment else "gcetpu")
    if on_tpu_vm and names_hosts and wanted in ("auto", "gketpu"):
        return ClusterInfo("gketpu", detection="gketpu")
    # A pod that is not a worker of an indexed job runs alone.
    is_worker = "JOB_COMPLETION_INDEX" in environment or wanted == "kubernetes"
    if "KUBERNETES_SERVICE_HOST" in environment and is_worker and not on_tpu_vm:
        return ClusterInfo("kubernetes")
    if wanted != "auto":
        raise ConfigError(
            [
                ConfigProblem(
                    "--launcher", wanted, "the environment variables of this launcher", _RUN_ALONE.removeprefix("or ")
                )
            ]
        )
    return ClusterInfo("single", process_count=1, process_index=0)


def _skypilot(environment: Environment) -> ClusterInfo:
    """Read SkyPilot's variables: one process per node, with all of its devices."""
    count, index = (_number(environment, name) for name in _SKYPILOT[1:])
    addresses = environment["SKYPILOT_NODE_IPS"].split()
    if len(addresses) != count:
        found = f"{len(addresses)} addresses for SKYPILOT_NUM_NODES={count}"
        raise ConfigError([ConfigProblem("SKYPILOT_NODE_IPS", found, "one address for each node")])
    return ClusterInfo("skypilot", _with_port(addresses[0], _port(environment)), count, index)


def _torchrun(environment: Environment) -> ClusterInfo:
    """Read torchrun's variables."""
    count, index = _number(environment, "WORLD_SIZE"), _number(environment, "RANK")
    # torchrun's own store listens on MASTER_PORT; launchers that only set its variables leave the port free.
    port = _number(environment, "MASTER_PORT") + ("TORCHELASTIC_RUN_ID" in environment)
    ids = None
    if "LOCAL_RANK" in environment:
        local, on_host = _number(environment, "LOCAL_RANK"), _number_or(environment, "LOCAL_WORLD_SIZE", count)
        gpus = _visible_gpus(environment)
        # If the number of GPUs is unknown, several processes on a host have one each.
        ids = _own_devices(gpus, on_host, local, "torchrun") if gpus else (local,) if on_host > 1 else None
    return ClusterInfo("torchrun", _with_port(environment["MASTER_ADDR"], _port(environment, port)), count, index, ids)


def _slurm(environment: Environment) -> ClusterInfo:
    """Read SLURM's variables.

    jax gives a task the one GPU with its local index, even if it owns more; this gives it all GPUs that it owns.
    """
    count, index, local = (_number(environment, name) for name in _SLURM[2:])
    own = "SLURM_GPUS_PER_TASK" in environment or "SLURM_TRES_PER_TASK" in environment
    gpus = None if own and "CUDA_VISIBLE_DEVICES" not in environment else _visible_gpus(environment)
    on_node = 1 if own else _tasks_on_node(environment, count)
    ids = _own_devices(gpus, on_node, 0 if own else local, "SLURM")
    return ClusterInfo("slurm", None, count, index, ids, "slurm")


def _tasks_on_node(environment: Environment, count: int) -> int:
    """Return the tasks of the step on this node; SLURM writes "2(x3),1" for three nodes with two tasks and one with
    one.
    """
    if "SLURM_STEP_TASKS_PER_NODE" not in environment:
        return _number_or(environment, "SLURM_NTASKS_PER_NODE", count)
    tasks: list[int] = []
    for number, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"]):
        tasks += [int(number)] * int(repeats or 1)
    return tasks[int(environment.get("SLURM_NODEID", "0"))]


def _visible_gpus(environment: Environment) -> int | None:
    """Return the number of GPUs that a process on this host can see; None if no variable gives it."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return len([name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()])
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    return int(on_node) if on_node.isdecimal() else None


def _own_devices(gpus: int | None, on_host: int, local: int, launcher: str) -> tuple[int, ...] | None:
    """Return the GPUs of process `local` of the `on_host` processes on a host, which all see the same `gpus` GPUs.

    Raises:
      ConfigError: The GPUs cannot be divided evenly.
    """
    if not gpus:
        return None
    if gpus == 1:
        # The launcher hides the GPUs of other processes.
        return (0,)
    if on_host < 1 or gpus % on_host:
        raise ConfigError(
            [
                ConfigProblem(
                    launcher,
                    f"{on_host} processes on this host with {gpus} visible GPUs",
                    "a number of processes that divides the number of GPUs",
                    f"start one process per GPU (SLURM: --ntasks-per-node={gpus}) or one for all of them, or assign "
                    "the GPUs with JAX_LOCAL_DEVICE_IDS",
                )
            ]
        )
    each = gpus // on_host
    return tuple(range(local * each, (local + 1) * each))


def known_hosts(environment: Environment) -> int | None:
    """Return the number of hosts that take part; None if no variable gives it."""
    counts = []
    for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SKYPILOT_NUM_NODES"):
        if environment.get(name, "").isdecimal():
            counts.append(int(environment[name]))
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if environment.get(name):
            counts.append(len(environment[name].split(",")))
    world, local = environment.get("WORLD_SIZE", ""), environment.get("LOCAL_WORLD_SIZE", "")
    if world.isdecimal() and local.isdecimal() and int(local) > 0:
        counts.append(-(-int(world) // int(local)))
    return max(counts, default=None)


def is_loopback(address: str) -> bool:
    """Return whether "host:port" can be reached from its own host only."""
    host = address.rpartition(":")[0].strip("[]").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def count_problems(
    info: ClusterInfo,
    *,
    processes: int,
    devices: int,
    local_devices: int,
    platform: str,
    expect_processes: int | None,
    expect_devices: int | None,
    environment: Environment,
) -> list[ConfigProblem]:
    """Return the problems with the numbers of connected processes and devices, with their likely causes.

    Args:
      info: The detected cluster.
      processes: Number of processes, counted by jax.
      devices: Number of devices, counted by jax.
      local_devices: Number of devices of this process, counted by jax.
      platform: Platform of jax's devices.
      expect_processes: Expected number of processes; None for any.
      expect_devices: Number of devices that the user or the recipe's mesh expects; None for any.
      environment: Environment variables.
    """
    problems = []
    if expect_processes is not None and processes != expect_processes:
        fix = "start all processes, or change the expected number"
        if info.launcher == "single":
            fix = (
                "neither flags nor environment variables name other processes: start with `t5x-like launch`, srun or "
                f"torchrun, or set {', '.join(_JAX)}"
            )
        problems.append(ConfigProblem("processes", f"{processes} ({info.launcher})", str(expect_processes), fix))
    if expect_devices is not None and devices != expect_devices:
        problems.append(
            ConfigProblem(
                "devices",
                f"{devices} of platform {platform}, {local_devices} of them in process {info.process_index or 0}",
                str(expect_devices),
                _device_count_fix(info, local_devices, platform, environment),
            )
        )
    return problems


def _device_count_fix(info: ClusterInfo, local_devices: int, platform: str, environment: Environment) -> str:
    gpus = _visible_gpus(environment)
    if platform == "cpu" and gpus:
        return f"jax does not use the {gpus} GPUs of this host: install its cuda extra (JAX_PLATFORMS must not be cpu)"
    if gpus and local_devices < gpus and info.local_device_ids is not None:
        ids = ",".join(map(str, info.local_device_ids))
        if info.launcher == "slurm":
            return (
                f"SLURM started {info.process_count} tasks, and this one has the GPUs {ids} of {gpus}: use "
                f"--ntasks-per-node={gpus}, or set JAX_LOCAL_DEVICE_IDS"
            )
        return f"this process is set to use only the GPUs {ids} of {gpus}"
    if info.launcher == "single":
        return "this process runs alone: start the others too, or change the degrees of sharding"
    return "change the degrees of sharding, or add the missing devices"


def _values(environment: Environment, names: Sequence[str]) -> dict[str, str | None]:
    return {name: environment.get(name) or None for name in names}


def _is_complete(given: Mapping[str, object | None], what: str, *, required: bool) -> bool:
    """Return True if all names have a value, and False if none has one and they are not required.

    Raises:
      ConfigError: Some names have a value and some do not, or none has one but they are required.
    """
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        return True
    if len(missing) == len(given) and not required:
        return False
    present = [f"{name}={value}" for name, value in given.items() if value is not None]
    fix = f"set {' and '.join(missing)} too, or none of them, {_RUN_ALONE}"
    raise ConfigError(
        [ConfigProblem(what, " and ".join(present) or "none of them", f"{', '.join(missing)} as well", fix)]
    )


def _number(environment: Environment, name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ConfigError([ConfigProblem(name, repr(text), "a non-negative integer")])
    return int(text)


def _number_or(environment: Environment, name: str, default: int) -> int:
    return _number(environment, name) if name in environment else default


def _port(environment: Environment, default: int = DEFAULT_PORT) -> int:
    return _number_or(environment, "JAX_COORDINATOR_PORT", default)


def _with_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _explicit_devices(environment: Environment) -> tuple[int, ...] | None:
    text = environment.get("JAX_LOCAL_DEVICE_IDS", "")
    if not text:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ConfigError([ConfigProblem("JAX_LOCAL_DEVICE_IDS", repr(text), "comma-separated integers, such as 0,1")])
    return tuple(map(int, text.split(",")))


def _require_consistent(info: ClusterInfo) -> None:
    count, index = info.process_count, info.process_index
    if count is not None and index is not None and not 0 <= index < count:
        raise ConfigError([ConfigProblem("process id", f"{index} of {count} processes", f"0 to {count - 1}")])
    address = info.coordinator
    if address is None or info.is_single:
        return
    matched = re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):(\d{1,5})", address)
    if matched is None or not 0 < int(matched[2]) < 2**16:
        raise ConfigError([ConfigProblem("coordinator", repr(address), "HOST:PORT, such as 10.0.0.1:8476")])
    if (info.hosts or 1) > 1 and is_loopback(address):
        fix = "give the address of process 0's host in the network"
        found = f"{address}, which on each of the {info.hosts} hosts is that host itself"
        raise ConfigError([ConfigProblem("coordinator", found, "an address that all hosts can reach", fix)])
