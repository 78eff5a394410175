"""Memory and time of decoding, measured for the runs of a study beside what arithmetic predicts.

The least time of a pass follows from its FLOPs and from the bytes that it must read (`planning.estimate.inference`),
with the rates of this machine: of a product of matrices, and of sums of squares over as many bytes as the pass reads,
one sum after the other as the steps follow each other, so that both find the bytes in the same cache. Passes and rates
are measured in turns, and the least time of each counts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.config.model import ModelConfig
from t5x_like.decoding.decode_loop import decode_rows, read_prompts
from t5x_like.decoding.engine import speculative_tokens
from t5x_like.decoding.inference_params import InferenceParams, decoding_model, inference_params
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.speculative import Speculation
from t5x_like.evaluation.comparison import EvaluatedCheckpoint
from t5x_like.model_loading import open_model
from t5x_like.planning.estimate.flops import decode_flops
from t5x_like.planning.estimate.inference import Work, decoding_kernels, reading_flops, reading_kernels
from t5x_like.planning.estimate.kv_cache_bytes import ITEM_BYTES, attended_bytes, cache_bytes
from t5x_like.planning.estimate.serving_formulas import expected_tokens
from t5x_like.program import Program
from t5x_like.studies.kept_measures import measure_once
from t5x_like.utils.type_aliases import PyTree

FILE = "inference.json"
"""File of a run directory with what was measured, so that a page that is made again has the same numbers."""
PROMPT, FEW, MANY = 128, 8, 64
"""Tokens of a prompt, and the two numbers of new tokens whose difference in time is that of the steps between them."""
_SUMS = MANY - FEW
"""Sums over the bytes of a pass, as many as the steps whose time is measured: only the first one reads from memory what
fits a cache."""
TURNS = 10
DRAFTED = 4
"""Tokens of a draft."""
_MATRIX = 512
_SAMPLES, _SAMPLED = 32, 61
"""Samples, and tokens of each: after the first one, passes over drafts that are accepted whole yield exactly 60."""


def measure_decoding(run: EvaluatedCheckpoint, rows: int) -> dict[str, float]:
    """Return scores of decoding from prompts of `PROMPT` tokens by the model of a run.

    Returns:
      cache_bytes: Bytes of the cache of one row.
      cache_over_predicted: Allocated bytes over those that the configuration predicts.
      read_milliseconds, step_milliseconds: Time of reading the prompts, and of a decoding step.
      read_over_bound, step_over_bound: These times over the least ones that the rates of the machine allow.
    """
    return measure_once(run, FILE, f"decoding_{rows}", lambda: _decoding(*_opened(run), rows))


def measure_speculation(run: EvaluatedCheckpoint, draft: EvaluatedCheckpoint) -> dict[str, float]:
    """Return scores of speculative decoding at temperature 1, from nothing but the start token.

    Returns:
      acceptance: Probability that a drafted token is accepted, from drafts of one token.
      tokens_per_pass: Tokens that a pass over a draft of `DRAFTED` tokens yields.
      tokens_over_formula: These over (1 - a**(g + 1)) / (1 - a), which takes acceptances to be independent.
    """
    name = f"speculation_with_{draft.path.name}_at_{draft.step}"
    return measure_once(run, FILE, name, lambda: _speculation(_opened(run), _opened(draft)))


def _opened(run: EvaluatedCheckpoint) -> tuple[Program, InferenceParams]:
    loaded = open_model(CheckpointRef(run.path), run.step)
    return loaded.program, inference_params(loaded.program, loaded.params(check_data=False)[1])


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Rows of prompts that are read and continued, and the work that this takes."""

    model: ModelConfig
    rows: int

    def at(self, new: int) -> dict[str, Any]:
        """Return the tokens of rows with `new` tokens after the prompt."""
        has_encoder = self.model.encoder is not None
        length = 1 + new if has_encoder else PROMPT + new
        return {"rows": self.rows, "length": length, "encoder_length": PROMPT if has_encoder else 0}

    def read(self) -> Work:
        kernels = reading_kernels(self.model) * ITEM_BYTES[self.model.dtype]
        return Work(reading_flops(self.model, rows=self.rows, length=PROMPT), kernels)

    def step(self) -> Work:
        """Return the work of the first step that counts: later ones attend to more."""
        first = self.at(FEW)
        kernels = decoding_kernels(self.model) * ITEM_BYTES[self.model.dtype]
        return Work(decode_flops(self.model, **first), kernels + attended_bytes(self.model, **first))


