"""SLURM cluster of two nodes on one machine, from Debian's packages.

Each node is a network namespace with its own host name and address, so that its processes see a separate machine.

    apt-get install slurmctld slurmd slurm-client munge
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "munged", "ip", "unshare", "mount")
NODES = ("node1", "node2")
_NETWORK = "10.213.77"


def why_not() -> str | None:
    """Return the reason why no cluster can be started here; None if one can."""
    if os.geteuid() != 0:
        return "a SLURM cluster needs root"
    missing = [program for program in PROGRAMS if _which(program) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge iproute2"
    probe = subprocess.run(["unshare", "--mount", "--net", "--uts", "true"], capture_output=True, text=True)
    return f"no namespaces: {probe.stderr.strip()}" if probe.returncode else None


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """Cluster whose commands run on the first node, as those of a user would."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}
        self.environment["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def run(self, *argv: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, check: bool = True) -> str:
        """Return the output of a command; raise AssertionError with the output if the command fails."""
        result = subprocess.run(
            self.on("node1", argv),
            cwd=cwd,
            env={**self.environment, **(env or {})},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not check or result.returncode == 0, f"{argv}: {result.stdout}{result.stderr}"
        return result.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return the controller's fields of a job, such as `JobState`, `Restarts` and `ExitCode`."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float) -> dict[str, str]:
        """Wait until the job is in one of the states and return its fields."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"after {seconds} seconds: {job}"
            time.sleep(0.5)
        return job

    def on(self, node: str, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs a command on a node."""
        # slurmd reads the control groups; an empty tmpfs hides those of the machine.
        files = f'mount --bind "{self.directory}/hosts" /etc/hosts && mount -t tmpfs none /sys/fs/cgroup'
        enter = f'{files} && hostname {node} && exec "$@"'
        return ["ip", "netns", "exec", _namespace(node), "unshare", "--mount", "--uts", "sh", "-c", enter, "sh", *argv]

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        socket = self.directory / "munge.socket"
        options = [f"--{kind}-file={self.directory}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        # Both nodes use the same munge daemon through its socket file.
        self._daemon("node1", "munged", "--foreground", "--force", f"--socket={socket}", *options)
        _until(socket.exists, 20)
        self._daemon("node1", "slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon(node, "slurmd", "-D", "-N", node)
        _until(lambda: self.run("sinfo", "--noheader", "--format=%T %D", check=False).split() == ["idle", "2"], 40)

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _daemon(self, node: str, *argv: str) -> None:
        log = (self.directory / f"{argv[0]}.{node}.out").open("wb")
        self._daemons.append(subprocess.Popen(self.on(node, argv), stdout=log, stderr=log, env=self.environment))


@contextlib.contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    """Start a cluster with its files in `directory`, which both nodes share."""
    started = Cluster(directory)
    _write_files(directory)
    with contextlib.ExitStack() as stack:
        _connect(stack)
        stack.callback(started.stop)
        started.start()
        yield started


def _namespace(node: str) -> str:
    return f"t5x-like-{node}"


def _connect(stack: contextlib.ExitStack) -> None:
    """Connect the two namespaces with a virtual Ethernet pair."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    for node in NODES:
        subprocess.run(["ip", "netns", "delete", _namespace(node)], capture_output=True)
        ip("netns", "add", _namespace(node))
        stack.callback(subprocess.run, ["ip", "netns", "delete", _namespace(node)], capture_output=True)
    ends = [f"t5x{number}" for number in (1, 2)]
    ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    for number, (node, end) in enumerate(zip(NODES, ends, strict=True), 1):
        namespace = _namespace(node)
        ip("link", "set", end, "netns", namespace)
        ip("-n", namespace, "address", "add", f"{_NETWORK}.{number}/24", "dev", end)
        ip("-n", namespace, "link", "set", end, "up")
        ip("-n", namespace, "link", "set", "lo", "up")


def _write_files(directory: Path) -> None:
    hosts = "".join(f"{_NETWORK}.{number} {node}\n" for number, node in enumerate(NODES, 1))
    (directory / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
    key = directory / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    nodes = "".join(f"NodeName={node} NodeAddr={node} CPUs=2 State=UNKNOWN\n" for node in NODES)
    # A short cred_expire shortens the wait of a requeued job.
    (directory / "slurm.conf").write_text(
        f"""ClusterName=test
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
MinJobAge=600
JobRequeue=1
{nodes}PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition is still false after {seconds} seconds"
        time.sleep(0.2)
