"""New tokens per second of greedy and beam decoding of t5x_like and of PyTorch's transformers, measured in one run.

    pip install -e '.[hf]'
    python benchmarks/decode_vs_transformers.py

Both have the same weights in float32: transformers creates and saves a model, and t5x_like imports its files. The
cases:

  llama      8 layers of d_model 256, d_ff 1024, 4 heads of 64, vocabulary 32128 with an untied head; greedy, a batch
             of 8 prompts of 64 tokens, 64 new tokens each.
  t5         T5 1.1 with 8 + 8 such layers; greedy, 8 inputs of 256 tokens, 64 new tokens each.
  beam       The decoder of `llama`, 8 prompts of 64, 4 beams, 64 new tokens each.
  step       A decoding step of `llama` for one row (after 65 to 128 tokens), compared with reading the parameters that
             the step must read once, by a plain sum: all except the token table, of which it reads one row.

The end token is excluded, so that all tokens are generated. The two libraries run in turns, each in a process of its
own (`interleaved.py`). The ratios are medians of the ratios of neighboring turns, and the tokens are compared.
Each library runs as its users run it: transformers its `generate` with its default attention and cache, t5x_like
`generate_tokens` on parameters in the layout of `inference_params`, compiled before. On a busy machine PyTorch's
threads wait for each other in time slices that the machine does not give them: there, `--cpus 1` compares one thread
with one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import interleaved
import numpy as np

if TYPE_CHECKING:
    # The process of transformers imports this module, too, and its memory is measured.
    from t5x_like.decoding.inference_params import InferenceParams
    from t5x_like.program import Program

VOCABULARY, D_MODEL, D_FF, LAYERS, HEADS, HEAD_DIM = 32_128, 256, 1024, 8, 4, 64
ROWS, NEW, EOS = 8, 64, 1
PROMPT = {"llama": 64, "t5": 256}
CASES = ("llama", "t5", "beam", "step")


def transformers_model(kind: str) -> Any:
    """Return a transformers model with random weights so large that its tokens depend on the prompt."""
    import torch
    import transformers

    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=D_MODEL,
            intermediate_size=D_FF,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=512,
            initializer_range=0.08,
            bos_token_id=0,
            eos_token_id=EOS,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=D_MODEL,
            d_kv=HEAD_DIM,
            d_ff=D_FF,
            num_layers=LAYERS,
            num_heads=HEADS,
            feed_forward_proj="gated-gelu",
            scale_decoder_outputs=False,
            decoder_start_token_id=0,
            initializer_factor=1.0,
        )
        model = transformers.T5ForConditionalGeneration(config)
        model.lm_head = torch.nn.Linear(D_MODEL, VOCABULARY, bias=False)
        torch.nn.init.normal_(model.lm_head.weight, std=D_MODEL**-0.5)
    return model.eval()


def save_model(kind: str, folder: str) -> None:
    transformers_model(kind).save_pretrained(folder)


@contextlib.contextmanager
def saved_model(kind: str) -> Iterator[Path]:
    """Save the model of transformers, by a process that ends before anything is measured."""
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(target=save_model, args=(kind, folder))
        process.start()
        process.join()
        yield Path(folder)


def imported_model(kind: str, folder: Path) -> tuple[Program, InferenceParams]:
    """Return the same model, imported from its files."""
    import jax

    from t5x_like.config import CausalLM, DataConfig, RunConfig, SpanCorruption, TrainingConfig
    from t5x_like.decoding.inference_params import inference_params
    from t5x_like.interop.huggingface.checkpoint import open_directory
    from t5x_like.program import build_program

    source = open_directory(folder, scale_logits=False if kind == "t5" else None)
    one_stream = kind == "llama"
    run = RunConfig(
        name="benchmark",
        model=source.model,
        data=DataConfig(
            layout="causal_lm" if one_stream else "encoder_decoder",
            mixture=(CausalLM() if one_stream else SpanCorruption(name="span_corruption"),),
            inputs_length=PROMPT[kind],
            targets_length=NEW,
        ),
        training=TrainingConfig(num_train_steps=1, global_batch_size=ROWS),
    )
    program = build_program(run, jax.devices()[:1])
    params = jax.block_until_ready(source.params(program.abstract_params))
    return program, jax.block_until_ready(inference_params(program, params))


def model_kind(case: str) -> str:
    return "t5" if case == "t5" else "llama"


def _beams(case: str) -> int:
    return 4 if case == "beam" else 1


def _prompts(kind: str) -> np.ndarray:
    """Return the tokens of the prompts; the first one of a decoder's prompt is its start token."""
    prompts = np.random.default_rng(0).integers(2, 32_000, (ROWS, PROMPT[kind]))
    return prompts if kind == "t5" else np.pad(prompts[:, 1:], ((0, 0), (1, 0)), constant_values=0)


def transformers_decoder(options: argparse.Namespace) -> Callable[[], np.ndarray]:
    """Return a function that decodes the whole batch and returns the new tokens [ROWS, NEW]."""
    import torch

    if options.cpus:
        torch.set_num_threads(options.cpus)
    kind = model_kind(options.case)
    model = transformers_model(kind)
    ids = torch.tensor(_prompts(kind))
    settings: dict[str, Any] = {"do_sample": False, "num_beams": _beams(options.case)}
    settings |= {"max_new_tokens": NEW, "min_new_tokens": NEW}

    def run() -> np.ndarray:
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
        return out[:, -NEW:].numpy()

    return run


