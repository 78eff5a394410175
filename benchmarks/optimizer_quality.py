"""Held-out loss of a small run with different optimizers and initial values, at equal steps and on the same rows.

    python benchmarks/optimizer_quality.py [NAME ...] [--recipe smoke:decoder] [--steps 300] [--seeds 3]

Each candidate is the recipe with another optimizer, learning rate or initial values. All have the recipe's schedule
over the given number of steps. A seed decides the initial values and the rows; it is the same for all candidates. CPU
seconds of the steps exclude compilation and evaluation. `--scale` multiplies all learning rates.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import interleaved
import jax

from t5x_like.config import (
    AdafactorConfig,
    AdamWConfig,
    LambConfig,
    MuonConfig,
    OptaxOptimizer,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    ScheduleFreeConfig,
)
from t5x_like.config.recipes import load_recipe
from t5x_like.data.store.prepare import prepare
from t5x_like.data.stream.data_source import open_data_source
from t5x_like.evaluation.heldout_loss import evaluate_held_out
from t5x_like.monitoring.metrics import compute
from t5x_like.program import Program, build_program

Change = Callable[[RunConfig], RunConfig]


def optimizer(config: OptimizerConfig, learning_rate: float, kind: str | None = None) -> Change:
    """Return the change to an optimizer with this peak of the learning rate, and to another kind of schedule."""

    def changed(run: RunConfig) -> RunConfig:
        schedule = dataclasses.replace(run.training.schedule, learning_rate=learning_rate)
        if kind is not None:
            schedule = ScheduleConfig(kind=kind, learning_rate=learning_rate, warmup_steps=schedule.warmup_steps)  # type: ignore[arg-type]
        training = dataclasses.replace(run.training, optimizer=config, schedule=schedule)
        return dataclasses.replace(run, training=training)

    return changed


def initial_values(*, embedding: float | None = None, output: float | None = None, scale: bool = False) -> Change:
    """Return the change to other initial values.

    Args:
      embedding: Standard deviation of the token embeddings.
      output: Factor on the kernels that write to the residual states; None: (2 num_layers)**-0.5, as in GPT-2.
      scale: Multiply the embeddings by d_model**0.5.
    """

    def changed(run: RunConfig) -> RunConfig:
        stacks = {
            name: dataclasses.replace(
                stack, output_init_scale=(2 * stack.num_layers) ** -0.5 if output is None else output
            )
            for name, stack in run.model.stacks.items()
        }
        model = dataclasses.replace(
            run.model,
            **stacks,
            scale_embeddings=scale,
            embedding_stddev=run.model.embedding_stddev if embedding is None else embedding,
        )
        return dataclasses.replace(run, model=model)

    return changed


def both(*changes: Change) -> Change:
    def changed(run: RunConfig) -> RunConfig:
        for change in changes:
            run = change(run)
        return run

    return changed


ADAMW = optimizer(AdamWConfig(weight_decay=0.1), 8e-3)
MUON = optimizer(MuonConfig(weight_decay=0.1), 1.2e-2)
CANDIDATES: dict[str, Change] = {
    "recipe": lambda run: run,
    "adamw": ADAMW,
    "adamw, steps scaled by the parameters": optimizer(AdamWConfig(rms_scaled=True, weight_decay=0.0), 2e-2),
    "adafactor": optimizer(AdafactorConfig(), 2e-2),
    "lamb": optimizer(LambConfig(), 1e-2),
    "lion": optimizer(OptaxOptimizer(factory="lion", kwargs={"weight_decay": 0.1}), 5e-4),
    "schedule_free": optimizer(ScheduleFreeConfig(), 6e-3, "constant"),
    "muon": MUON,
    "recipe, GPT-2's initial values": initial_values(),
    "recipe, outputs 0": initial_values(output=0.0),
    "adamw, GPT-2's initial values": both(ADAMW, initial_values(embedding=0.02)),
    "muon, outputs 0": both(MUON, initial_values(output=0.0)),
    "muon, scaled embeddings": both(MUON, initial_values(output=0.0, scale=True)),
}


def trained(program: Program, source: Any, seed: int, steps: int) -> dict[str, Any]:
    """Return the scores after so many steps, the mean training loss of each tenth of them, and the CPU seconds of a
    step."""
    training = dataclasses.replace(program.run.training, seed=seed)
    state = dataclasses.replace(program, run=dataclasses.replace(program.run, training=training)).init()
    batches = source.start(0, None, {})
    times, losses = [], []
    for _ in range(steps):
        batch = program.shard_batch(next(batches))
        begin = time.process_time()
        state, metrics = program.train_step(state, batch)
        losses.append(compute(metrics["loss"]))
        times.append(time.process_time() - begin)
    batches.close()
    scores = evaluate_held_out(program, program.full_params(state), source.stores, step=steps, num_batches=8)
    objectives = scores["objectives"].values()
    found = {"loss": statistics.mean(each["loss"] for each in objectives)}
    if scores["prefix_lm"] is not None:
        found["bits_per_byte"] = scores["prefix_lm"]["bits_per_byte"]
    size = max(steps // 10, 1)
    curve = [round(statistics.mean(losses[at : at + size]), 4) for at in range(0, steps, size)]
    return {"scores": found, "curve": curve, "cpu_seconds_per_step": statistics.median(times)}


def compare(candidates: Mapping[str, Change], description: str | None) -> None:
    """Train each candidate with each seed, and print its scores."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(candidates), help="candidates; default: all")
    parser.add_argument("--recipe", default="smoke:decoder")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--store-dir", default="build/optimizer_quality", type=Path)
    parser.add_argument("--stdlib", action="store_true", help="text of the standard library alone, without packages")
    options = parser.parse_args()
    base = load_recipe(options.recipe)
    corpus = dataclasses.replace(base.data.corpus, packages=False) if options.stdlib else base.data.corpus
    base = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, corpus=corpus, store_dir=str(options.store_dir)),
        training=dataclasses.replace(
            base.training,
            num_train_steps=options.steps,
            schedule=dataclasses.replace(base.training.schedule, warmup_steps=max(1, options.steps // 15)),
        ),
    )
    prepare(base.data)
    print(json.dumps({"machine": interleaved.machine(), "options": vars(options)}, default=str), flush=True)
    for name in options.names:
        run = candidates[name](base)
        schedule = dataclasses.replace(
            run.training.schedule, learning_rate=run.training.schedule.learning_rate * options.scale
        )
        run = dataclasses.replace(run, training=dataclasses.replace(run.training, schedule=schedule))
        program = build_program(run, jax.devices()[:1])
        results = []
        for seed in range(options.seeds):
            source = open_data_source(dataclasses.replace(run.data, seed=seed), run.training.global_batch_size)
            results.append(trained(program, source, seed, options.steps))
        jax.clear_caches()
        print(json.dumps({name: _summary(results)}), flush=True)


def _summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for key in results[0]["scores"]:
        values = [result["scores"][key] for result in results]
        summary[key] = round(statistics.mean(values), 4)
        if len(values) > 1:
            summary[f"{key} of each seed"] = [round(value, 4) for value in values]
            summary[f"{key}, standard error"] = round(statistics.stdev(values) / math.sqrt(len(values)), 4)
    times = [result["cpu_seconds_per_step"] for result in results]
    curves = {f"curve of seed {seed}": result["curve"] for seed, result in enumerate(results)}
    return {**summary, "cpu_seconds_per_step": round(statistics.median(times), 4), **curves}


if __name__ == "__main__":
    compare(CANDIDATES, __doc__)
