"""New tokens per second of continuous batching and of the batch engine, for the same requests in turns.

The batch engine has all prompts at once and decodes those of similar length together, 8 at a time; continuous batching
has 8 slots. The model is like Llama, with random parameters (width 256, 8 layers, 32,128 tokens), decoded greedily;
prompts have 8 to 64 tokens, answers exactly 16 to 64. Both engines compile everything first.

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
from t5x_like.decoding.continuous_batching import Batcher, BatcherConfig
from t5x_like.decoding.engine import generate_tokens
from t5x_like.decoding.inference_params import inference_params
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.slot_requests import Request
from t5x_like.models.factory import init_params
from t5x_like.program import Program, build_program

VOCABULARY = 32128
MAX_PROMPT, MAX_ANSWER, BATCH_SIZE = 64, 64, 8


@dataclasses.dataclass(frozen=True)
class PromptAndLength:
    prompt: list[int]
    tokens: int


def build() -> Program:
    stack = StackConfig(num_layers=8, d_model=256, num_heads=4, num_kv_heads=4, head_dim=64, d_ff=688, positions="rope")
    run = RunConfig(
        name="served",
        model=ModelConfig(encoder=None, decoder=stack, vocab_size=VOCABULARY),
        data=DataConfig(layout="causal_lm", mixture=(CausalLM(),), inputs_length=64, targets_length=64),
        training=TrainingConfig(num_train_steps=1, global_batch_size=1),
    )
    return build_program(run, jax.devices()[:1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    draw = random.Random(0)
    requests = [
        PromptAndLength([draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(8, 65))], draw.randrange(16, 65))
        for _ in range(options.requests)
    ]
    program = build()
    params = inference_params(program, jax.jit(lambda: init_params(program.run.model, jax.random.key(0)))())
    # EOS is excluded, so that every answer has its full length.
    allowed_V = np.arange(VOCABULARY) > 1
    batcher = Batcher(
        program,
        params,
        allowed_V=allowed_V,
        config=BatcherConfig(slots=BATCH_SIZE, max_prompt_length=MAX_PROMPT, max_new_tokens=MAX_ANSWER),
    )

    def in_batches() -> list[list[int]]:
        return generate_tokens(
            program,
            params,
            [request.prompt for request in requests],
            allowed_V=allowed_V,
            max_new_tokens=[request.tokens for request in requests],
            batch_size=BATCH_SIZE,
        )

    def through_slots() -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in requests]
        for request, answer in zip(requests, answers, strict=True):
            batcher.submit(
                Request(request.prompt, request.tokens, Sampling(), lambda new, _, answer=answer: answer.extend(new))
            )
        while batcher.num_waiting or batcher.num_active:
            batcher.run_once()
        return answers

    batcher.warm_up()
    assert in_batches() == through_slots(), "the two engines give different answers"
    total = sum(request.tokens for request in requests)
    seconds: dict[str, list[float]] = {"batch engine": [], "continuous": []}
    engines: dict[str, Callable[[], list[list[int]]]] = {"batch engine": in_batches, "continuous": through_slots}
    for _ in range(options.turns):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine()
            seconds[name].append(time.perf_counter() - start)
    for name, measured in seconds.items():
        rates = [total / one for one in measured]
        print(f"{name}: {max(rates):,.0f} new tokens/s at most, {statistics.median(rates):,.0f} in the median")
    ratios = [batch / slots for batch, slots in zip(seconds["batch engine"], seconds["continuous"], strict=True)]
    print(f"continuous / batch engine, turn by turn: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
