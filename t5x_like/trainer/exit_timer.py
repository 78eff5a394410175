"""Timer of the C library that ends the process with an exit code, even if no thread can run Python any more."""

from __future__ import annotations

import ctypes
import functools
import sys

_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2


class _SignalEvent(ctypes.Structure):
    """`struct sigevent` of Linux on machines of 64 bits, whose function is called in a new thread."""

    _fields_ = (
        ("value", ctypes.c_long),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_byte * 32),
    )


class _TimerSetting(ctypes.Structure):
    """`struct itimerspec`."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


def exit_after(seconds: float | None, code: int) -> bool:
    """Let the C library call `_exit` with `code` after `seconds`; None cancels this. A later call replaces it.

    Args:
      code: Exit code, the same in all calls of a process.

    Returns:
      False if this system has no such timer.
    """
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return False
    library, timer = _timer(code)
    setting = _TimerSetting(0, 0, 0, 0)
    if seconds is not None:
        setting.seconds = int(max(seconds, 1.0))
    return library.timer_settime(timer, 0, ctypes.byref(setting), None) == 0


@functools.cache
def _timer(code: int) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    library = ctypes.CDLL(None, use_errno=True)
    timer = ctypes.c_void_p()
    function = ctypes.cast(library._exit, ctypes.c_void_p)
    event = _SignalEvent(code, 0, _SIGEV_THREAD, function, None)
    if library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) != 0:
        raise OSError(ctypes.get_errno(), "timer_create")
    return library, timer
