"""Who has started this process, and which of how many it is: one resolver over flags and environment variables.

The first of these that is there decides, and is printed; a half of it is refused:

1. flags: --coordinator, --num-processes and --process-id
2. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
3. SkyPilot: SKYPILOT_NODE_IPS, SKYPILOT_NUM_NODES and SKYPILOT_NODE_RANK
4. torchrun's names: MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK
5. what jax detects itself: Open MPI, SLURM, TPU VMs of Compute Engine and of GKE, Kubernetes
6. a single process

Pure functions: neither jax nor the network is asked.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import get_args

from t5x_like.config import ConfigError, Problem
from t5x_like.config.processes import Launcher, ProcessFlags

DEFAULT_PORT = 8476
"""Of the coordinator where the launcher names a host only; JAX_COORDINATOR_PORT is another."""

Environment = Mapping[str, str]
_OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SKYPILOT = ("SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK")
_TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_GO_ALONE = "or --launcher single for a process of its own"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """What is known before processes meet.

    Attributes:
      launcher: Which of the names in `Launcher`.
      coordinator: "host:port" of process 0; None where jax finds it.
      process_count, process_index: None where jax finds them.
      local_device_ids: The GPUs of this process, of those it can see; None for all.
      detection: Of jax's own methods the one to use; None for those of `jax.distributed.initialize` that apply.
      hosts: Machines that are known to take part; None where nothing says.
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
        """Whether there is nobody to meet."""
        return self.launcher == "single" or self.process_count == 1


def resolve(flags: ProcessFlags, environment: Environment, *, on_tpu_vm: bool = False) -> Resolved:
    """Finds out which process of which launch this is.

    Args:
      flags: From the command line.
      environment: As in `os.environ`.
      on_tpu_vm: Whether jax has found that this machine is a TPU VM.

    Raises:
      ConfigError: a half of what a launcher sets, or what cannot be right.
    """
    found = _first(flags, environment, on_tpu_vm)
    local = flags.local_device_ids or _stated_devices(environment) or found.local_device_ids
    found = dataclasses.replace(found, local_device_ids=local, hosts=known_hosts(environment))
    _require_sensible(found)
    return found


def _first(flags: ProcessFlags, environment: Environment, on_tpu_vm: bool) -> Resolved:
    wanted = flags.launcher
    if wanted == "single":
        return Resolved("single", process_count=1, process_index=0)
    given = {
        "--coordinator": flags.coordinator,
        "--num-processes": flags.num_processes,
        "--process-id": flags.process_id,
    }
    if wanted in ("auto", "flags") and _whole(given, "the flags", forced=wanted == "flags"):
        return Resolved("flags", flags.coordinator, flags.num_processes, flags.process_id)
    if wanted in ("auto", "jax") and _whole(_of(environment, _OURS), "jax's variables", forced=wanted == "jax"):
        count, index = (_number(environment, name) for name in _OURS[1:])
        return Resolved("jax", environment[_OURS[0]], count, index)
    for name, names, read in (("skypilot", _SKYPILOT, _skypilot), ("torchrun", _TORCHRUN, _torchrun)):
        if wanted in ("auto", name) and _whole(_of(environment, names), f"{name}'s variables", forced=wanted == name):
            return read(environment)
    if wanted not in ("auto", "ompi", "slurm", "gcetpu", "gketpu", "kubernetes"):
        raise ConfigError([Problem("--launcher", wanted, f"one of {', '.join(get_args(Launcher))}")])
    return _detected_by_jax(wanted, environment, on_tpu_vm)


