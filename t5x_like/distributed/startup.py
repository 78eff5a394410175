"""Startup and exit of multi-process commands.

`cluster_detection` determines which process this is; here the processes connect, are counted, and exit in one of two
ways. After success they wait for each other, so that no exit looks like a failure. After an error a process does not
wait: it prints the error, tells the others and exits at once with its exit code, and the others exit with the same
code. A barrier at that point would hide the error until its timeout and turn the exit code into that of an abort.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import jax

from t5x_like.config import ShardingConfig
from t5x_like.distributed.cluster_detection import ClusterInfo, count_problems, detect_cluster, is_loopback
from t5x_like.distributed.coordination import ExitBroadcast, RemoteProcessError
from t5x_like.distributed.flags import DistributedFlags
from t5x_like.distributed.rendezvous import RendezvousError, rendezvous
from t5x_like.errors import (
    EXIT_RESUMABLE,
    EXIT_UNEXPECTED,
    ConfigError,
    ConfigProblem,
    UserError,
    exit_code_of,
    is_broken_pipe,
)
from t5x_like.faults import Fault, FaultError, fault_of, fault_of_os_error
from t5x_like.sharding.mesh import known_slices
from t5x_like.utils.sanitize import say

HEARTBEAT_SECONDS = 300
"""Time without a sign of life after which jax's coordination service gives up a process and aborts the others from C++.
The watchdog's limit of a step is usually shorter, and ends the processes with their stacks and our exit code."""
_ANNOUNCEMENT_SECONDS = 2.0
"""Time for which a process delays its own message, because another process may be about to print the same one."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """Processes of this command after initialization."""

    launcher: str
    process_index: int
    process_count: int
    coordinator: str | None

    @property
    def is_writer(self) -> bool:
        """True if this process writes files and prints results."""
        return self.process_index == 0


class PeerLostError(UserError):
    """Another process has vanished without an announcement. The same command resumes from the last checkpoint."""

    exit_code = EXIT_RESUMABLE


@contextlib.contextmanager
def initialize(
    flags: DistributedFlags,
    *,
    sharding: ShardingConfig | None = None,
    environment: Mapping[str, str] = os.environ,
    on_exit: Callable[[int, str], None] = lambda code, reason: None,
) -> Iterator[Launch]:
    """Connect all processes of the command. Enter this context before anything else asks jax for devices.

    With several processes an error within the context does not propagate: it is printed here, and the process exits.

    Args:
      flags: Flags of the command line.
      sharding: Sharding of the recipe, whose degrees may give the number of devices of its mesh.
      environment: Environment variables.
      on_exit: Called with exit code and reason before this function ends the process.

    Raises:
      ConfigError: The flags or the environment are inconsistent, or the numbers of processes or devices are not the
        expected ones.
    """
    launch, resolved = _initialize(flags, environment, on_exit)
    if launch.process_count == 1:
        _require_counts(resolved, flags, sharding, environment)
        yield launch
        return
    global _exit_broadcast
    exit_broadcast = _exit_broadcast = ExitBroadcast(_leave)
    try:
        _require_counts(resolved, flags, sharding, environment)
        yield launch
    except BaseException as error:
        _exit_after(error, exit_broadcast, on_exit)
    exit_broadcast.close()
    try:
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError as error:
        # All work is done and saved: a failure of the shutdown is not a failure of the command.
        say(f"t5x-like: process {launch.process_index}: at shutdown: {_first_line(error)}", file=sys.stderr)


def _mesh_devices(sharding: ShardingConfig) -> int | None:
    """Return the number of devices that a recipe's mesh needs; None if a degree of -1 takes the remaining devices."""
    within, between = sharding.degrees.values(), sharding.dcn.degrees.values()
    if min(within) < 1:
        return None
    slices = known_slices(jax.devices()) or 1
    return math.prod(within) * (math.prod(between) if min(between) > 0 else slices)


