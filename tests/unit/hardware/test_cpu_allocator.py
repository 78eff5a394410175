"""The allocator of CPU runs keeps freed memory, and gives it back where memory is scarce."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_like.hardware import cpu_allocator

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")

PROGRAM = """
import ctypes, json, resource
from t5x_like.hardware import cpu_allocator

def faults(times):
    # malloc, touch every page, free: as XLA does with the temporary buffer of a step.
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        block = libc.malloc(ctypes.c_size_t(SIZE))
        ctypes.memset(block, 1, SIZE)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

SIZE = 64 * 2**20
pages = SIZE // resource.getpagesize()
found = {"usual": faults(3) / pages, "kept": cpu_allocator.keep_freed_memory()}
faults(1)
found["keeping"] = faults(3) / pages
found["enough"] = cpu_allocator.check()
held = cpu_allocator._resident_bytes()
cpu_allocator.SHARE_OF_MEMORY = 0.0
found["scarce"] = cpu_allocator.check()
found["returned"] = (held - cpu_allocator._resident_bytes()) / SIZE
found["again"] = cpu_allocator.check()
faults(1)
found["after"] = faults(3) / pages
found["status"] = cpu_allocator.status()
print(json.dumps(found))
"""


def test_freed_memory_is_kept_until_memory_is_scarce() -> None:
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(output.stdout)
    assert found["kept"] is True
    # Relative to the usual number, which is smaller where the kernel uses huge pages.
    assert found["keeping"] < 0.1 * found["usual"], "the same pages are used again"
    assert found["enough"] is False and found["scarce"] is True and found["again"] is False
    assert found["returned"] > 0.9, "the free block went back to the kernel"
    assert found["after"] > 0.8 * found["usual"]
    assert "scarce" in found["status"]


def test_small_blocks_between_the_buffers_do_not_make_the_process_grow() -> None:
    program = """
import ctypes
from t5x_like.hardware import cpu_allocator
assert cpu_allocator.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
SIZE = 64 * 2**20

def step(small_blocks):
    block = libc.malloc(ctypes.c_size_t(SIZE))
    ctypes.memset(block, 1, SIZE)
    # One small block behind the buffer and one in its place, which is too small for the next buffer then.
    for _ in range(small_blocks // 2):
        libc.malloc(ctypes.c_size_t(2**20))
    libc.free(block)
    for _ in range(small_blocks // 2):
        libc.malloc(ctypes.c_size_t(2**20))

def held():
    for _ in range(4):
        step(2)
    return cpu_allocator._resident_bytes()

waits = []
def wait():
    waits.append(None)

cpu_allocator.compilation_ended(wait)
for _ in range(3):
    step(0)
    assert not cpu_allocator.limit_growth(wait)
assert len(waits) == 2
first, without = cpu_allocator._resident_bytes(), held()
assert cpu_allocator.limit_growth(wait)
assert cpu_allocator._resident_bytes() < first < without - 0.9 * SIZE

# What is in use from now on is needed: it does not make each step return its pages.
more = libc.malloc(ctypes.c_size_t(4 * SIZE))
ctypes.memset(more, 1, 4 * SIZE)
step(0)
assert cpu_allocator.limit_growth(wait)
step(0)
assert not cpu_allocator.limit_growth(wait)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_process_with_threads_keeps_the_usual_settings() -> None:
    program = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
from t5x_like.hardware import cpu_allocator
assert not cpu_allocator.keep_freed_memory() and not cpu_allocator.check()
print(cpu_allocator.status())
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "other threads" in output.stdout


@pytest.mark.parametrize(
    ("membership", "limits", "expected"),
    [
        ("0::/", {"memory.max": 700}, 700),
        ("0::/slice/job/step", {"slice/memory.max": "max", "slice/job/memory.max": 500, "memory.max": "max"}, 500),
        ("0::/a/b", {"a/memory.max": 300, "a/b/memory.max": 400}, 300),
        ("5:cpu,cpuacct:/x\n4:memory:/slurm/job:1\n0::/", {"memory/slurm/job:1/memory.limit_in_bytes": 200}, 200),
        # A container sees its own group as the root, although the path is that of the host.
        ("4:memory:/docker/1f", {"memory/memory.limit_in_bytes": 100}, 100),
        ("0::/a", {"a/memory.max": "max"}, float("inf")),
        (None, {}, float("inf")),
    ],
)
def test_limit_is_the_smallest_of_the_control_group_and_its_parents(
    tmp_path: Path, membership: str | None, limits: dict[str, object], expected: float
) -> None:
    process, mount = tmp_path / "cgroup", tmp_path / "mount"
    if membership is not None:
        process.write_text(f"{membership}\n")
    for name, limit in limits.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(f"{limit}\n")
    assert cpu_allocator._control_group_limit(process, mount) == expected


def test_pages_that_other_threads_have_freed_are_returned() -> None:
    program = """
import threading
from t5x_like.hardware import cpu_allocator

def work():
    # Smaller than glibc's limit for blocks of their own; the last one keeps the end of the arena in use. Written, since
    # pages that were only reserved are not resident.
    blocks = [b"x" * 100_000 for _ in range(600)]
    kept.append(blocks.pop())

kept = []
for _ in range(2):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
held = cpu_allocator._resident_bytes()
cpu_allocator.return_free_pages()
print((held - cpu_allocator._resident_bytes()) / 60_000_000)
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert float(output.stdout) > 0.8
