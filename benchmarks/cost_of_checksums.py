"""Time of saves and restores with checks of their integrity, relative to those without them.

    python benchmarks/cost_of_checksums.py --rounds 7

A state of many arrays, one GB by default, is saved and restored by turns:

- local: plain Orbax; the manager of checkpoints, whose devices compute fingerprints and which hashes small files; with
  --hashed also the same with every file hashed by SHA-256 when it is complete and before it is read.
- fingerprints: these alone, of the same arrays, beside plain Orbax, and beside the sums of the arrays (one pass), which
  read the memory once and do little else. On a machine with other work these shares are known better than the
  difference of two long measurements.
- bucket: chunks in TensorStore's memory store with and without crc32c, so that no network hides the cost.

Reported are the medians of the ratios of neighboring measurements, with their quartiles, of wall-clock time and of CPU
seconds. Accelerators compute the fingerprints in their own memory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from t5x_like.checkpoints import bucket_arrays, checksums, orbax_arrays
from t5x_like.checkpoints.fingerprints import fingerprints
from t5x_like.checkpoints.manager import CheckpointManager
from t5x_like.config import CheckpointConfig
from t5x_like.storage import locations
from t5x_like.utils import tree_paths

Times = dict[str, list[tuple[float, float]]]


def measured(action: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of an action by the clock and of the CPUs."""
    os.sync()
    clock, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - clock, time.process_time() - cpu


def make_state(size: int, arrays: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = max(size // arrays // 4 // 1024, 1)
    leaves = {
        f"layer_{number}": jax.numpy.asarray(rng.standard_normal((rows, 1024), np.float32)) for number in range(arrays)
    }
    return {"params": leaves, "step": jax.numpy.int32(1)}


def sums(leaves: dict[str, Any]) -> list[Any]:
    return [jax.numpy.sum(leaf) for leaf in leaves.values()]


@contextlib.contextmanager
def fresh(root: Path) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(dir=root))
    yield directory
    shutil.rmtree(directory)


def local_round(root: Path, state: Any, times: Times, order: int, with_hashes: bool) -> None:
    leaves = tree_paths.by_path(state)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    wanted = tree_paths.by_path(abstract)

    def plain(directory: Path) -> None:
        times["plain save"].append(measured(lambda: orbax_arrays.save(directory / "1", leaves)()))
        times["plain restore"].append(
            measured(lambda: jax.block_until_ready(orbax_arrays.load(directory / "1", wanted)))
        )

    def managed(directory: Path, name: str) -> None:
        manager = CheckpointManager(directory, CheckpointConfig())

        def save() -> None:
            manager.save(1, state, {})
            manager.wait()

        times[f"{name} save"].append(measured(save))
        times[f"{name} restore"].append(measured(lambda: jax.block_until_ready(manager.restore(abstract)[1])))
        manager.close()

    def only_fingerprints(_: Path) -> None:
        for action in ("save", "restore"):
            times[f"one pass {action}"].append(measured(lambda: jax.block_until_ready(sums(leaves))))
            times[f"fingerprints {action}"].append(measured(lambda: fingerprints(leaves)))

    def hashed(directory: Path) -> None:
        with mock.patch.object(checksums, "LARGE_BYTES", 2**60):
            managed(directory, "hashed")

    variants = [plain, only_fingerprints, lambda directory: managed(directory, "manager")]
    variants += [hashed] * with_hashes
    first = order % len(variants)
    for variant in variants[first:] + variants[:first]:
        with fresh(root) as directory:
            variant(directory)


def restored(url: locations.Url, metadata: Any, wanted: Any) -> None:
    parts, problems = bucket_arrays.read(url, metadata, wanted)
    assert not problems
    jax.block_until_ready(bucket_arrays.assemble(wanted, parts))


def bucket_round(state: Any, times: Times, order: int) -> None:
    leaves = tree_paths.by_path(state)
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for path, leaf in leaves.items()
    }
    url = locations.location("memory://cost/checkpoint")
    assert isinstance(url, locations.Url)
    described = bucket_arrays.describe(leaves)
    without = {path: {**metadata, "codecs": metadata["codecs"][:1]} for path, metadata in described.items()}
    variants = [("no crc32c", without), ("crc32c", described)]
    for name, metadata in variants[order % 2 :] + variants[: order % 2]:
        pieces = bucket_arrays.copy_own_shards(leaves)
        times[f"{name} save"].append(measured(functools.partial(bucket_arrays.write, url, metadata, pieces)))
        times[f"{name} restore"].append(measured(functools.partial(restored, url, metadata, wanted)))
        locations.remove(url)


def report(times: Times, name: str, baseline: str) -> None:
    for action in ("save", "restore"):
        for index, unit in enumerate(("wall", "CPU")):
            ours, theirs = times[f"{name} {action}"], times[f"{baseline} {action}"]
            ratios = sorted(a[index] / b[index] for a, b in zip(ours, theirs, strict=True))
            quartiles = statistics.quantiles(ratios, n=4)
            median = statistics.median(value[index] for value in theirs)
            print(
                f"{name}, {action}, {unit}: {statistics.median(ratios):.3f} of {baseline} "
                f"(quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}), which takes {median:.2f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--arrays", type=int, default=128)
    parser.add_argument("--directory", type=Path, help="where the checkpoints are written (default: temporary)")
    parser.add_argument("--hashed", action="store_true", help="measure also the hashes of all files")
    options = parser.parse_args()
    state = make_state(options.megabytes * 2**20, options.arrays)
    names = (
        "plain",
        "one pass",
        "fingerprints",
        "manager",
        "no crc32c",
        "crc32c",
        *(["hashed"] if options.hashed else []),
    )
    times: Times = {f"{name} {action}": [] for name in names for action in ("save", "restore")}
    with tempfile.TemporaryDirectory(dir=options.directory) as root:
        for number in range(options.rounds + 1):
            local_round(Path(root), state, times, number, options.hashed)
            bucket_round(state, times, number)
            if number == 0:  # The first round compiles and loads.
                for values in times.values():
                    values.clear()
    for name in names:
        if name in ("one pass", "fingerprints", "manager", "hashed"):
            report(times, name, "plain")
    report(times, "crc32c", "no crc32c")


if __name__ == "__main__":
    main()
