"""CPU seconds of a training step of t5x_like, of eager transformers and of torch.compile, measured in one run.

    pip install -e '.[hf]'
    python benchmarks/train_step_vs_transformers.py [t5] [llama] [bert]

The cases, all in float32 with Adafactor, on batches that are random and full:

  t5     T5 1.1: d_model 256, d_ff 512 gated GELU, 4 + 4 layers, 4 heads of 64, vocabulary 32128 with an untied head
         (22.7M parameters), dropout 0.1; 16 rows of 256 encoder and 64 decoder tokens.
  llama  A Llama-style decoder: d_model 256, d_ff 1024, 8 layers, 4 heads of 64, vocabulary 32128 with an untied head; 8
         rows of 512 tokens.
  bert   A BERT-like encoder: d_model 256, d_ff 1024, 8 layers, 4 heads of 64, vocabulary 30522, dropout 0.1; 32 rows of
         128 tokens, of which 15 % have a loss.

The libraries run in turns, each in its own process (`interleaved.py`); the ratios are medians of the ratios of
neighboring steps. Each library runs as its users run it. transformers: eager PyTorch, its default attention, its
Adafactor, mean cross-entropy, and T5's `lm_head` replaced because version 5 cannot configure an untied head. t5x_like:
the step of `t5x-like train` with its allocator settings, z-loss and the metrics of each step. Dropout masks are drawn
as in T5X, one for all positions of a row (`dropout_broadcast_length`), where transformers draws one number per element;
`--full-dropout` makes t5x_like draw one per element too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import interleaved
import numpy as np

CASES = ("t5", "llama", "bert")
VOCABULARY = {"t5": 32_128, "llama": 32_128, "bert": 30_522}
ROWS = {"t5": 16, "llama": 8, "bert": 32}
LENGTH = {"t5": 256, "llama": 512, "bert": 128}
T5_TARGET, DROPOUT, LEARNING_RATE = 64, 0.1, 1e-3
D_MODEL, HEADS, HEAD_DIM = 256, 4, 64


def random_batch(case: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return random.integers(2, 30_000, (ROWS[case], length)).astype(np.int32)

    ids = tokens(LENGTH[case])
    if case == "bert":
        weights = (random.random(ids.shape) < 0.15).astype(np.int32)
        return {"encoder_input_tokens": ids, "encoder_target_tokens": ids, "encoder_loss_weights": weights}
    target = tokens(T5_TARGET) if case == "t5" else ids
    decoder = {
        "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": target,
        "decoder_loss_weights": np.ones_like(target),
    }
    return decoder | ({"encoder_input_tokens": ids} if case == "t5" else {})


def t5x_like_step(options: argparse.Namespace) -> Callable[[], float]:
    """Return a function that takes one step of t5x_like and returns the loss per token."""
    from t5x_like.hardware import cpu_allocator

    if not options.usual_allocator:
        cpu_allocator.keep_freed_memory()
    import jax

    from t5x_like.program import build_program

    program = build_program(run_of(options), jax.devices()[:1])
    state = program.init()
    case = options.case
    batch = program.shard_batch({"main": {**random_batch(case), "denoiser_ids": np.zeros(ROWS[case], np.int32)}})
    compiled = False

    def step() -> float:
        nonlocal state, compiled
        state, metrics = program.train_step(state, batch)
        jax.block_until_ready(state)
        if compiled:
            cpu_allocator.limit_growth(lambda: None)
        else:
            cpu_allocator.compilation_ended(lambda: None)
            compiled = True
        loss = metrics["loss"]
        return float(loss.sum / loss.weight)

    return step


def run_of(options: argparse.Namespace) -> Any:
    """Return the run whose step is measured."""
    from t5x_like.config import (
        AdafactorConfig,
        CausalLM,
        DataConfig,
        MaskedLM,
        RunConfig,
        ScheduleConfig,
        ShardingConfig,
        SpanCorruption,
        TrainingConfig,
    )
    from t5x_like.models import presets

    case = options.case
    layers, d_ff = (4, 512) if case == "t5" else (8, 1024)
    size = {"num_layers": layers, "d_model": D_MODEL, "d_ff": d_ff, "num_heads": HEADS, "num_kv_heads": HEADS}
    size["head_dim"] = HEAD_DIM
    length = LENGTH[case]
    match case:
        case "t5":
            model = presets.t5_1_1("small", dropout_rate=DROPOUT)
            size["dropout_broadcast_length"] = not options.full_dropout
            data = DataConfig(
                layout="encoder_decoder",
                mixture=(SpanCorruption(name="span_corruption"),),
                inputs_length=length,
                targets_length=T5_TARGET,
            )
        case "llama":
            model = dataclasses.replace(presets.llama_3("1b"), tie_embeddings=False, dtype="float32", remat="none")
            half = length // 2
            data = DataConfig(layout="causal_lm", mixture=(CausalLM(),), inputs_length=half, targets_length=half)
        case "bert":
            model = presets.bert("base")
            data = DataConfig(layout="encoder", mixture=(MaskedLM(),), inputs_length=length, targets_length=0)
        case _:
            raise ValueError(case)
    stacks = {name: dataclasses.replace(stack, **size) for name, stack in model.stacks.items()}
    scan = model.scan_layers and not options.unrolled
    return RunConfig(
        name="benchmark",
        model=dataclasses.replace(model, **stacks, scan_layers=scan, vocab_size=VOCABULARY[case]),
        data=data,
        training=TrainingConfig(
            num_train_steps=1000,
            global_batch_size=ROWS[case],
            optimizer=AdafactorConfig(),
            schedule=ScheduleConfig(kind="constant", learning_rate=LEARNING_RATE, warmup_steps=0),
            max_gradient_norm=None,
            loss_chunk_tokens=options.loss_chunk_tokens,
        ),
        sharding=ShardingConfig(fsdp=1),
    )


def transformers_step(options: argparse.Namespace, *, compiled: bool = False) -> Callable[[], float]:
    """Return a function that takes one step of transformers and returns the loss per token."""
    import torch
    from transformers.optimization import Adafactor

    if options.cpus:
        torch.set_num_threads(options.cpus)
    torch.manual_seed(0)
    model = _transformers_model(options.case)
    model.train()
    optimizer = Adafactor(model.parameters(), lr=LEARNING_RATE, relative_step=False, scale_parameter=True)
    batch = {name: torch.tensor(x).long() for name, x in random_batch(options.case).items()}
    match options.case:
        case "t5":
            inputs = {
                "input_ids": batch["encoder_input_tokens"],
                "attention_mask": torch.ones_like(batch["encoder_input_tokens"]),
                "decoder_input_ids": batch["decoder_input_tokens"],
                "labels": batch["decoder_target_tokens"],
            }
        case "llama":
            # transformers shifts the labels itself.
            inputs = {"input_ids": batch["decoder_target_tokens"], "labels": batch["decoder_target_tokens"]}
        case "bert":
            ids = batch["encoder_input_tokens"]
            labels = torch.where(batch["encoder_loss_weights"] > 0, ids, -100)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        case _:
            raise ValueError(options.case)
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(**inputs).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def _transformers_model(case: str) -> Any:
    import torch
    import transformers

    vocabulary, length = VOCABULARY[case], LENGTH[case]
    match case:
        case "t5":
            config = transformers.T5Config(
                vocab_size=vocabulary,
                d_model=D_MODEL,
                d_kv=HEAD_DIM,
                d_ff=512,
                num_layers=4,
                num_heads=HEADS,
                feed_forward_proj="gated-gelu",
                dropout_rate=DROPOUT,
                scale_decoder_outputs=False,
                use_cache=False,
            )
            model = transformers.T5ForConditionalGeneration(config)
            model.lm_head = torch.nn.Linear(D_MODEL, vocabulary, bias=False)
            torch.nn.init.normal_(model.lm_head.weight, std=D_MODEL**-0.5)
            return model
        case "llama":
            config = transformers.LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=D_MODEL,
                intermediate_size=1024,
                num_hidden_layers=8,
                num_attention_heads=HEADS,
                num_key_value_heads=HEADS,
                max_position_embeddings=length,
                bos_token_id=0,
                eos_token_id=1,
                use_cache=False,
            )
            return transformers.LlamaForCausalLM(config)
        case "bert":
            config = transformers.BertConfig(
                vocab_size=vocabulary,
                hidden_size=D_MODEL,
                intermediate_size=1024,
                num_hidden_layers=8,
                num_attention_heads=HEADS,
                max_position_embeddings=512,
                hidden_dropout_prob=DROPOUT,
                attention_probs_dropout_prob=DROPOUT,
            )
            return transformers.BertForMaskedLM(config)
        case _:
            raise ValueError(case)


def compiled_step(options: argparse.Namespace) -> Callable[[], float]:
    """Return `transformers_step` of a model compiled by torch, which needs a C++ compiler."""
    return transformers_step(options, compiled=True)


LIBRARIES = {"t5x_like": t5x_like_step, "transformers": transformers_step, "torch.compile": compiled_step}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full-dropout", action="store_true", help="one random number per element in t5x_like as well")
    parser.add_argument("--unrolled", action="store_true", help="t5x_like without lax.scan over the layers")
    parser.add_argument("--usual-allocator", action="store_true", help="t5x_like without `cpu_allocator`")
    parser.add_argument("--loss-chunk-tokens", type=int, help="`training.loss_chunk_tokens` (default: automatic)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"cases of {', '.join(CASES)} (default: all)")
    parser.add_argument("--only", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    interleaved.add_options(parser, turns=12)
    add_options(parser)
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": interleaved.machine()}
    for case in options.cases:
        named = argparse.Namespace(**vars(options), case=case)
        records = interleaved.measure({name: LIBRARIES[name] for name in options.only}, named)
        report[case] = {name: record.summary() for name, record in records.items()}
        for name, record in records.items():
            if not record.error:
                report[case][name]["loss_last"] = round(record.turns[-1].result, 3)
        peers = [peer for peer in ("transformers", "torch.compile") if peer in records]
        report[case]["ratios"] = {peer: interleaved.ratio(records, "t5x_like", peer) for peer in peers}
        print(json.dumps({case: report[case]}), flush=True)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
