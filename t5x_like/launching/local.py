"""Several processes of one command on this machine, as if each had a machine of its own.

All of them live or none: when one ends badly the others are ended, signals are handed on to each, and when the launcher
itself is killed the kernel ends them (on Linux).
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from t5x_like.config import EXIT_OK, EXIT_RESUMABLE, UserError

FAREWELL_SECONDS = 10.0
"""For which the others may go on when one has failed, to end by themselves with what they know of it."""
RESUMABLE_FAREWELL_SECONDS = 120.0
"""When one has stopped on purpose: the others may still be saving."""
_PR_SET_PDEATHSIG = 1
_HOST = "127.0.0.1"


def launch_local(
    command: Sequence[str],
    *,
    processes: int,
    devices_per_process: int | None = None,
    log_dir: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Runs `command` in so many processes that find each other, and waits for their end.

    What they print comes out line by line, with the number of the process in front.

    Args:
      command: Program and arguments.
      processes: How many.
      devices_per_process: GPUs of each, or simulated CPU devices where there are no GPUs. None: what jax finds, which
        is only right for a single process or for CPUs.
      log_dir: Gets what process N prints, as process.N.txt.
      environment: Of the processes, beside what tells them who they are.

    Returns:
      0 if all have ended well; otherwise the exit code of the first that has not, 128 + the signal's number for one
      that a signal has ended.

    Raises:
      UserError: the logs cannot be written there; nothing was started.
    """
    if log_dir is not None:
        _make(log_dir)
    port = _free_port()
    crew = _Crew(log_dir)
    with _signals_to(crew.signal):
        try:
            for index in range(processes):
                variables = process_environment(index, processes, port, devices_per_process, environment)
                crew.start(command, index, {**environment, **variables})
            return crew.wait()
        finally:
            crew.kill()


def process_environment(
    index: int, processes: int, port: int, devices_per_process: int | None, environment: Mapping[str, str]
) -> dict[str, str]:
    """The variables that tell a process who it is."""
    variables = {
        "JAX_COORDINATOR_ADDRESS": f"{_HOST}:{port}",
        # Nobody else's business: by default jax listens on all of the machine's addresses.
        "JAX_COORDINATOR_BIND_ADDRESS": f"{_HOST}:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }
    if any(name in environment for name in ("http_proxy", "https_proxy", "grpc_proxy")):
        # Not on the way to a process of this machine.
        variables["no_proxy"] = ",".join(filter(None, [environment.get("no_proxy", ""), _HOST, "localhost"]))
    if devices_per_process is None:
        return variables
    if environment.get("JAX_PLATFORMS", "") != "cpu" and glob.glob("/dev/nvidia[0-9]*"):
        first = index * devices_per_process
        ids = range(first, first + devices_per_process)
        return {**variables, "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, ids))}
    return {**variables, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices_per_process)}


def describe(command: Sequence[str], processes: int, devices_per_process: int | None) -> str:
    """What `launch_local` would run, as lines of shell; the port is another one each time."""
    lines = []
    for index in range(processes):
        variables = process_environment(index, processes, 8476, devices_per_process, {})
        shown = [f"{name}={shlex.quote(value)}" for name, value in variables.items() if name.startswith("JAX_")]
        lines.append(" ".join([*shown, shlex.join(command), "&"]))
    return "\n".join([*lines, "wait"])


class _Crew:
    """The processes, and one thread for each stream that they print to."""

    def __init__(self, log_dir: Path | None):
        self._log_dir = log_dir
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._print_lock = threading.Lock()

    def start(self, command: Sequence[str], index: int, environment: Mapping[str, str]) -> None:
        process = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            # Ctrl-C in a terminal reaches the launcher alone, which hands it on once.
            start_new_session=True,
            preexec_fn=_end_with_parent(os.getpid()),
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
                    print(f"[{index}] {text}", file=target, flush=True)

    def _reap(self, index: int, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._ended.put(index)

    def wait(self) -> int:
        """Until all have ended: the others soon after the first that has failed."""
        left = set(range(len(self._processes)))
        first: int | None = None
        deadline = float("inf")
        while left:
            try:
                index = self._ended.get(timeout=min(max(deadline - time.monotonic(), 0.0), 0.5))
            except queue.Empty:
                if time.monotonic() > deadline:
                    self._say(f"ending {_processes(left)}, still there after {_ending(self._code(first))}")
                    self.kill()
                    deadline = float("inf")
                continue
            left.discard(index)
            code = self._code(index)
            if code != EXIT_OK and first is None:
                first = index
                resumable = code == EXIT_RESUMABLE
                deadline = time.monotonic() + (RESUMABLE_FAREWELL_SECONDS if resumable else FAREWELL_SECONDS)
                self._say(f"process {index} ended with {_ending(code)}")
        for thread in self._threads:
            thread.join(timeout=5.0)
        return EXIT_OK if first is None else self._code(first)

    def _code(self, index: int | None) -> int:
        code = 0 if index is None else self._processes[index].returncode
        return 128 - code if code < 0 else code

    def signal(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    def kill(self) -> None:
        """Ends those that are left, with all that they have started."""
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _say(self, text: str) -> None:
        with self._print_lock, contextlib.suppress(OSError, ValueError):
            print(f"t5x-like launch: {text}", file=sys.stderr, flush=True)


def _make(log_dir: Path) -> None:
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--log-dir {log_dir}: cannot be made: {error.strerror or error}") from None


def _processes(indices: set[int]) -> str:
    return f"process {min(indices)}" if len(indices) == 1 else f"processes {', '.join(map(str, sorted(indices)))}"


def _ending(code: int) -> str:
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"exit code {code} ({signal.Signals(code - 128).name})"
    return f"exit code {code}"


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _end_with_parent(parent: int) -> Callable[[], None] | None:
    """What a new process does first, so that it does not outlive the launcher: Linux ends it with its parent."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None, use_errno=True)

    def ask() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # It has gone in between.
            os._exit(128 + signal.SIGKILL)

    return ask


@contextlib.contextmanager
def _signals_to(hand_on: Callable[[int], None]) -> Iterator[None]:
    """Within: SIGTERM and SIGINT go to the processes; how they end says how the launcher does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda received, _: hand_on(received)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m t5x_like.launching.local -n 2 -- COMMAND ...`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m t5x_like.launching.local", description=__doc__)
    parser.add_argument("-n", "--processes", type=int, required=True, metavar="N")
    parser.add_argument(
        "--devices-per-process", type=int, metavar="N", help="GPUs, or CPU devices where there are none"
    )
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="gets what process N prints, as process.N.txt")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args(argv)
    return launch_local(
        options.command,
        processes=options.processes,
        devices_per_process=options.devices_per_process,
        log_dir=options.log_dir,
    )


if __name__ == "__main__":
    sys.exit(main())