def _detected_by_jax(wanted: str, environment: Environment, on_tpu_vm: bool) -> Resolved:
    """In the order in which jax asks. Which process this is is said where the environment says it."""
    if "OMPI_MCA_orte_hnp_uri" in environment and wanted in ("auto", "ompi"):
        count, index, local = (
            _number(environment, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK", "LOCAL_RANK")
        )
        on_host = _number_or(environment, "OMPI_COMM_WORLD_LOCAL_SIZE", count)
        ids = _own_devices(_visible_gpus(environment), on_host, local, "Open MPI")
        return Resolved("ompi", None, count, index, ids, "ompi")
    if all(name in environment for name in _SLURM) and wanted in ("auto", "slurm"):
        return _slurm(environment)
    if wanted in ("auto", "slurm") and _number_or(environment, "SLURM_NTASKS", 1) > 1:
        missing = ", ".join(name for name in _SLURM if name not in environment)
        raise ConfigError(
            [
                Problem(
                    "SLURM",
                    f"an allocation of {environment['SLURM_NTASKS']} tasks, and not {missing}",
                    "a task of a step",
                    f"start the command by `srun`, {_GO_ALONE}",
                )
            ]
        )
    names_hosts = "TPU_PROCESS_ADDRESSES" in environment or "TPU_WORKER_HOSTNAMES" in environment
    skips_metadata = "TPU_SKIP_MDS_QUERY" in environment
    if on_tpu_vm and not skips_metadata and wanted in ("auto", "gcetpu"):
        # Where the metadata know no worker number, jax goes on to GKE's variables by itself.
        return Resolved("gketpu" if "KUBERNETES_SERVICE_HOST" in environment else "gcetpu")
    if on_tpu_vm and names_hosts and wanted in ("auto", "gketpu"):
        return Resolved("gketpu", detection="gketpu")
    # A pod that is no worker of an indexed job is a process of its own.
    is_worker = "JOB_COMPLETION_INDEX" in environment or wanted == "kubernetes"
    if "KUBERNETES_SERVICE_HOST" in environment and is_worker and not on_tpu_vm:
        return Resolved("kubernetes")
    if wanted != "auto":
        raise ConfigError([Problem("--launcher", wanted, "its environment, which is not here", _GO_ALONE[3:])])
    return Resolved("single", process_count=1, process_index=0)


def _skypilot(environment: Environment) -> Resolved:
    """One process per node, with all of its devices."""
    count, index = (_number(environment, name) for name in _SKYPILOT[1:])
    addresses = environment["SKYPILOT_NODE_IPS"].split()
    if len(addresses) != count:
        found = f"{len(addresses)} addresses for SKYPILOT_NUM_NODES={count}"
        raise ConfigError([Problem("SKYPILOT_NODE_IPS", found, "one address for each node")])
    return Resolved("skypilot", _with_port(addresses[0], _port(environment)), count, index)


def _torchrun(environment: Environment) -> Resolved:
    count, index = _number(environment, "WORLD_SIZE"), _number(environment, "RANK")
    # torchrun's own store listens on MASTER_PORT; launchers that only use its names leave the port free.
    port = _number(environment, "MASTER_PORT") + ("TORCHELASTIC_RUN_ID" in environment)
    ids = None
    if "LOCAL_RANK" in environment:
        local, on_host = _number(environment, "LOCAL_RANK"), _number_or(environment, "LOCAL_WORLD_SIZE", count)
        gpus = _visible_gpus(environment)
        # Where nothing says how many GPUs there are: several processes on a host have one each.
        ids = _own_devices(gpus, on_host, local, "torchrun") if gpus else (local,) if on_host > 1 else None
    return Resolved("torchrun", _with_port(environment["MASTER_ADDR"], _port(environment, port)), count, index, ids)


def _slurm(environment: Environment) -> Resolved:
    """jax gives a task the one GPU of its number on the node, whatever else it owns; this gives it all of its own."""
    count, index, local = (_number(environment, name) for name in _SLURM[2:])
    own = "SLURM_GPUS_PER_TASK" in environment or "SLURM_TRES_PER_TASK" in environment
    gpus = None if own and "CUDA_VISIBLE_DEVICES" not in environment else _visible_gpus(environment)
    on_node = 1 if own else _tasks_on_node(environment, count)
    ids = _own_devices(gpus, on_node, 0 if own else local, "SLURM")
    return Resolved("slurm", None, count, index, ids, "slurm")


def _tasks_on_node(environment: Environment, count: int) -> int:
    """Tasks of the step on this node, as SLURM writes them: "2(x3),1" is three nodes with two tasks, and one."""
    if "SLURM_STEP_TASKS_PER_NODE" not in environment:
        return _number_or(environment, "SLURM_NTASKS_PER_NODE", count)
    tasks: list[int] = []
    for number, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"]):
        tasks += [int(number)] * int(repeats or 1)
    return tasks[int(environment.get("SLURM_NODEID", "0"))]


def _visible_gpus(environment: Environment) -> int | None:
    """How many GPUs a process here can see, as far as variables say it."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return len([name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()])
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    return int(on_node) if on_node.isdecimal() else None


def _own_devices(gpus: int | None, on_host: int, local: int, launcher: str) -> tuple[int, ...] | None:
    """The GPUs of the process number `local` of `on_host` processes that see the same `gpus` ones.

    Raises:
      ConfigError: they cannot be shared out.
    """
    if not gpus:
        return None
    if gpus == 1:
        # The launcher has hidden those of the others.
        return (0,)
    if on_host < 1 or gpus % on_host:
        raise ConfigError(
            [
                Problem(
                    launcher,
                    f"{on_host} processes on this host, which see {gpus} GPUs",
                    "as many processes as GPUs, or a divisor of that",
                    f"start one process for each GPU (SLURM: --ntasks-per-node={gpus}) or one for all of them, "
                    "or say which are whose: JAX_LOCAL_DEVICE_IDS",
                )
            ]
        )
    each = gpus // on_host
    return tuple(range(local * each, (local + 1) * each))


def known_hosts(environment: Environment) -> int | None:
    """Machines that take part, as far as any variable says it."""
    found = []
    for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SKYPILOT_NUM_NODES"):
        if environment.get(name, "").isdecimal():
            found.append(int(environment[name]))
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if environment.get(name):
            found.append(len(environment[name].split(",")))
    world, local = environment.get("WORLD_SIZE", ""), environment.get("LOCAL_WORLD_SIZE", "")
    if world.isdecimal() and local.isdecimal() and int(local) > 0:
        found.append(-(-int(world) // int(local)))
    return max(found, default=None)


def is_loopback(address: str) -> bool:
    """Whether "host:port" is reached from its own machine only."""
    host = address.rpartition(":")[0].strip("[]").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def count_problems(
    found: Resolved,
    *,
    processes: int,
    devices: int,
    local_devices: int,
    platform: str,
    expect_processes: int | None,
    expect_devices: int | None,
    environment: Environment,
) -> list[Problem]:
    """What is wrong with how many processes and devices have met, and why.

    Args:
      processes, devices, local_devices: As jax counts them.
      platform: Of jax's devices.
      expect_processes, expect_devices: What the user or the recipe's mesh says; None for anything.
    """
    problems = []
    if expect_processes is not None and processes != expect_processes:
        fix = "start them all, or do not expect them"
        if found.launcher == "single":
            fix = (
                "nothing in the flags or the environment says who else there is: start by `t5x-like launch`, srun or "
                f"torchrun, or set {', '.join(_OURS)}"
            )
        problems.append(Problem("processes", f"{processes} ({found.launcher})", str(expect_processes), fix))
    if expect_devices is not None and devices != expect_devices:
        problems.append(
            Problem(
                "devices",
                f"{devices} of platform {platform}, {local_devices} of them in process {found.process_index or 0}",
                str(expect_devices),
                _why_devices(found, local_devices, platform, environment),
            )
        )
    return problems


def _why_devices(found: Resolved, local_devices: int, platform: str, environment: Environment) -> str:
    gpus = _visible_gpus(environment)
    if platform == "cpu" and gpus:
        return f"jax does not use the {gpus} GPUs here: install its cuda extra (JAX_PLATFORMS must not say cpu)"
    if gpus and local_devices < gpus and found.local_device_ids is not None:
        ids = ",".join(map(str, found.local_device_ids))
        if found.launcher == "slurm":
            return (
                f"SLURM started {found.process_count} tasks, and this one has the GPUs {ids} of {gpus}: use "
                f"--ntasks-per-node={gpus}, or set JAX_LOCAL_DEVICE_IDS"
            )
        return f"this process was told to take the GPUs {ids} of {gpus}"
    if found.launcher == "single":
        return "this is a process of its own: start the others too, or change the degrees of partitioning"
    return "change the degrees of partitioning, or bring the devices that are missing"


def _of(environment: Environment, names: Sequence[str]) -> dict[str, str | None]:
    return {name: environment.get(name) or None for name in names}


def _whole(given: Mapping[str, object | None], what: str, *, forced: bool) -> bool:
    """Whether all of the names are given; False if none is.

    Raises:
      ConfigError: some are.
    """
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        return True
    if len(missing) == len(given) and not forced:
        return False
    there = [f"{name}={value}" for name, value in given.items() if value is not None]
    fix = f"give {' and '.join(missing)} too, or none of them, {_GO_ALONE}"
    raise ConfigError([Problem(what, " and ".join(there) or "none of them", f"{', '.join(missing)} beside it", fix)])


def _number(environment: Environment, name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ConfigError([Problem(name, repr(text), "a number of 0 or more")])
    return int(text)


def _number_or(environment: Environment, name: str, default: int) -> int:
    return _number(environment, name) if name in environment else default


def _port(environment: Environment, default: int = DEFAULT_PORT) -> int:
    return _number_or(environment, "JAX_COORDINATOR_PORT", default)


def _with_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _stated_devices(environment: Environment) -> tuple[int, ...] | None:
    text = environment.get("JAX_LOCAL_DEVICE_IDS", "")
    if not text:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ConfigError([Problem("JAX_LOCAL_DEVICE_IDS", repr(text), "numbers with commas, as in 0,1")])
    return tuple(map(int, text.split(",")))


def _require_sensible(found: Resolved) -> None:
    count, index = found.process_count, found.process_index
    if count is not None and index is not None and not 0 <= index < count:
        where = "process id"
        raise ConfigError([Problem(where, f"{index} of {count} processes", f"0 to {count - 1}")])
    address = found.coordinator
    if address is None or found.is_single:
        return
    matched = re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):(\d{1,5})", address)
    if matched is None or not 0 < int(matched[2]) < 2**16:
        raise ConfigError([Problem("coordinator", repr(address), "HOST:PORT, as in 10.0.0.1:8476")])
    if (found.hosts or 1) > 1 and is_loopback(address):
        fix = "name process 0's host as the others reach it"
        found_there = f"{address}, which each of {found.hosts} hosts takes for itself"
        raise ConfigError([Problem("coordinator", found_there, "an address that all hosts reach", fix)])
