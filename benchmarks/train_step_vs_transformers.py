"""CPU seconds of a T5 1.1 training step of t5x_like and of PyTorch's transformers, measured in one run.

    pip install -e '.[hf]'
    python benchmarks/train_step_vs_transformers.py

The model: d_model 256, d_ff 512 gated GELU, 4 + 4 layers, 4 heads of 64, vocabulary 32128 with an untied head (22.7M
parameters), float32, dropout 0.1, Adafactor; a batch of 16 rows of 256 encoder and 64 decoder tokens, random and full.

Each library runs in its own process. After warm-up they take turns, one step each, while the other waits. The cost of a
step is the CPU time of its process, which other work on the machine disturbs less than the wall clock. The reported
numbers are the medians, and the median of the ratios of neighboring steps. OpenMP threads sleep while they wait, so
that PyTorch's CPU time is work; on a busy machine `--cpus 1` is the steadiest comparison.

Each library runs as its users run it. transformers: eager PyTorch, its default attention, its Adafactor, mean
cross-entropy, and `lm_head` replaced because version 5 cannot configure an untied head. t5x_like: the step of `t5x-like
train`, with z-loss and the metrics of each step. Dropout masks are drawn as in T5X, one for all positions of a row
(`dropout_broadcast_length`), where transformers draws one number per element; `--full-dropout` makes t5x_like draw one
per element too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

VOCABULARY, ROWS, SOURCE, TARGET, DROPOUT = 32_128, 16, 256, 64, 0.1
D_MODEL, D_FF, LAYERS, HEADS, HEAD_DIM = 256, 512, 4, 4, 64
LEARNING_RATE = 1e-3


def random_batch() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    source, target = (random.integers(2, 32_000, (ROWS, length)).astype(np.int32) for length in (SOURCE, TARGET))
    return {
        "encoder_input_tokens": source,
        "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": target,
        "decoder_loss_weights": np.ones_like(target),
    }


def t5x_like_step(options: argparse.Namespace) -> Callable[[], float]:
    """Return a function that takes one step of t5x_like and returns the loss per token."""
    import dataclasses

    import jax

    from t5x_like.config import (
        AdafactorConfig,
        DataConfig,
        RunConfig,
        ScheduleConfig,
        ShardingConfig,
        SpanCorruption,
        TrainingConfig,
    )
    from t5x_like.models import presets
    from t5x_like.program import build_program

    model = presets.t5_1_1("small", dropout_rate=DROPOUT)
    size = {"num_layers": LAYERS, "d_model": D_MODEL, "d_ff": D_FF, "num_heads": HEADS, "num_kv_heads": HEADS}
    size |= {"head_dim": HEAD_DIM, "dropout_broadcast_length": not options.full_dropout}
    stacks = {name: dataclasses.replace(stack, **size) for name, stack in model.stacks.items()}
    run = RunConfig(
        name="benchmark",
        model=dataclasses.replace(model, **stacks, scan_layers=not options.unrolled),
        data=DataConfig(
            layout="encoder_decoder",
            mixture=(SpanCorruption(name="span_corruption"),),
            inputs_length=SOURCE,
            targets_length=TARGET,
        ),
        training=TrainingConfig(
            num_train_steps=1000,
            global_batch_size=ROWS,
            optimizer=AdafactorConfig(),
            schedule=ScheduleConfig(kind="constant", learning_rate=LEARNING_RATE, warmup_steps=0),
            max_gradient_norm=None,
        ),
        sharding=ShardingConfig(fsdp=1),
    )
    program = build_program(run, jax.devices()[:1])
    state = program.init()
    batch = program.shard_batch({"main": {**random_batch(), "denoiser_ids": np.zeros(ROWS, np.int32)}})

    def step() -> float:
        nonlocal state
        state, metrics = program.train_step(state, batch)
        jax.block_until_ready(state)
        loss = metrics["loss"]
        return float(loss.sum / loss.weight)

    return step


def transformers_step(options: argparse.Namespace) -> Callable[[], float]:
    """Return a function that takes one step of transformers and returns the loss per token."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    import torch
    import transformers
    from transformers.optimization import Adafactor

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=D_MODEL,
        d_kv=HEAD_DIM,
        d_ff=D_FF,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
        dropout_rate=DROPOUT,
        scale_decoder_outputs=False,
        use_cache=False,
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.lm_head = torch.nn.Linear(D_MODEL, VOCABULARY, bias=False)
    torch.nn.init.normal_(model.lm_head.weight, std=D_MODEL**-0.5)
    model.train()
    optimizer = Adafactor(model.parameters(), lr=LEARNING_RATE, relative_step=False, scale_parameter=True)
    batch = {name: torch.tensor(x).long() for name, x in random_batch().items()}
    mask = torch.ones_like(batch["encoder_input_tokens"])

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(
            input_ids=batch["encoder_input_tokens"],
            attention_mask=mask,
            decoder_input_ids=batch["decoder_input_tokens"],
            labels=batch["decoder_target_tokens"],
        ).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


LIBRARIES = {"t5x_like": t5x_like_step, "transformers": transformers_step}


def serve(name: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Take a step for each message and answer with its CPU seconds, its wall seconds and its loss."""
    if options.cpus:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cpus])
    step = LIBRARIES[name](options)
    for _ in range(options.warm_up):
        loss = step()
    pipe.send((0.0, 0.0, loss))
    while pipe.recv():
        cpu, wall = time.process_time(), time.perf_counter()
        loss = step()
        pipe.send((time.process_time() - cpu, time.perf_counter() - wall, loss))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    names = [options.only] if options.only else list(LIBRARIES)
    pipes, processes = {}, []
    for name in names:
        pipes[name], other_end = context.Pipe()
        process = context.Process(target=serve, args=(name, options, other_end), daemon=True)
        process.start()
        processes.append(process)
        pipes[name].recv()  # One library at a time, so that no compilation overlaps with a measurement.
    steps: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for _ in range(options.steps):
        for name, pipe in pipes.items():
            pipe.send(True)
            steps[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    report: dict[str, Any] = {"steps": options.steps, "cpus": options.cpus or len(os.sched_getaffinity(0))}
    for name, rows in steps.items():
        cpu, wall, losses = zip(*rows, strict=True)
        report[name] = {
            "cpu_seconds_median": round(statistics.median(cpu), 3),
            "cpu_seconds_min": round(min(cpu), 3),
            "wall_seconds_median": round(statistics.median(wall), 3),
            "loss_first": round(losses[0], 3),
            "loss_last": round(losses[-1], 3),
        }
    if len(names) == 2:
        ratios = [a[0] / b[0] for a, b in zip(steps["t5x_like"], steps["transformers"], strict=True)]
        report["ratio_of_cpu_seconds_median"] = round(statistics.median(ratios), 3)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--cpus", type=int, help="number of cores that each library may use (default: all)")
    parser.add_argument("--only", choices=list(LIBRARIES))
    parser.add_argument("--full-dropout", action="store_true", help="one random number per element in t5x_like as well")
    parser.add_argument("--unrolled", action="store_true", help="t5x_like without lax.scan over the layers")
    print(json.dumps(measure(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
