"""Local launcher: several processes of one command on this machine, as if each had its own machine.

If one process fails the others are terminated, and all are started again after an exit code with which the same command
resumes. Signals are forwarded to each of them, and if the launcher itself is killed the kernel kills them (on Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import glob
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from t5x_like.distributed.cluster_detection import DEFAULT_PORT
from t5x_like.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_TERMINATED, RESTART_CODES, UserError
from t5x_like.launching.job import Job
from t5x_like.launching.restart_loop import KILL_SECONDS, RestartLoop, forwarded_signals, is_ending, process_state
from t5x_like.utils.sanitize import say

EXIT_GRACE_SECONDS = 10.0
"""Time for the other processes to exit by themselves after one has failed, with their own messages."""
RESUMABLE_EXIT_GRACE_SECONDS = 120.0
"""The same after a process has stopped on request, when the others may still be saving."""
RESTART_DELAY_SECONDS = 1.0
"""Delay before the first restart. All processes have ended by then."""
_PR_SET_PDEATHSIG = 1
_HOST = "127.0.0.1"


def launch_local(
    command: Sequence[str],
    *,
    processes: int,
    devices_per_process: int | None = None,
    log_dir: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    max_restarts: int = Job.max_restarts,
    restart_codes: Sequence[int] = RESTART_CODES,
) -> int:
    """Run `command` in several processes that form one job, and wait for their end.

    Their output is printed line by line, prefixed with the index of the process.

    Args:
      command: Program and arguments.
      processes: Number of processes.
      devices_per_process: GPUs per process, or simulated CPU devices without GPUs. None: the devices that jax finds,
        which is correct only for a single process or for CPUs.
      log_dir: Directory for the output of process N, process.N.txt.
      environment: Environment variables of the processes, to which those of the job are added.
      max_restarts: Maximum number of restarts of all processes. A signal to the launcher ends them without a restart.
      restart_codes: Exit codes after which all processes are started again.

    Returns:
      0 if all processes succeed; otherwise the exit code of the first that fails, 128 + the signal's number if a signal
      ended it. If a process cannot be ended, there is no restart here, and the code is EXIT_RESUMABLE unless another
      process has failed before.

    Raises:
      UserError: The log directory cannot be created; nothing was started.
    """
    if log_dir is not None:
        _create(log_dir)
    restarts = RestartLoop(
        max_restarts=max_restarts, restart_codes=restart_codes, seconds=RESTART_DELAY_SECONDS, report=_report
    )
    group = _ProcessGroup(log_dir)

    def once() -> int:
        nonlocal group
        group = _ProcessGroup(log_dir)
        port = _free_port()
        try:
            for index in range(processes):
                if restarts.is_stopped:
                    break
                variables = process_environment(index, processes, port, devices_per_process, environment)
                group.start(command, index, {**environment, **variables})
            code = group.wait()
            if group.has_given_up:
                restarts.stop()
            return code
        finally:
            group.kill()

    def forward(number: int) -> None:
        restarts.stop()
        group.signal(number)

    with forwarded_signals(forward):
        return restarts.run(once)


def process_environment(
    index: int, processes: int, port: int, devices_per_process: int | None, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment variables that identify a process of the job."""
    variables = {
        "JAX_COORDINATOR_ADDRESS": f"{_HOST}:{port}",
        # By default jax listens on all addresses of the machine; the job needs only loopback.
        "JAX_COORDINATOR_BIND_ADDRESS": f"{_HOST}:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }
    if any(name in environment for name in ("http_proxy", "https_proxy", "grpc_proxy")):
        # gRPC must not use a proxy between processes of this machine.
        variables["no_proxy"] = ",".join(filter(None, [environment.get("no_proxy", ""), _HOST, "localhost"]))
    if devices_per_process is None:
        return variables
    if environment.get("JAX_PLATFORMS", "") != "cpu" and glob.glob("/dev/nvidia[0-9]*"):
        first = index * devices_per_process
        ids = range(first, first + devices_per_process)
        return {**variables, "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, ids))}
    return {**variables, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices_per_process)}


def describe(command: Sequence[str], processes: int, devices_per_process: int | None) -> str:
    """Return the commands of `launch_local` as shell lines; the real port is chosen at each start."""
    lines = []
    for index in range(processes):
        variables = process_environment(index, processes, DEFAULT_PORT, devices_per_process, {})
        assignments = [f"{name}={shlex.quote(value)}" for name, value in variables.items() if name.startswith("JAX_")]
        lines.append(" ".join([*assignments, shlex.join(command), "&"]))
    return "\n".join([*lines, "wait"])


class _ProcessGroup:
    """The processes, with a thread for each of their output streams.

    Attributes:
      has_given_up: True if a process does not end although it was killed.
    """

    def __init__(self, log_dir: Path | None):
        self._log_dir = log_dir
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._print_lock = threading.Lock()
        self.has_given_up = False

    def start(self, command: Sequence[str], index: int, environment: Mapping[str, str]) -> None:
        process = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            # Ctrl-C in a terminal reaches only the launcher, which forwards it once.
            start_new_session=True,
            preexec_fn=_kill_with_parent(os.getpid()),
        )
        self._processes.append(process)
        log = None
        if self._log_dir is not None:
            log = (self._log_dir / f"process.{index}.txt").open("ab")
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            self._thread(self._copy, index, source, target, log)
        self._thread(self._reap, index, process)

    def _thread(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _copy(self, index: int, source: IO[bytes], target: Any, log: IO[bytes] | None) -> None:
        for line in source:
            text = line.decode("utf-8", errors="replace").rstrip("\n")
            with self._print_lock:
                if log is not None:
                    log.write(line)
                    log.flush()
                with contextlib.suppress(OSError, ValueError):
                    say(f"[{index}] {text}", file=target, flush=True)

    def _reap(self, index: int, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._ended.put(index)

    def wait(self) -> int:
        """Wait until all processes have ended; terminate the others some time after the first failure."""
        left = set(range(len(self._processes)))
        first: int | None = None
        deadline = given_up_at = float("inf")
        half_ended: dict[int, float] = {}
        while left and time.monotonic() < given_up_at:
            try:
                index = self._ended.get(timeout=min(max(deadline - time.monotonic(), 0.0), 0.5))
            except queue.Empty:
                if time.monotonic() > deadline:
                    after = "" if first is None else f" after {_exit_text(self._code(first))}"
                    self._report(f"killing {_processes(left)}, still running{after}")
                    self.kill()
                    deadline, given_up_at = float("inf"), time.monotonic() + KILL_SECONDS
                elif first is not None:
                    # A process that was stopped (SIGSTOP) does not save.
                    self.kill(only_stopped=True)
                half_ended = {
                    index: half_ended.get(index, time.monotonic())
                    for index in left
                    if is_ending(self._processes[index].pid)
                }
                is_killed = given_up_at < float("inf")
                if half_ended and not is_killed and time.monotonic() > min(half_ended.values()) + KILL_SECONDS:
                    deadline = min(deadline, time.monotonic())
                continue
            left.discard(index)
            code = self._code(index)
            if code != EXIT_OK and first is None:
                first = index
                resumable = code == EXIT_RESUMABLE
                deadline = time.monotonic() + (RESUMABLE_EXIT_GRACE_SECONDS if resumable else EXIT_GRACE_SECONDS)
                self._report(f"process {index} ended with {_exit_text(code)}")
        if left:
            self.has_given_up = True
            self._report(
                f"{_processes(left)} cannot be killed: a thread waits in the kernel, usually for a disk that does not "
                "answer; restart this machine, and run the same command again"
            )
            return EXIT_RESUMABLE if first is None else self._code(first)
        for thread in self._threads:
            thread.join(timeout=5.0)
        if not self._processes:
            return EXIT_TERMINATED
        return EXIT_OK if first is None else self._code(first)

    def _code(self, index: int | None) -> int:
        code = 0 if index is None else self._processes[index].returncode
        return 128 - code if code < 0 else code

    def signal(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    def kill(self, *, only_stopped: bool = False) -> None:
        """Kill the remaining processes, or only those that a signal has stopped, and all processes of theirs."""
        for process in self._processes:
            if process.poll() is None and (not only_stopped or process_state(process.pid) in ("T", "t")):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _report(self, text: str) -> None:
        with self._print_lock:
            _report(text)


def _report(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        say(f"t5x-like launch: {text}", file=sys.stderr, flush=True)


def _create(log_dir: Path) -> None:
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--log-dir {log_dir}: cannot be created: {error.strerror or error}") from None


def _processes(indices: set[int]) -> str:
    return f"process {min(indices)}" if len(indices) == 1 else f"processes {', '.join(map(str, sorted(indices)))}"


def _exit_text(code: int) -> str:
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"exit code {code} ({signal.Signals(code - 128).name})"
    return f"exit code {code}"


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _kill_with_parent(parent: int) -> Callable[[], None] | None:
    """Return a function for a new process that makes Linux kill it with its parent; None on other systems."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None, use_errno=True)

    def request() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # The parent has exited in between.
            os._exit(128 + signal.SIGKILL)

    return request


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m t5x_like.launching.local -n 2 -- COMMAND ...` and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m t5x_like.launching.local", description=__doc__)
    parser.add_argument("-n", "--processes", type=int, required=True, metavar="N")
    parser.add_argument(
        "--devices-per-process", type=int, metavar="N", help="GPUs per process, or CPU devices without GPUs"
    )
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="directory for the output of process N, process.N.txt"
    )
    parser.add_argument("--max-restarts", type=int, default=Job.max_restarts, metavar="N")
    parser.add_argument("--restart-on", type=int, nargs="*", default=list(RESTART_CODES), metavar="CODE")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args(argv)
    return launch_local(
        options.command,
        processes=options.processes,
        devices_per_process=options.devices_per_process,
        log_dir=options.log_dir,
        max_restarts=options.max_restarts,
        restart_codes=options.restart_on,
    )


if __name__ == "__main__":
    sys.exit(main())
