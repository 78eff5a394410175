"""Best learning rate at several widths, with muP's transfer between widths and without it.

    python benchmarks/width_transfer.py [--widths 32 64 128 256] [--steps 150] [--seeds 1]

Decoders of two layers learn the bytes of Python's documentation with AdamW, at learning rates that differ by factors
of two. Printed are the mean losses of the last tenth of the steps, the learning rate with the smallest one at each
width, and the vertex of the parabola through it and its neighbours, in powers of two. With the transfer
(`config.width_transfer`) the best learning rate should be the same at all widths; without it, it falls as they grow.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import interleaved
import jax
import jax.numpy as jnp

from t5x_like.config import (
    AdamWConfig,
    CausalLM,
    CorpusConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    StackConfig,
    TokenizerConfig,
    TrainingConfig,
)
from t5x_like.config.width_transfer import width_transfer
from t5x_like.data.store.prepare import prepare
from t5x_like.data.stream.data_source import open_data_source
from t5x_like.models.factory import abstract_model, bind_params, init_params
from t5x_like.monitoring.metrics import compute
from t5x_like.training.optimizers.make_optimizer import make_optimizer
from t5x_like.training.train_step import init_state, make_train_step

HEAD_DIM, ROWS, LENGTH = 16, 8, 64


def run_of(width: int, steps: int, store_dir: Path) -> RunConfig:
    stack = StackConfig(
        num_layers=2,
        d_model=width,
        num_heads=width // HEAD_DIM,
        num_kv_heads=width // HEAD_DIM,
        head_dim=HEAD_DIM,
        d_ff=3 * width,
        positions="rope",
    )
    return RunConfig(
        name="width_transfer",
        model=ModelConfig(encoder=None, decoder=stack, vocab_size=288, embedding_stddev=1.0),
        data=DataConfig(
            corpus=CorpusConfig(packages=False, max_documents=400),
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=16),
            layout="causal_lm",
            mixture=(CausalLM(),),
            inputs_length=0,
            targets_length=LENGTH,
            store_dir=str(store_dir),
        ),
        training=TrainingConfig(
            num_train_steps=steps,
            global_batch_size=ROWS,
            optimizer=AdamWConfig(weight_decay=0.0),
            schedule=ScheduleConfig(kind="constant", warmup_steps=0),
        ),
    )


def losses_of(run: RunConfig, rates: list[float], seeds: int) -> dict[float, float]:
    """Return the mean loss of the last tenth of the steps by learning rate; NaN if it is not finite."""
    spec = abstract_model(run.model)
    optimizer = make_optimizer(run.training, spec.logical_axes)
    steps = run.training.num_train_steps

    def apply(params: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None) -> Any:
        return bind_params(spec.graphdef, params).output(batch, dropout_rng=rng)

    # The learning rate is an argument, so that one program serves all of them.
    @jax.jit
    def step(state: Any, batch: Any, rate: jax.Array) -> Any:
        warmed_up = jnp.minimum(1.0, (state["step"] + 1) / (steps // 15 + 1))
        state, metrics = make_train_step(run, apply, optimizer, lambda _: rate * warmed_up)(state, batch)
        return state, metrics["loss"]

    source = open_data_source(run.data, ROWS)
    batches = source.start(0, None, {})
    texts = [next(batches) for _ in range(steps)]
    batches.close()
    begin = jax.jit(lambda key: init_state(init_params(run.model, key), optimizer, 0))
    found = {}
    for rate in rates:
        losses = []
        for seed in range(seeds):
            state = begin(jax.random.key(seed))
            last = []
            for number, batch in enumerate(texts):
                state, loss = step(state, batch, rate)
                if number >= steps - max(steps // 10, 1):
                    last.append(compute(loss))
            losses.append(statistics.mean(last))
        found[rate] = statistics.mean(losses)
    return found


def best(losses: dict[float, float]) -> tuple[float, float]:
    """Return the rate with the smallest loss, and the vertex of the parabola through it and its neighbours, as log2."""
    rates = sorted(losses)
    index = min(range(len(rates)), key=lambda i: losses[rates[i]] if math.isfinite(losses[rates[i]]) else math.inf)
    center = math.log2(rates[index])
    if 0 < index < len(rates) - 1:
        below, middle, above = (losses[rates[i]] for i in (index - 1, index, index + 1))
        curvature = below - 2.0 * middle + above
        center += 0.5 * (below - above) / curvature if math.isfinite(curvature) and curvature > 0 else 0.0
    return rates[index], center


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256], help="multiples of 16")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--log2-rates", type=int, nargs=2, default=[-9, -3], help="first and last power of two")
    parser.add_argument("--store-dir", default="build/width_transfer", type=Path)
    options = parser.parse_args()
    rates = [2.0**power for power in range(options.log2_rates[0], options.log2_rates[1] + 1)]
    prepare(run_of(options.widths[0], options.steps, options.store_dir).data)
    print(json.dumps({"machine": interleaved.machine(), "options": vars(options)}, default=str), flush=True)
    for transfer in (True, False):
        vertices = []
        for width in options.widths:
            run = run_of(width, options.steps, options.store_dir)
            if transfer:
                run = width_transfer(run, options.widths[0])
            losses = losses_of(run, rates, options.seeds)
            rate, vertex = best(losses)
            vertices.append(vertex)
            shown = {f"2^{round(math.log2(each))}": round(loss, 4) for each, loss in losses.items()}
            record = {"transfer": transfer, "width": width, "losses": shown, "best": math.log2(rate), "vertex": vertex}
            print(json.dumps(record), flush=True)
            jax.clear_caches()
        spread = max(vertices) - min(vertices)
        print(json.dumps({"transfer": transfer, "spread of the best rates in powers of two": round(spread, 2)}))


if __name__ == "__main__":
    main()
