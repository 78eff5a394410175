"""Plug-in whose callback makes training fail in the ways that `faults.json` in the current directory lists.

The file holds pairs [step, fault]; each fault happens once, before that step, in process 0. A fault is the message of a
`JaxRuntimeError`; or "hang": the next save never ends; or "quota": from then on Linux refuses large writes of the
process with the error of an exceeded quota.
"""

from __future__ import annotations

import ctypes
import errno
import json
import platform
import struct
import time
from pathlib import Path
from typing import Any

from t5x_like.trainer.callbacks import Callback, register_callback

FAULTS = Path("faults.json")
HANG, QUOTA = "hang", "quota"
# Numbers of the system calls write, pwrite64 and writev, by architecture with its number in the audit interface.
SYSTEM_CALLS = {"x86_64": (0xC000003E, (1, 18), 20, 317), "aarch64": (0xC00000B7, (64, 68), 66, 277)}
LARGE = 2048


@register_callback("faults")
class Faults(Callback):
    """Callback that fails with the faults of the file."""

    def on_start(self, step: int) -> None:
        import jax

        from t5x_like.trainer.session import TrainSession

        train_step = TrainSession.train_step

        def failing_step(session: TrainSession, batch: Any) -> None:
            left = json.loads(FAULTS.read_text())
            if left and left[0][0] == session.step:
                fault = left.pop(0)[1]
                FAULTS.write_text(json.dumps(left))
                match fault:
                    case "hang":
                        session.checkpoints.save = lambda *arguments: time.sleep(3600)  # type: ignore[method-assign]
                    case "quota":
                        exceed_quota()
                    case _:
                        raise jax.errors.JaxRuntimeError(fault)
            train_step(session, batch)

        TrainSession.train_step = failing_step  # type: ignore[method-assign]


def exceed_quota() -> None:
    """Make Linux refuse large writes of all threads of this process with EDQUOT, by a filter of system calls."""
    architecture, writes, write_many, seccomp = SYSTEM_CALLS[platform.machine()]
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    # The instructions of BPF: (code, jump if true, jump if false, operand). `write_many` gets no size, and is refused.
    program = [
        (load, 0, 0, 4),
        (equal, 0, 7, architecture),
        (load, 0, 0, 0),
        (equal, 4, 0, write_many),
        (equal, 1, 0, writes[0]),
        (equal, 0, 3, writes[1]),
        (load, 0, 0, 32),
        (at_least, 0, 1, LARGE),
        (end, 0, 0, 0x00050000 | errno.EDQUOT),
        (end, 0, 0, 0x7FFF0000),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    filters = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_filter, all_threads = 38, 1, 1
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.syscall(seccomp, set_filter, all_threads, filters):
        raise OSError(ctypes.get_errno(), "the filter was refused")
