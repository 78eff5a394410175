"""Settings of glibc's allocator with which a training process on CPUs keeps the memory that it frees.

XLA's CPU programs allocate one temporary buffer per call and free it at the end. By default glibc returns such a buffer
to the kernel, which fills its pages with zeros again in the next step: an eighth of a small model's step. With these
settings the buffer stays in the process.

The price is that the process holds on to its largest use of memory, and that the heap grows by another buffer if the
gap left by the last one is too small, because of a block allocated next to it or of alignment. `limit_growth` returns
the free pages to the kernel if the process holds much more than a step needs. `check` bounds what it holds: where
memory becomes scarce, the free pages go back to the kernel and glibc's usual behaviour returns.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path

SHARE_OF_MEMORY = 0.5
"""Share of the machine's memory, or of the limit of the process's control group, that the process may hold."""
LEAST_AVAILABLE = 0.1
"""Share of the machine's memory that must be available to other processes."""
MAX_GROWTH = 1.5
"""Memory that the process may hold, relative to what it needs for a step."""

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8
_KEEP = (
    # Other arenas are limited to 64 MiB and map each larger block, whatever M_MMAP_MAX is.
    (_M_ARENA_MAX, 1),
    (_M_MMAP_MAX, 0),
    (_M_TRIM_THRESHOLD, -1),
    # The heap grows in few, large steps. Pages that are not touched take no memory.
    (_M_TOP_PAD, 256 * 2**20),
)
_USUAL = (
    (_M_TOP_PAD, 128 * 2**10),
    # Where glibc's own dynamic thresholds arrive; setting any parameter has switched them off.
    (_M_TRIM_THRESHOLD, 64 * 2**20),
    (_M_MMAP_THRESHOLD, 32 * 2**20),
    (_M_MMAP_MAX, 65536),
)
_LOG = logging.getLogger(__name__)
_status = "glibc's defaults"
_keeps = False
_in_use = 0  # Resident bytes between two steps, without free pages.
_buffers: int | None = None  # Bytes that a step needs besides; None: no step has ended since the compilation.


def status() -> str:
    """Return how the allocator of this process is set, for the summary at the start of a run."""
    return _status


def keep_freed_memory() -> bool:
    """Make the process keep the memory that it frees, and return whether that was possible.

    It is possible with glibc only, and before other threads have started: their blocks are in arenas of their own.
    """
    global _keeps, _status
    if platform.libc_ver()[0] != "glibc":
        _status = "not glibc's: as it is"
    elif threading.active_count() > 1:
        _status = "glibc's defaults, since other threads had started before"
    elif all([_libc().mallopt(parameter, value) for parameter, value in _KEEP]):
        _keeps, _status = True, "freed memory stays in the process (cpu_allocator)"
    else:
        _status = "glibc's defaults, since it refused the settings"
    return _keeps


def compilation_ended(finish_step: Callable[[], object]) -> None:
    """Return the free pages that compilation has left in the heap, which the steps would not use again.

    Args:
      finish_step: Waits for the step that was compiled.
    """
    global _in_use, _buffers
    if _keeps:
        finish_step()
        _in_use, _buffers = _trimmed(), None


def limit_growth(finish_step: Callable[[], object]) -> bool:
    """Return free pages to the kernel if the process holds much more than it needs; return whether it did.

    Call it after each step. The first call after a compilation measures what a step needs. What is in use between the
    steps may grow later, by an evaluation for example.

    Args:
      finish_step: Waits for the step; called if it is the first one after a compilation.
    """
    global _in_use, _buffers
    if not _keeps:
        return False
    if _buffers is None:
        finish_step()
        _buffers = max(_resident_bytes() - _in_use, 0)
        return False
    if _resident_bytes() <= MAX_GROWTH * (_in_use + _buffers):
        return False
    # A step may be in progress, with its buffers.
    _in_use = max(_in_use, _trimmed())
    return True


def check() -> bool:
    """Restore glibc's usual behaviour if this process, or the machine, is short of memory; return whether it did.

    It reads two small files of /proc: call it once per logging interval.
    """
    global _keeps, _status
    if not _keeps:
        return False
    total, available = _memory()
    held = _resident_bytes()
    if held <= SHARE_OF_MEMORY * min(total, _control_group_limit()) and available >= LEAST_AVAILABLE * total:
        return False
    for parameter, value in _USUAL:
        _libc().mallopt(parameter, value)
    return_free_pages()
    _keeps, _status = False, "glibc's defaults, since memory became scarce"
    _LOG.info(
        "this process holds %d MiB and %d MiB are available: freed memory goes back to the kernel from now on",
        held // 2**20,
        available // 2**20,
    )
    return True


def return_free_pages() -> None:
    """Return the free pages of all arenas to the kernel, with glibc; elsewhere do nothing.

    glibc has an arena for each of several threads, and keeps what a thread has freed: blocks of a few hundred KiB that
    come from the threads of a library add up to many times what is in use at once.
    """
    if platform.libc_ver()[0] == "glibc":
        _libc().malloc_trim(ctypes.c_size_t(0))


def _trimmed() -> int:
    """Return free pages to the kernel, and return the resident bytes after that."""
    return_free_pages()
    return _resident_bytes()


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _memory() -> tuple[int, int]:
    """Return the machine's memory, and the part of it that is available without swapping, in bytes."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return total, available


def _control_group_limit(process: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the smallest limit of memory of the process's control group and its parents, in bytes; infinity if none.

    Args:
      process: File with the group of the process in each hierarchy, as in the manual page cgroups(7).
      mount: Folder of the hierarchy of version 2, and of one folder for each controller of version 1.
    """
    # In a container the root may be the only group that can be seen, whatever the path says.
    files = [mount / "memory.max", mount / "memory" / "memory.limit_in_bytes"]
    try:
        lines = process.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            if number == "0":
                files.append(mount / folder / "memory.max")
            elif "memory" in controllers.split(","):
                files.append(mount / "memory" / folder / "memory.limit_in_bytes")
    limits = [float("inf")]
    for file in files:
        try:
            limits.append(float(file.read_text()))
        except (OSError, ValueError):
            # The file of the other version of control groups is missing, and "max" is no number.
            continue
    return min(limits)
