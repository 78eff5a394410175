"""Held-out loss of students that learn from a teacher, and of the same students alone, after equal numbers of steps.

    python benchmarks/distillation.py

The text is the docstrings of Python's standard library, as bytes. A decoder is trained for long on it: the teacher. A
smaller decoder is trained for fewer steps, from several seeds of parameters and order of the rows: alone, with the
teacher computed in each step, and with the k most likely tokens of the teacher stored for each target. The students
of a seed see the same rows in the same order, so that their differences are paired. Printed are the losses of each
seed in nats per byte on the same held-out rows, the mean of the differences from the student alone, and its 95 %
interval by Student's t over the seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from t5x_like.config import (
    AdamWConfig,
    CausalLM,
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    DistillationConfig,
    EvaluationConfig,
    ModelConfig,
    MonitoringConfig,
    RunConfig,
    ScheduleConfig,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.data.store.prepare import prepare
from t5x_like.errors import EXIT_OK
from t5x_like.finetuning.base_model import with_teacher_model
from t5x_like.trainer.train import train

ROWS, LENGTH = 8, 128


def run_of(work: Path, name: str, *, layers: int, width: int, steps: int, rate: float, seed: int) -> RunConfig:
    stack = StackConfig(
        num_layers=layers,
        d_model=width,
        num_heads=width // 16,
        num_kv_heads=width // 16,
        head_dim=16,
        d_ff=4 * width,
        positions="rope",
    )
    return RunConfig(
        name=name,
        model=ModelConfig(encoder=None, decoder=stack, vocab_size=288),
        data=DataConfig(
            layout="causal_lm",
            mixture=(CausalLM(),),
            corpus=CorpusConfig(packages=False, validation_fraction=0.1),
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=0),
            inputs_length=0,
            targets_length=LENGTH,
            store_dir=str(work / "stores"),
            seed=seed,
        ),
        training=TrainingConfig(
            num_train_steps=steps,
            global_batch_size=ROWS,
            optimizer=AdamWConfig(weight_decay=0.0),
            schedule=ScheduleConfig(kind="cosine", learning_rate=rate, warmup_steps=20),
            seed=seed,
        ),
        checkpoints=CheckpointConfig(save_every_steps=steps),
        evaluation=EvaluationConfig(num_batches=32),
        monitoring=MonitoringConfig(writers=(), num_decoded_samples=0),
    )


def heldout_loss(run: RunConfig, work: Path) -> float:
    """Train the run, and return its loss on held-out rows."""
    with (work / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if train(run, work / run.name) != EXIT_OK:
            raise SystemExit(f"{run.name} was not trained: see {work / 'log.txt'}")
    return float(json.loads((work / run.name / "evaluation.json").read_text())["objectives"]["causal_lm"]["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="steps of a student")
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--top-k", type=int, nargs="*", default=[8, 32, 128])
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        compare(options, options.work or Path(temporary))


def compare(options: argparse.Namespace, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    student: dict[str, Any] = {"layers": 1, "width": 32, "steps": options.steps, "rate": 3e-3}
    teacher = run_of(work, "teacher", layers=2, width=96, steps=options.teacher_steps, rate=3e-3, seed=1000)
    prepare(teacher.data, report=lambda line: None)
    print(f"teacher: {heldout_loss(teacher, work):.4f} nats per byte", flush=True)
    live = DistillationConfig(teacher=str(work / "teacher"), weight=options.weight, temperature=options.temperature)
    arms: dict[str, DistillationConfig | None] = {"alone": None, "live": live}
    arms |= {f"top {k}": dataclasses.replace(live, top_k=k) for k in options.top_k}
    losses: dict[str, list[float]] = {arm: [] for arm in arms}
    for seed in range(options.seeds):
        for arm, distillation in arms.items():
            run = run_of(work, f"{arm.replace(' ', '_')}_{seed}", **student, seed=seed)
            training = dataclasses.replace(run.training, distillation=distillation)
            run = with_teacher_model(dataclasses.replace(run, training=training))
            losses[arm].append(heldout_loss(run, work))
        print(f"seed {seed}:", ", ".join(f"{arm} {found[-1]:.4f}" for arm, found in losses.items()), flush=True)
    for arm in arms:
        if arm != "alone":
            difference = np.array(losses[arm]) - np.array(losses["alone"])
            half = scipy.stats.t.ppf(0.975, len(difference) - 1) * scipy.stats.sem(difference)
            lower = f"lower for {(difference < 0).sum()} of {len(difference)} seeds"
            print(f"{arm} - alone: {difference.mean():+.4f} +- {half:.4f}, {lower}")


if __name__ == "__main__":
    main()