def t5x_like_decoder(options: argparse.Namespace) -> Callable[[], np.ndarray]:
    """The same of t5x_like, which adds the start token itself."""
    from t5x_like.decoding.beam_search import BeamSearch
    from t5x_like.decoding.engine import beam_tokens, generate_tokens

    kind, beams = model_kind(options.case), _beams(options.case)
    program, params = imported_model(kind, options.folder)
    prompts = _prompts(kind)
    rows = [row.tolist() for row in (prompts if kind == "t5" else prompts[:, 1:])]
    allowed_V = np.arange(VOCABULARY) != EOS

    def run() -> np.ndarray:
        if beams > 1:
            beams_by_row = beam_tokens(
                program, params, rows, search=BeamSearch(size=beams), allowed_V=allowed_V, max_new_tokens=NEW
            )
            return np.array([hypotheses[0].tokens for hypotheses in beams_by_row])
        return np.array(generate_tokens(program, params, rows, allowed_V=allowed_V, max_new_tokens=NEW))

    return run


LIBRARIES = {"t5x_like": t5x_like_decoder, "transformers": transformers_decoder}


class Seconds(NamedTuple):
    wall: float
    cpu: float


def in_turns(functions: dict[str, Callable[[], Any]], turns: int) -> dict[str, Seconds]:
    """Run the functions in turns and return the smallest times of each."""
    best = dict.fromkeys(functions, Seconds(float("inf"), float("inf")))
    for _ in range(turns):
        for name, function in functions.items():
            time.sleep(0.3)
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            taken = Seconds(time.perf_counter() - wall, time.process_time() - cpu)
            best[name] = Seconds(*map(min, best[name], taken))
    return best


def compare(case: str, options: argparse.Namespace) -> tuple[dict[str, interleaved.Record], dict[str, Any]]:
    """Return the measurements of a case, and its tokens per second, ratios and share of equal tokens."""
    with saved_model(model_kind(case)) as folder:
        records = interleaved.measure(LIBRARIES, argparse.Namespace(**vars(options), case=case, folder=folder))
    report: dict[str, Any] = {name: record.summary() for name, record in records.items()}
    report["ratios"] = {"transformers": interleaved.ratio(records, "t5x_like", "transformers")}
    if report["ratios"]["transformers"] is not None:
        for name in records:
            report[name]["new_tokens_per_second"] = round(ROWS * NEW / report[name]["wall_seconds"])
        tokens = [record.turns[-1].result for record in records.values()]
        report["same_tokens"] = round(float(np.mean(tokens[0] == tokens[1])), 4)
    return records, report


def one_step(turns: int) -> dict[str, Any]:
    """Measure the seconds of a decoding step for one row, and of reading its parameters."""
    import jax
    import jax.numpy as jnp

    from t5x_like.decoding.decode_loop import decode_rows, read_prompts
    from t5x_like.decoding.inference_params import decoding_model

    with saved_model("llama") as folder:
        program, params = imported_model("llama", folder)
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 32_000, (1, PROMPT["llama"])), jnp.int32)

    @jax.jit
    def decode(params: InferenceParams, limits: jax.Array) -> jax.Array:
        with program.mesh_context():
            model = decoding_model(program, params)
            logits, cache = read_prompts(model, tokens, jnp.array([tokens.shape[1]]), NEW)

            def choose(logits: jax.Array, state: None) -> tuple[jax.Array, jax.Array, None]:
                return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(1, bool), None

            return decode_rows(
                model, logits, cache, choose=choose, selection_state=None, limits_R=limits, buffer_length=NEW
            ).tokens_RxN

    read = dict(params.params)
    del read["token_embedder"]

    @jax.jit
    def total(leaves: Any) -> list[jax.Array]:
        return [jnp.sum(leaf) for leaf in jax.tree.leaves(leaves)]

    few, many = (jnp.array([count], jnp.int32) for count in (8, NEW))
    functions = {
        "few": lambda: jax.block_until_ready(decode(params, few)),
        "many": lambda: jax.block_until_ready(decode(params, many)),
        "read": lambda: jax.block_until_ready(total(read)),
    }
    for function in functions.values():
        function()
    best = in_turns(functions, turns)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(read))
    step = Seconds(*((many - few) / (NEW - 8) for many, few in zip(best["many"], best["few"], strict=True)))
    return {
        "step_ms": round(1e3 * step.wall, 3),
        "read_ms": round(1e3 * best["read"].wall, 3),
        "step_cpu_ms": round(1e3 * step.cpu, 3),
        "read_cpu_ms": round(1e3 * best["read"].cpu, 3),
        "bytes": size,
        "read_gb_per_second": round(size / best["read"].wall / 1e9, 1),
        "times_reading": round(step.wall / best["read"].wall, 2),
        "times_reading_in_cpu": round(step.cpu / best["read"].cpu, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"cases of {', '.join(CASES)} (default: all)")
    interleaved.add_options(parser, turns=5)
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": interleaved.machine()}
    for case in options.cases:
        if case == "step":
            if options.cpus:
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cpus])
            report[case] = one_step(3 * options.turns)
        else:
            report[case] = compare(case, options)[1]
        print(json.dumps({case: report[case]}), flush=True)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
