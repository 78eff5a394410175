"""Attention on a CPU by length: CPU seconds and temporary memory of "blockwise" and "rowwise" beside "reference".

For each length the gradients of one attention over 8,192 tokens (at least one row) are computed by all backends in
turn; the ratios are medians over the turns. They show from which length "auto" may choose which backend on CPUs.

    python benchmarks/attention_by_length.py --lengths 128 256 512 1024 2048 4096
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t5x_like.kernels.attention import attention
from t5x_like.kernels.attention_masks import MaskSpec
from t5x_like.kernels.position_bias import RelativeBias

TOKENS, HEADS, WIDTH = 8192, 8, 64
BACKENDS = ("reference", "blockwise", "rowwise")


def program(kind: str, length: int, backend: str) -> tuple[Callable[[], Any], float]:
    """Return a function that computes the gradients once, and MiB of temporary memory."""
    rows = max(1, TOKENS // length)
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(rows, length, HEADS, WIDTH)), jnp.float32) for _ in range(3))
    table = jnp.asarray(random.normal(size=(32, HEADS)), jnp.float32)
    valid = jnp.asarray(np.arange(length) < length - 7, jnp.int32)[None].repeat(rows, 0)

    def loss(q: Array, k: Array, v: Array, table: Array) -> Array:
        match kind:
            case "encoder with bias":
                mask, bias = MaskSpec(kv_segment_ids=valid), RelativeBias(table, bidirectional=True, max_distance=128)
            case "causal":
                mask, bias = MaskSpec(causal=True), None
            case _:
                raise ValueError(kind)
        return jnp.sum(attention(q, k, v, mask, scale=0.125, relative_bias=bias, backend=backend) ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(q, k, v, table).compile()
    return (
        lambda: jax.block_until_ready(compiled(q, k, v, table)),
        compiled.memory_analysis().temp_size_in_bytes / 2**20,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    others = BACKENDS[1:]
    columns = ["attention", "length", "rows", "CPU s, reference", *(f"{name} / reference" for name in others)]
    columns += [f"MiB, {name}" for name in BACKENDS]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for kind in ("encoder with bias", "causal"):
        for length in arguments.lengths:
            runs, memory = zip(*(program(kind, length, backend) for backend in BACKENDS), strict=True)
            seconds: list[list[float]] = [[] for _ in BACKENDS]
            for run in runs:
                run()
            for _ in range(arguments.repeats):
                for run, found in zip(runs, seconds, strict=True):
                    start = time.process_time()
                    run()
                    found.append(time.process_time() - start)
            ratios = [statistics.median(b / a for a, b in zip(seconds[0], of, strict=True)) for of in seconds[1:]]
            cells = [kind, str(length), str(max(1, TOKENS // length)), f"{statistics.median(seconds[0]):.2f}"]
            cells += [f"{ratio:.2f}" for ratio in ratios] + [f"{mib:.0f}" for mib in memory]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
