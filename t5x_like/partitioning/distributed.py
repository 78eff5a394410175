"""Processes that work together: how they meet at the start, and how they part.

`launchers` finds out which process this is; here they meet, are counted, and part in one of two ways. After success
all wait for each other, so that nobody's end looks like a failure. After an error nobody is waited for: the process
says what was wrong, tells the others, and leaves at once with its exit code, and they leave with the same one. A
barrier at that moment would hide the reason behind its timeout and turn the exit code into that of an abort.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import NoReturn

import jax

from t5x_like.config import EXIT_RESUMABLE, EXIT_UNEXPECTED, ConfigError, PartitioningConfig, Problem, UserError
from t5x_like.config.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, reader_has_gone
from t5x_like.config.processes import ProcessFlags
from t5x_like.partitioning.agreement import EndedElsewhereError, Endings
from t5x_like.partitioning.launchers import Resolved, count_problems, is_loopback, resolve
from t5x_like.partitioning.mesh import known_slices
from t5x_like.partitioning.roll_call import RollCallError, roll_call

_SAID_BY_ANOTHER_SECONDS = 2.0
"""For which a process waits with its own message, because another one may be about to say the same."""
_LOST = re.compile(
    r"connection closed by peer|connection reset by peer|broken pipe|socket closed|gloo|nccl.*remote|"
    r"barrier.*(timed out|failed|error)|another task|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Launch:
    """The processes of this command, after they have met."""

    launcher: str
    process_index: int
    process_count: int
    coordinator: str | None

    @property
    def is_writer(self) -> bool:
        """Whether this is the process that writes files and prints results."""
        return self.process_index == 0


class LostProcessError(UserError):
    """Another process has gone without a word. The same command goes on from the last checkpoint."""

    exit_code = EXIT_RESUMABLE


@contextlib.contextmanager
def started(
    flags: ProcessFlags,
    *,
    partitioning: PartitioningConfig | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Launch]:
    """Within: all processes of the command have met. To be entered before anything else asks jax for devices.

    With several processes an error within does not come out: it is printed here, and the process ends.

    Args:
      partitioning: Of the recipe: its degrees may say how many devices its mesh needs.

    Raises:
      ConfigError: the flags and the environment are not right, or not the expected processes and devices have met.
    """
    launch, resolved = _initialize(flags, environment)
    if launch.process_count == 1:
        _require_counts(resolved, flags, partitioning, environment)
        yield launch
        return
    global _endings
    endings = _endings = Endings(_leave)
    try:
        _require_counts(resolved, flags, partitioning, environment)
        yield launch
    except BaseException as error:
        _end_after(error, endings)
    endings.close()
    try:
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError as error:
        # What was to be done is done and on the disk.
        print(f"t5x-like: process {launch.process_index}: at the end, {_first_line(error)}", file=sys.stderr)


def _mesh_devices(partitioning: PartitioningConfig) -> int | None:
    """The devices that a recipe's mesh needs; None where a degree of -1 takes what is there."""
    within, between = partitioning.degrees.values(), partitioning.dcn.degrees.values()
    if min(within) < 1:
        return None
    slices = known_slices(jax.devices()) or 1
    return math.prod(within) * (math.prod(between) if min(between) > 0 else slices)


