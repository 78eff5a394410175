"""Measurement of several libraries in turns: each in a process of its own, which waits while another one works.

CPU seconds are summed over all threads. Other work on the machine disturbs them less than the wall clock.
OpenMP threads sleep while they wait, so that the CPU time of PyTorch is work.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import os
import platform
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

Factory = Callable[[argparse.Namespace], Callable[[], Any]]
"""Function of a module that returns the work of a turn; it is called in the library's own process. The result of the
work must survive pickling."""
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "numpy")


class Turn(NamedTuple):
    cpu: float
    wall: float
    result: Any


@dataclasses.dataclass
class Record:
    """Measurements of one library.

    Attributes:
      first: The first call, which compiles.
      turns: The measured calls.
      peak_bytes: Largest resident memory of the process.
      error: Why there are none, else empty.
    """

    first: Turn | None = None
    turns: list[Turn] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    error: str = ""

    def summary(self) -> dict[str, Any]:
        """Return the numbers of a table: medians with the smallest and the largest, seconds and MiB."""
        if self.error:
            return {"error": self.error}
        assert self.first is not None
        cpu, wall = [turn.cpu for turn in self.turns], [turn.wall for turn in self.turns]
        return {
            "cpu_seconds": round(statistics.median(cpu), 3),
            "cpu_seconds_range": [round(min(cpu), 3), round(max(cpu), 3)],
            "wall_seconds": round(statistics.median(wall), 3),
            "wall_seconds_range": [round(min(wall), 3), round(max(wall), 3)],
            "first_call_cpu_seconds": round(self.first.cpu, 1),
            "first_call_wall_seconds": round(self.first.wall, 1),
            "peak_mib": round(self.peak_bytes / 2**20),
        }


def timed(work: Callable[[], Any]) -> Turn:
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return Turn(time.process_time() - cpu, time.perf_counter() - wall, result)


def _serve(factory: Factory, options: argparse.Namespace, pipe: Connection) -> None:
    try:
        if options.cpus:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cpus])
        work = factory(options)
        # The first call compiles, and the time of the factory is not counted.
        pipe.send(timed(work))
        for _ in range(options.warm_up - 1):
            work()
        pipe.send(None)
        while pipe.recv():
            pipe.send(timed(work))
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    except BaseException as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}"[:300])


def measure(factories: Mapping[str, Factory], options: argparse.Namespace) -> dict[str, Record]:
    """Return the measurements of each library.

    Args:
      factories: Function by the name of the library.
      options: `warm_up` and `turns`, numbers of calls; `cpus`, the number of cores or None; and what the factories
        read.
    """
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    context = multiprocessing.get_context("spawn")
    records = {name: Record() for name in factories}
    pipes, processes = {}, []
    for name, factory in factories.items():
        pipe, other_end = context.Pipe()
        process = context.Process(target=_serve, args=(factory, options, other_end), daemon=True)
        process.start()
        other_end.close()
        processes.append(process)
        # One library at a time, so that no compilation overlaps with a measurement.
        first = _receive(pipe)
        ready = first if isinstance(first, str) else _receive(pipe)
        if isinstance(ready, str):
            records[name].error = ready
        else:
            records[name].first, pipes[name] = first, pipe
    for _ in range(options.turns):
        for name, pipe in list(pipes.items()):
            pipe.send(True)
            answer = _receive(pipe)
            if isinstance(answer, str):
                records[name].error = answer
                del pipes[name]
            else:
                records[name].turns.append(answer)
    for name, pipe in pipes.items():
        pipe.send(False)
        records[name].peak_bytes = _receive(pipe)
    for process in processes:
        process.join()
    return records


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return "the process was killed"


def ratio(records: Mapping[str, Record], name: str, peer: str) -> dict[str, float] | None:
    """Return the median ratio of a library's CPU seconds to a peer's, turn by turn, and those of wall seconds and
    memory; None if one of the two has failed."""
    one, other = records.get(name), records.get(peer)
    if one is None or other is None or one.error or other.error:
        return None
    pairs = list(zip(one.turns, other.turns, strict=True))
    return {
        "cpu": round(statistics.median(a.cpu / b.cpu for a, b in pairs), 3),
        "wall": round(statistics.median(a.wall / b.wall for a, b in pairs), 3),
        "peak_memory": round(one.peak_bytes / other.peak_bytes, 3),
    }


def machine() -> dict[str, Any]:
    """Return what the figures depend on: the CPU, the number of cores, the load and the versions of the libraries."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 1),
        "versions": versions,
    }


@functools.cache
def cpu_model() -> dict[str, str]:
    """Return maker, name, family and model of the CPU, as the kernel names them."""
    names = {"vendor_id": "maker", "model name": "name", "cpu family": "family", "model": "model"}
    found: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in names:
            found.setdefault(names[key], value)
    return found


def add_options(parser: argparse.ArgumentParser, turns: int) -> None:
    parser.add_argument("--turns", type=int, default=turns, help=f"measured calls of each library (default {turns})")
    parser.add_argument("--warm-up", type=int, default=3, help="calls before, of which the first compiles (default 3)")
    parser.add_argument("--cpus", type=int, help="number of cores that each library may use (default: all)")