def _decoding(program: Program, params: InferenceParams, rows: int) -> dict[str, float]:
    shape = _Shape(program.run.model, rows)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, shape.model.vocab_size, (rows, PROMPT)), jnp.int32)

    def read(params: InferenceParams) -> tuple[jax.Array, PyTree]:
        return read_prompts(decoding_model(program, params), tokens, jnp.full(rows, PROMPT), MANY)

    def decode(params: InferenceParams, limits_R: jax.Array) -> jax.Array:
        def choose(logits: jax.Array, state: None) -> tuple[jax.Array, jax.Array, None]:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(rows, bool), None

        logits, cache = read(params)
        state = decode_rows(
            decoding_model(program, params),
            logits,
            cache,
            choose=choose,
            selection_state=None,
            limits_R=limits_R,
            buffer_length=MANY,
        )
        return state.tokens_RxN

    few, many = (jnp.full(rows, count, jnp.int32) for count in (FEW, MANY))
    with program.mesh_context():
        reading = jax.jit(read).lower(params).compile()
        decoding = jax.jit(decode).lower(params, few).compile()
    work = {"read": shape.read(), "step": shape.step()}
    least = _least_seconds(
        {
            "read": lambda: reading(params),
            "few": lambda: decoding(params, few),
            "many": lambda: decoding(params, many),
            "product": _product(),
            **{f"bytes of {name}": _reading_of(one.bytes) for name, one in work.items()},
        }
    )
    seconds = {"read": least["read"], "step": (least["many"] - least["few"]) / (MANY - FEW)}
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(reading(params)[1]))
    scores = {
        "cache_bytes": allocated / rows,
        "cache_over_predicted": allocated / cache_bytes(shape.model, **shape.at(MANY)),
    }
    for name, one in work.items():
        bound = max(one.flops * least["product"] / (2 * _MATRIX**3), least[f"bytes of {name}"] / _SUMS)
        scores |= {f"{name}_milliseconds": 1e3 * seconds[name], f"{name}_over_bound": seconds[name] / bound}
    return scores


def _product() -> Callable[[], object]:
    matrix = jnp.ones((_MATRIX, _MATRIX), jnp.float32)
    product = jax.jit(jnp.matmul)
    return lambda: product(matrix, matrix)


def _reading_of(size: float) -> Callable[[], object]:
    """Return a function that reads as many bytes `_SUMS` times."""
    values = np.ones(int(size) // 4, np.float32)
    return lambda: [np.dot(values, values) for _ in range(_SUMS)]


def _least_seconds(functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    least = dict.fromkeys(functions, float("inf"))
    # The first turn compiles, and brings into the caches what fits there.
    for turn in range(TURNS + 1):
        for name, function in functions.items():
            begun = time.perf_counter()
            jax.block_until_ready(function())
            taken = time.perf_counter() - begun
            least[name] = min(least[name], taken) if turn else least[name]
    return least


def _speculation(model: tuple[Program, InferenceParams], draft: tuple[Program, InferenceParams]) -> dict[str, float]:
    program, params = model
    config = program.run.model
    # Without EOS all samples have the same length.
    allowed_V = ~np.isin(np.arange(config.vocab_size), config.eos_ids)

    def tokens_per_pass(drafted: int) -> float:
        _, stats = speculative_tokens(
            program,
            params,
            [[config.decoder_start_token_id]] * _SAMPLES,
            speculation=Speculation(drafted, draft),
            allowed_V=allowed_V,
            max_new_tokens=_SAMPLED,
            sampling=Sampling(temperature=1.0),
        )
        return stats.tokens / stats.passes

    acceptance, several = tokens_per_pass(1) - 1, tokens_per_pass(DRAFTED)
    return {
        "acceptance": acceptance,
        "tokens_per_pass": several,
        "tokens_over_formula": several / expected_tokens(acceptance, DRAFTED),
    }
