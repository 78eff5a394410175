"""CPU seconds of the guard, of the fingerprints of a checkpoint and of the replay check, relative to a step.

    python benchmarks/cost_of_checks.py --rounds 30

The smoke recipe's step is compiled three times: without the guard (its tests for finite numbers are replaced by
constants, so that XLA removes what depends on them), as it is, and with the detection of spikes. They take turns on
states and batches of their own, in one process; reported is the median of the ratios of neighboring steps. The other
two are taken per save and per check, and divided by the steps between two of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.checkpoints.fingerprints import fingerprints
from t5x_like.config import GuardConfig, RunConfig
from t5x_like.config.recipes import load_recipe
from t5x_like.program import Program, build_program
from t5x_like.trainer.replay_check import ReplayCheck
from t5x_like.training import train_step
from t5x_like.utils import tree_paths


class _NothingIsChecked:
    """jax.numpy, for which every number is finite."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    def isfinite(self, x: Any) -> Any:
        return jnp.ones(jnp.shape(x), bool)


def batch_of(program: Program) -> Any:
    random = np.random.default_rng(0)
    local = {
        name: {feature: random.integers(0, 2, array.shape).astype(array.dtype) for feature, array in arrays.items()}
        for name, arrays in program.batch_spec.items()
    }
    return program.shard_batch(local)


class Variant:
    """A step with its own state."""

    def __init__(self, run: RunConfig, is_checked: bool):
        self.program = build_program(run, jax.devices()[:1])
        self.state, self.batch = self.program.init(), batch_of(self.program)
        original, train_step.jnp = train_step.jnp, jnp if is_checked else _NothingIsChecked()  # type: ignore[assignment]
        self.step()
        train_step.jnp = original

    def step(self) -> None:
        self.state, metrics = self.program.train_step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))


def seconds(action: Callable[[], object], times: int) -> float:
    begun = time.process_time()
    for _ in range(times):
        action()
    return (time.process_time() - begun) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10, help="steps of each variant in a round")
    options = parser.parse_args()
    run = load_recipe("smoke")
    guard = GuardConfig(spike_threshold=6.0)
    watching = dataclasses.replace(run, training=dataclasses.replace(run.training, guard=guard))
    variants = {
        "no guard": Variant(run, False),
        "guard": Variant(run, True),
        "guard and spikes": Variant(watching, True),
    }
    measured: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(options.rounds):
        names = list(variants)
        for name in names[round_ % 3 :] + names[: round_ % 3]:
            measured[name].append(seconds(variants[name].step, options.steps))
    baseline = measured["no guard"]
    print(f"a step without the guard: {1e3 * statistics.median(baseline):.1f} ms of CPU time")
    for name, values in measured.items():
        ratio = statistics.median(value / base for value, base in zip(values, baseline, strict=True))
        print(f"{name}: {ratio:.4f} by the paired median, {sum(values) / sum(baseline):.4f} by the sums", flush=True)
    step = statistics.median(measured["guard"])
    guarded = variants["guard"]
    leaves = tree_paths.by_path(guarded.state)
    fingerprints(leaves)  # Compiles.
    every = run.checkpoints.save_every_steps
    cost = seconds(functools.partial(fingerprints, leaves), 20)
    print(f"fingerprints: {1e3 * cost:.1f} ms per save, {100 * cost / (every * step):.4f} % of {every} steps")
    check = ReplayCheck(1, guarded.program.train_step, guarded.program.mesh)

    def replayed() -> None:
        guarded.state, _ = check.run(1, guarded.state, guarded.batch)
        jax.block_until_ready(guarded.state)

    replayed()
    extra = seconds(replayed, 10) - step
    print(f"replay check: {1e3 * extra:.1f} ms per check, {100 * extra / (500 * step):.3f} % of 500 steps")


if __name__ == "__main__":
    main()
