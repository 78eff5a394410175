"""Continuous batching beside the batch engine: the same requests, in turns, in new tokens per second.

The batch engine has all prompts at once and decodes those of similar length together, 8 at a time; continuous batching
has 8 slots. A Llama-like model of random parameters (width 256, 8 layers, 32,128 tokens), greedy; prompts of 8 to 64
tokens, answers of exactly 16 to 64. Both compile everything first.

    python benchmarks/serve_vs_batch.py [--requests 64] [--turns 3]
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from t5x_like.config import CausalLM, DataConfig, ModelConfig, RunConfig, StackConfig, TrainingConfig
from t5x_like.decoding.continuous import Batcher, Request, Sizes
from t5x_like.decoding.generate import generate_tokens
from t5x_like.decoding.ready import ready_params
from t5x_like.decoding.sampling import Sampling
from t5x_like.models.build import build
from t5x_like.program import Program, assemble

VOCABULARY = 32128
LONGEST_PROMPT, LONGEST_ANSWER, AT_ONCE = 64, 64, 8


@dataclasses.dataclass(frozen=True)
class Asked:
    prompt: list[int]
    tokens: int


def program_of() -> Program:
    stack = StackConfig(num_layers=8, d_model=256, num_heads=4, num_kv_heads=4, head_dim=64, d_ff=688, positions="rope")
    run = RunConfig(
        name="served",
        model=ModelConfig(encoder=None, decoder=stack, vocab_size=VOCABULARY),
        data=DataConfig(layout="causal_lm", mixture=(CausalLM(),), inputs_length=64, targets_length=64),
        training=TrainingConfig(num_train_steps=1, batch_size=1),
    )
    return assemble(run, jax.devices()[:1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    draw = random.Random(0)
    requests = [
        Asked([draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(8, 65))], draw.randrange(16, 65))
        for _ in range(options.requests)
    ]
    program = program_of()
    params = ready_params(program, jax.jit(lambda: build(program.run.model, jax.random.key(0)))())
    # Without EOS, so that every answer has its whole length.
    allowed_V = np.arange(VOCABULARY) > 1
    batcher = Batcher(
        program,
        params,
        allowed_V=allowed_V,
        sizes=Sizes(slots=AT_ONCE, prompt_length=LONGEST_PROMPT, new_tokens=LONGEST_ANSWER),
    )

    def in_batches() -> list[list[int]]:
        return generate_tokens(
            program,
            params,
            [asked.prompt for asked in requests],
            allowed_V=allowed_V,
            max_new_tokens=[asked.tokens for asked in requests],
            batch_size=AT_ONCE,
        )

    def through_slots() -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in requests]
        for asked, answer in zip(requests, answers, strict=True):
            batcher.submit(
                Request(asked.prompt, asked.tokens, Sampling(), lambda new, _, answer=answer: answer.extend(new))
            )
        while batcher.waiting or batcher.taken:
            batcher.run_once()
        return answers

    batcher.warm_up()
    assert in_batches() == through_slots(), "the two engines do not say the same"
    total = sum(asked.tokens for asked in requests)
    seconds: dict[str, list[float]] = {"batch engine": [], "continuous": []}
    ways: dict[str, Callable[[], list[list[int]]]] = {"batch engine": in_batches, "continuous": through_slots}
    for _ in range(options.turns):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    for name, measured in seconds.items():
        rates = [total / one for one in measured]
        print(f"{name}: {max(rates):,.0f} new tokens/s at best, {statistics.median(rates):,.0f} in the middle")
    ratios = [batch / slots for batch, slots in zip(seconds["batch engine"], seconds["continuous"], strict=True)]
    print(f"continuous / batch engine, turn by turn: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
