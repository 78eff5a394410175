"""Faults: what the errors of XLA, gRPC, NCCL, gloo and TensorStore mean for a run, by their wording.

These libraries raise a few exception types for everything, and only the message says whether a machine, a connection or
the program failed. `FAULTS` is the only table of such messages; the exit code of a fault decides whether launchers run
the same command again.
"""

from __future__ import annotations

import dataclasses
import errno
import re

from t5x_like.errors import (
    EXIT_REFUSED,
    EXIT_RESUMABLE,
    EXIT_UNEXPECTED,
    EXIT_USAGE,
    RESTART_CODES,
    SafetyError,
    UserError,
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """Kind of fault.

    Attributes:
      name: Short description.
      pattern: Regular expression that the messages of such a fault contain, in any case of letters.
      exit_code: Exit code of a process that ends with such an error.
      error_numbers: Numbers of the operating system's errors of this kind.
    """

    name: str
    pattern: str
    exit_code: int
    error_numbers: tuple[int, ...] = ()

    @property
    def restart(self) -> bool:
        """True if the same command should be run again."""
        return self.exit_code in RESTART_CODES


DEVICE_FAILED = Fault(
    "a device failed",
    r"uncorrectable|CUDA_ERROR_(ECC|NVLINK|HARDWARE_STACK|SYSTEM_NOT_READY|NOT_PERMITTED_IN_MIG)|fallen off the bus|"
    r"\bXid\b|core halted|halted (unexpectedly|prematurely)|\bICI\b.*(fail|down|error|unhealthy|timed? ?out)|"
    r"slice health|device.*(is lost|unhealthy|in an error state)|hardware (error|failure|fault)|"
    r"hipErrorECCNotCorrectable",
    EXIT_RESUMABLE,
)
PEER_LOST = Fault(
    "another process was lost",
    # Not the request of a storage, whose messages have the same words. `s` lets two dots match line breaks. The others
    # must not: the words of a reason are in one line.
    r"^(?!(?s:.*)(CURL error|retry attempts failed))(?s:.*)("
    r"connection (closed|reset) by|connection refused|broken pipe|socket closed|\bgloo\b|ncclRemoteError|"
    r"NCCL.*(remote|network error|unhandled system error|async error|timed? ?out|aborted)|"
    r"barrier.*(timed out|failed|error)|another task|heartbeat|coordination service.*(error|shut)|ABORTED)",
    EXIT_RESUMABLE,
    (errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EPIPE),
)
STORAGE_FAILED = Fault(
    "the storage or the network failed",
    r"UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED|timed out|input/output error|stale (nfs )?file handle|"
    r"remote i/o error|transport endpoint is not connected|network is (down|unreachable)|no route to host|"
    r"name resolution|couldn't (resolve|connect)|please try again|too many requests|"
    r"HTTP.*\b(429|50[0234])\b|CURL error|retry attempts failed",
    EXIT_RESUMABLE,
    (
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EREMOTEIO,
        errno.ENOTCONN,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
    ),
)
ACCESS_REFUSED = Fault(
    "the storage refuses access",
    r"PERMISSION_DENIED|UNAUTHENTICATED|permission denied|access denied|invalid_grant|ExpiredToken",
    EXIT_USAGE,
    (errno.EACCES, errno.EPERM),
)
FAULTS = (
    # The first entry that matches decides.
    Fault(
        "no space is left on a disk",
        r"no space left on device|disk quota exceeded",
        EXIT_REFUSED,
        (errno.ENOSPC, errno.EDQUOT),
    ),
    Fault(
        "out of memory",
        r"RESOURCE_EXHAUSTED|out of memory|CUDA_ERROR_OUT_OF_MEMORY|failed to allocate",
        EXIT_UNEXPECTED,
    ),
    ACCESS_REFUSED,
    DEVICE_FAILED,
    PEER_LOST,
    Fault("preempted", r"preempt(ed|ion)|maintenance event|SIGTERM", EXIT_RESUMABLE),
    STORAGE_FAILED,
)


class FaultError(UserError):
    """Fault of a machine, a connection or a storage. `exit_code` is that of the fault."""

    def __init__(self, message: str, fault: Fault):
        super().__init__(message)
        self.fault = fault
        self.exit_code = fault.exit_code


def write_error(message: str, error: BaseException) -> UserError:
    """Return the error for a write that failed with `error`: a fault of the storage has its own exit code."""
    found: BaseException | None = error
    while found is not None:
        fault = fault_of_os_error(found) if isinstance(found, OSError) else None
        if fault is not None:
            return FaultError(message, fault)
        found = found.__cause__ or found.__context__
    return SafetyError(message)


def fault_of(message: str) -> Fault | None:
    """Return the fault that an error message describes; None for any other error, such as a defect."""
    return next((fault for fault in FAULTS if re.search(fault.pattern, message, re.IGNORECASE)), None)


def fault_of_os_error(error: OSError) -> Fault | None:
    """Return the fault that an error of the operating system stands for; None for any other one."""
    return next((fault for fault in FAULTS if error.errno in fault.error_numbers), None)