def _initialize(
    flags: DistributedFlags, environment: Mapping[str, str], on_exit: Callable[[int, str], None]
) -> tuple[Launch, ClusterInfo]:
    resolved = detect_cluster(flags, environment, on_tpu_vm=_on_tpu_vm())
    if resolved.is_single:
        return Launch(resolved.launcher, 0, 1, None), resolved
    # jax's handler would replace Python's for SIGTERM; `preemption.coordinated_stop` does its work, also for Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    if resolved.coordinator is not None and resolved.process_count is not None and resolved.process_index is not None:
        try:
            rendezvous(
                resolved.coordinator, resolved.process_index, resolved.process_count, flags.timeout_seconds, environment
            )
        except RendezvousError as error:
            raise PeerLostError(f"{error}{_loopback_hint(resolved)}") from None
    with _alarm(flags.timeout_seconds, resolved, on_exit):
        try:
            jax.distributed.initialize(
                resolved.coordinator,
                resolved.process_count,
                resolved.process_index,
                local_device_ids=resolved.local_device_ids,
                cluster_detection_method=resolved.detection or ("deactivate" if resolved.coordinator else None),
                # The rendezvous has its own timeout; jax's would abort the process without naming missing processes.
                initialization_timeout=flags.timeout_seconds + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except (ValueError, TypeError) as error:
            fix = "or use --launcher single to run this process alone"
            if resolved.launcher == "kubernetes":
                fix = f"install jax's k8s extra, {fix}"
            expected = "the settings with which jax finds the other processes"
            raise ConfigError([ConfigProblem(resolved.launcher, str(error), expected, fix)]) from None
    from jax._src import distributed

    coordinator = distributed.global_state.coordinator_address
    launch = Launch(resolved.launcher, jax.process_index(), jax.process_count(), coordinator)
    local = jax.local_devices()
    say(
        f"launcher: {launch.launcher}, process {launch.process_index}/{launch.process_count}, coordinator "
        f"{coordinator}, {len(local)} local {local[0].device_kind} of {jax.device_count()}",
        file=sys.stderr,
        flush=True,
    )
    return launch, resolved


def _on_tpu_vm() -> bool:
    try:
        from jax._src import cloud_tpu_init

        return bool(cloud_tpu_init.running_in_cloud_tpu_vm)
    except (ImportError, AttributeError):
        return False


def _require_counts(
    resolved: ClusterInfo, flags: DistributedFlags, sharding: ShardingConfig | None, environment: Mapping[str, str]
) -> None:
    expect_devices = flags.expect_devices
    if expect_devices is None and sharding is not None:
        expect_devices = _mesh_devices(sharding)
    if flags.expect_processes is None and expect_devices is None:
        return
    problems = count_problems(
        resolved,
        processes=jax.process_count(),
        devices=jax.device_count(),
        local_devices=jax.local_device_count(),
        platform=jax.default_backend(),
        expect_processes=flags.expect_processes,
        expect_devices=expect_devices,
        environment=environment,
    )
    if problems:
        raise ConfigError(problems)


@contextlib.contextmanager
def _alarm(seconds: float, resolved: ClusterInfo, on_exit: Callable[[int, str], None]) -> Iterator[None]:
    """Exit the process if the context takes longer than `seconds`, because other processes did not connect."""

    def expire() -> None:
        of = f" of {resolved.process_count}" if resolved.process_count else ""
        where = f" at {resolved.coordinator}" if resolved.coordinator else ""
        name = "" if resolved.process_index is None else f" {resolved.process_index}{of}"
        reason = (
            f"process{name} ({resolved.launcher}) has waited {seconds:g} seconds for the other processes{where}: check "
            f"their logs, or increase --initialization-timeout{_loopback_hint(resolved)}"
        )
        on_exit(EXIT_RESUMABLE, reason)
        _leave(EXIT_RESUMABLE, reason)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _loopback_hint(resolved: ClusterInfo) -> str:
    if resolved.coordinator is None or not is_loopback(resolved.coordinator):
        return ""
    return f". {resolved.coordinator} can be reached from its own host only: with several hosts, give that of process 0"


_exit_broadcast: ExitBroadcast | None = None
"""Exit broadcast of this process, if there are several processes."""


def translate_error(error: BaseException) -> BaseException:
    """Return the `UserError` for a fault of a machine, a connection or a storage; return other errors unchanged."""
    fault = _fault_of(error)
    if fault is None or fault.exit_code == EXIT_UNEXPECTED:
        return error
    # The fault may be the consequence of an error in another process, which has told its reason.
    ended = None if _exit_broadcast is None or not fault.restart else _exit_broadcast.first(_ANNOUNCEMENT_SECONDS)
    if ended is not None:
        return RemoteProcessError(f"process {ended[0]} reports the reason", ended[1])
    advice = "The same command resumes." if fault.restart else "What was saved before is intact."
    # A command without other processes may not have asked for devices, and must not do it now.
    process = "" if _exit_broadcast is None else f"process {jax.process_index()}: "
    return FaultError(f"{process}{fault.name} ({_first_line(error)}). {advice}", fault)


def _fault_of(error: BaseException) -> Fault | None:
    if isinstance(error, UserError) or is_broken_pipe(error):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return fault_of_os_error(error)
    # TensorStore raises ValueErrors, which Orbax wraps; their messages contain locations in its source.
    of_library = isinstance(error, jax.errors.JaxRuntimeError | TimeoutError) or "tensorstore/" in str(error)
    return fault_of(str(error)) if of_library else None


def _exit_after(error: BaseException, exit_broadcast: ExitBroadcast, on_exit: Callable[[int, str], None]) -> NoReturn:
    """Print the error, tell the other processes, and exit; the message comes first, because the rest may block."""
    error = translate_error(error)
    code = exit_code_of(error)
    index = jax.process_index()
    # All processes may have found the same error. The first one prints it.
    ended = exit_broadcast.first(_ANNOUNCEMENT_SECONDS) if isinstance(error, UserError) and index > 0 else None
    if ended is not None and ended[0] != index:
        code = ended[1]
        reason = f"process {ended[0]} reports the reason"
        say(f"t5x-like: process {index} ends with exit code {code}: {reason}", file=sys.stderr)
    elif isinstance(error, UserError):
        say(f"t5x-like: {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        say("t5x-like: interrupted", file=sys.stderr)
    elif not isinstance(error, SystemExit):
        say("".join(traceback.format_exception(error)), file=sys.stderr, end="")
    _flush()
    if not isinstance(error, RemoteProcessError):
        on_exit(code, str(error))
    exit_broadcast.announce(code)
    os._exit(code)


_before_following: Callable[[], None] | None = None


def before_following(action: Callable[[], None]) -> Callable[[], None]:
    """Call `action` before this process ends because another one has left with EXIT_RESUMABLE.

    Returns:
      A function that cancels this.
    """
    global _before_following
    _before_following = action

    def cancel() -> None:
        global _before_following
        _before_following = None

    return cancel


def announce_exit(code: int, seconds: float = 10.0) -> None:
    """Tell the other processes, if there are any, to end with `code`.

    Args:
      code: Exit code.
      seconds: Time after which this returns although they do not know it, because the service may hang.
    """
    if _exit_broadcast is not None:
        telling = threading.Thread(target=_exit_broadcast.announce, args=(code,), daemon=True)
        telling.start()
        telling.join(seconds)


def _leave(code: int, message: str) -> NoReturn:
    say(f"t5x-like: {message}", file=sys.stderr)
    if code == EXIT_RESUMABLE and _before_following is not None:
        with contextlib.suppress(Exception):
            _before_following()
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