def _initialize(flags: ProcessFlags, environment: Mapping[str, str]) -> tuple[Launch, Resolved]:
    resolved = resolve(flags, environment, on_tpu_vm=_on_tpu_vm())
    if resolved.is_single:
        return Launch(resolved.launcher, 0, 1, None), resolved
    # Its handler takes SIGTERM away from Python's; `agreement.common_stop` does its work, for Ctrl-C too.
    jax.config.update("jax_enable_preemption_service", False)
    if resolved.coordinator is not None and resolved.process_count is not None and resolved.process_index is not None:
        try:
            roll_call(
                resolved.coordinator, resolved.process_index, resolved.process_count, flags.timeout_seconds, environment
            )
        except RollCallError as error:
            raise LostProcessError(f"{error}{_loopback_hint(resolved)}") from None
    with _alarm(flags.timeout_seconds, resolved):
        try:
            jax.distributed.initialize(
                resolved.coordinator,
                resolved.process_count,
                resolved.process_index,
                local_device_ids=resolved.local_device_ids,
                cluster_detection_method=resolved.detection or ("deactivate" if resolved.coordinator else None),
                # Ours comes first: jax ends the process with a trace of C++ and not a word of who is missing.
                initialization_timeout=flags.timeout_seconds + 60,
            )
        except (ValueError, TypeError) as error:
            fix = "or --launcher single for a process of its own"
            if resolved.launcher == "kubernetes":
                fix = f"install jax's k8s extra, {fix}"
            expected = "what jax needs to find the other processes"
            raise ConfigError([Problem(resolved.launcher, str(error), expected, fix)]) from None
    from jax._src import distributed

    coordinator = distributed.global_state.coordinator_address
    launch = Launch(resolved.launcher, jax.process_index(), jax.process_count(), coordinator)
    local = jax.local_devices()
    print(
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
    resolved: Resolved, flags: ProcessFlags, partitioning: PartitioningConfig | None, environment: Mapping[str, str]
) -> None:
    expect_devices = flags.expect_devices
    if expect_devices is None and partitioning is not None:
        expect_devices = _mesh_devices(partitioning)
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
def _alarm(seconds: float, resolved: Resolved) -> Iterator[None]:
    """Ends the process if what is within takes longer: the others have not come."""

    def ring() -> None:
        of = f" of {resolved.process_count}" if resolved.process_count else ""
        where = f" at {resolved.coordinator}" if resolved.coordinator else ""
        who = "" if resolved.process_index is None else f" {resolved.process_index}{of}"
        _leave(
            EXIT_RESUMABLE,
            f"process{who} ({resolved.launcher}) has waited {seconds:g} seconds for the others{where}: look at their "
            f"logs, or give them longer: --initialization-timeout{_loopback_hint(resolved)}",
        )

    timer = threading.Timer(seconds, ring)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _loopback_hint(resolved: Resolved) -> str:
    if resolved.coordinator is None or not is_loopback(resolved.coordinator):
        return ""
    return f". {resolved.coordinator} is reached from its own machine only: with several hosts, name that of process 0"


_endings: Endings | None = None
"""Of this process, while there are several."""


def explained(error: BaseException) -> BaseException:
    """The error itself; or, if it is what remains of a process that has gone, the `UserError` that says so."""
    endings = _endings
    if isinstance(error, UserError) or endings is None or not isinstance(error, jax.errors.JaxRuntimeError):
        return error
    if not _LOST.search(str(error)):
        return error
    ended = endings.first(_SAID_BY_ANOTHER_SECONDS)
    if ended is not None:
        return EndedElsewhereError(f"process {ended[0]} says why", ended[1])
    return LostProcessError(
        f"process {jax.process_index()} has lost another process ({_first_line(error)}). The same command goes on from "
        "the last checkpoint."
    )


def exit_code_of(error: BaseException) -> int:
    """The exit code of a process that ends by `error`."""
    if isinstance(error, UserError):
        return error.exit_code
    if reader_has_gone(error):
        return EXIT_BROKEN_PIPE
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_UNEXPECTED


def _end_after(error: BaseException, endings: Endings) -> NoReturn:
    """Says what was wrong, then tells the others, then leaves: nothing that waits for them comes before the message."""
    error = explained(error)
    code = exit_code_of(error)
    index = jax.process_index()
    # All processes may have found the same. The first one says it.
    ended = endings.first(_SAID_BY_ANOTHER_SECONDS) if isinstance(error, UserError) and index > 0 else None
    if ended is not None and ended[0] != index:
        code = ended[1]
        print(f"t5x-like: process {index} ends with exit code {code}: process {ended[0]} says why", file=sys.stderr)
    elif isinstance(error, UserError):
        print(f"t5x-like: {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print("t5x-like: interrupted", file=sys.stderr)
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
    _flush()
    endings.announce(code)
    os._exit(code)


def _leave(code: int, message: str) -> NoReturn:
    print(f"t5x-like: {message}", file=sys.stderr)
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
