"""Held-out loss of a recipe's decoder beside a plain training loop of a GPT-2 of its size: equal steps and rows.

    python benchmarks/plain_loop.py [--rates 1e-3 2e-3 ...] [--recipe smoke:decoder] [--steps 300] [--seeds 3]

The loop is what one writes without this package: jax, optax's AdamW (weight decay 0.1, clipping at 1, warm-up and
cosine), GPT-2's layers and initial values. It is trained at each of the learning rates; the best one is to be compared
with the recipe, which `optimizer_quality.py recipe` trains on the same rows and scores on the same held-out rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import interleaved
import jax
import jax.numpy as jnp
import optax
from jax import Array

from t5x_like.config import RunConfig, StackConfig
from t5x_like.config.recipes import load_recipe
from t5x_like.data.store.prepare import prepare
from t5x_like.data.stream import heldout
from t5x_like.data.stream.data_source import open_data_source

Params = dict[str, Any]


def initial(key: Array, vocab_size: int, length: int, layers: int, width: int) -> Params:
    """Return GPT-2's initial values: a standard deviation of 0.02, smaller for what is added to the residual states."""
    keys = iter(jax.random.split(key, 2 + 4 * layers))

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return 0.02 * scale * jax.random.normal(next(keys), shape)

    out = (2 * layers) ** -0.5
    blocks = [
        {
            "norms": jnp.ones((2, width)),
            "qkv": normal(width, 3 * width),
            "out": normal(width, width, scale=out),
            "up": normal(width, 4 * width),
            "down": normal(4 * width, width, scale=out),
        }
        for _ in range(layers)
    ]
    return {
        "table": normal(vocab_size, width),
        "places": normal(length, width),
        "blocks": blocks,
        "norm": jnp.ones(width),
    }


def loss(params: Params, batch: Mapping[str, Array], heads: int) -> Array:
    """Return the mean cross-entropy of the scored tokens, in nats."""

    def normed(x: Array, scale: Array) -> Array:
        return scale * jax.nn.standardize(x, axis=-1, epsilon=1e-5)

    tokens = batch["decoder_input_tokens"]
    rows, length = tokens.shape
    x = params["table"][tokens] + params["places"][:length]
    for block in params["blocks"]:
        qkv = (normed(x, block["norms"][0]) @ block["qkv"]).reshape(rows, length, 3, heads, -1)
        attended = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)
        x += attended.reshape(x.shape) @ block["out"]
        x += jax.nn.gelu(normed(x, block["norms"][1]) @ block["up"]) @ block["down"]
    logits = normed(x, params["norm"]) @ params["table"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["decoder_target_tokens"])
    return jnp.average(losses, weights=batch["decoder_loss_weights"])


def trained(run: RunConfig, stack: StackConfig, source: Any, rate: float, seed: int, steps: int) -> tuple[float, float]:
    """Return the held-out loss after so many steps, and the CPU seconds of a step."""
    warmup = run.training.schedule.warmup_steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps, end_value=0.01 * rate)
    length = run.data.inputs_length + run.data.targets_length
    params = initial(jax.random.key(seed), run.model.vocab_size, length, stack.num_layers, stack.d_model)
    is_matrix = jax.tree.map(lambda each: each.ndim > 1, params)
    adamw = optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=is_matrix)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Params, state: Any, batch: Mapping[str, Array]) -> tuple[Params, Any]:
        gradients = jax.grad(loss)(params, batch, stack.num_heads)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    times = []
    batches = source.start(0, None, {})
    for _ in range(steps):
        batch = next(batches)["main"]
        begin = time.process_time()
        params, state = jax.block_until_ready(step(params, state, batch))
        times.append(time.process_time() - begin)
    batches.close()
    share = run.data.sources[0]
    objective = run.data.objectives_of(share)[0]
    score = jax.jit(loss, static_argnums=2)
    rows = run.training.global_batch_size
    scored = heldout.objective_batches(source.stores[0], run.data, share, rows, objective, 8, "validation")
    losses, weights = zip(
        *(
            (float(score(params, each["main"], stack.num_heads)), each["main"]["decoder_loss_weights"].sum())
            for each in scored
        ),
        strict=True,
    )
    return sum(a * float(b) for a, b in zip(losses, weights, strict=True)) / float(sum(weights)), statistics.median(
        times
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--recipe", default="smoke:decoder", help="one with a decoder and one causal objective")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--store-dir", default="build/optimizer_quality", type=Path)
    options = parser.parse_args()
    run = load_recipe(options.recipe)
    schedule = dataclasses.replace(run.training.schedule, warmup_steps=max(1, options.steps // 15))
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, store_dir=str(options.store_dir)),
        training=dataclasses.replace(run.training, schedule=schedule),
    )
    stack = run.model.decoder
    assert stack is not None, "the recipe has no decoder"
    prepare(run.data)
    print(json.dumps({"machine": interleaved.machine(), "options": vars(options)}, default=str), flush=True)
    for rate in options.rates:
        found = []
        for seed in range(options.seeds):
            source = open_data_source(dataclasses.replace(run.data, seed=seed), run.training.global_batch_size)
            found.append(trained(run, stack, source, rate, seed, options.steps))
        print(json.dumps({"rate": rate, **_summary(found)}), flush=True)


def _summary(found: Sequence[tuple[float, float]]) -> dict[str, Any]:
    losses = [loss for loss, _ in found]
    return {
        "loss": round(statistics.mean(losses), 4),
        "loss of each seed": [round(loss, 4) for loss in losses],
        "cpu_seconds_per_step": round(statistics.median(seconds for _, seconds in found), 4),
    }


if __name__ == "__main__":
    main()
