"""The decode engine: one prefill, then one compiled loop over a key/value cache, for every model with a decoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config import ConfigError, ModelConfig, Problem
from t5x_like.decoding.loop import decode_rows, read_prompts
from t5x_like.decoding.sampling import Sampling, choose, draw_keys, restrict
from t5x_like.partitioning.shardings import batch_shardings
from t5x_like.program import Program

Tree = Any
_SMALLEST_BUCKET = 16


def generate_tokens(
    program: Program,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    allowed_V: npt.NDArray[np.bool_],
    max_new_tokens: int,
    bidirectional: bool = False,
    sampling: Sampling | None = None,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    batch_size: int = 32,
    cache_dtype: str | None = None,
) -> list[list[int]]:
    """New tokens for each prompt, up to EOS, which is left out.

    Numbers of rows, prompt lengths and numbers of new tokens are rounded up to powers of two, so that any number of
    calls compiles a few programs only. Between the tokens of a batch nothing goes to the host.

    Args:
      program: With a decoder.
      params: The program's parameters.
      prompts: Token ids as in training (`PromptFormat.ids`): what the encoder reads, or the beginning of the decoder's
        stream without BOS. Lengths may differ.
      allowed_V: [vocabulary] of the tokens that may be chosen.
      max_new_tokens: Limit per prompt, EOS included.
      bidirectional: In a single stream, the prompt's tokens see each other in both directions (prefix-LM).
      sampling: How tokens are chosen; None: greedy.
      seed: Of the draws. A row's draws depend on (seed, row number, position) only.
      rows: The number of each row for its draws; by default its place in `prompts`.
      batch_size: Prompts that are decoded at once, those of similar length together.
      cache_dtype: Of remembered keys and values: None for the model's, "bfloat16" or "int8".

    Raises:
      ConfigError: the prompt and its continuation are longer than the model's table of learned positions.
    """
    _check_positions(program.run.model, max(map(len, prompts), default=0), max_new_tokens)
    numbers = range(len(prompts)) if rows is None else rows
    results: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(prompts), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = _make_batch(program, [prompts[i] for i in chosen], [numbers[i] for i in chosen], max_new_tokens)
        new_RxN = _decode_batch(
            program,
            params,
            batch,
            np.uint32(seed % 2**32),
            allowed_V,
            cells=bucket(max_new_tokens),
            sampling=sampling or Sampling(),
            bidirectional=bidirectional,
            cache_dtype=cache_dtype,
        )
        for index, tokens in zip(chosen, _cut(new_RxN, len(chosen), max_new_tokens, program.run.model), strict=True):
            results[index] = tokens
    return results


def bucket(length: int, smallest: int = _SMALLEST_BUCKET) -> int:
    """The least power of two that is at least `length` and `smallest`."""
    return max(smallest, 1 << max(length - 1, 0).bit_length())


def _check_positions(config: ModelConfig, prompt_length: int, max_new_tokens: int) -> None:
    if config.encoder is None:
        needed = {"decoder": 1 + prompt_length + max_new_tokens}
    else:
        needed = {"encoder": prompt_length, "decoder": max_new_tokens}
    problems = [
        Problem(
            f"prompt and max_new_tokens, {name}",
            f"{needed[name]} positions",
            f"at most {stack.max_positions}, the rows of the model's table of positions",
        )
        for name, stack in config.stacks.items()
        if stack.positions == "learned" and needed[name] > stack.max_positions
    ]
    if problems:
        raise ConfigError(problems)


def _make_batch(
    program: Program, prompts: Sequence[Sequence[int]], numbers: Sequence[int], max_new_tokens: int
) -> dict[str, jax.Array]:
    """Prompts padded on the right to a bucket, on the mesh; rows that only fill it have a limit of 0."""
    config = program.run.model
    streams = [list(prompt) if config.encoder is not None else [config.start_id, *prompt] for prompt in prompts]
    reads_first = next(iter(config.stacks.values()))
    width = bucket(max(map(len, streams)))
    if reads_first.positions == "learned":
        width = min(width, reads_first.max_positions)
    split = math.prod(program.mesh.shape[axis] for axis in program.rules.activations["batch"])
    rows = split * bucket(-(-len(streams) // split), smallest=1)
    tokens_RxP = np.zeros((rows, width), np.int32)
    lengths_R, limits_R, rows_R = (np.zeros(rows, np.int32) for _ in range(3))
    for index, (stream, number) in enumerate(zip(streams, numbers, strict=True)):
        tokens_RxP[index, : len(stream)] = stream
        lengths_R[index], limits_R[index], rows_R[index] = len(stream), max_new_tokens, number
    batch = {"tokens": tokens_RxP, "lengths": lengths_R, "limits": limits_R, "rows": rows_R}
    return jax.device_put(batch, batch_shardings(program.mesh, program.rules, {"prompts": batch})["prompts"])


def _cut(new_RxN: jax.Array, rows: int, max_new_tokens: int, config: ModelConfig) -> Iterator[list[int]]:
    for row in np.asarray(new_RxN)[:rows, :max_new_tokens].tolist():
        yield row[: next((place for place, token in enumerate(row) if token in config.eos_ids), len(row))]


def _ends(token_R: jax.Array, config: ModelConfig) -> jax.Array:
    return jnp.isin(token_R, jnp.array(config.eos_ids, jnp.int32))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("cells", "sampling", "bidirectional", "cache_dtype"))
def _decode_batch(
    program: Program,
    params: Tree,
    batch: dict[str, jax.Array],
    seed: jax.Array,
    allowed_V: jax.Array,
    *,
    cells: int,
    sampling: Sampling,
    bidirectional: bool,
    cache_dtype: str | None,
) -> jax.Array:
    """New tokens [R, N]; zeros after EOS and after a row's limit."""
    rows_R = batch["rows"]

    def choose_next(logits_RxV: jax.Array, made: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys_R = draw_keys(seed, rows_R, jnp.broadcast_to(made, rows_R.shape))
        token_R = choose(restrict(logits_RxV, allowed_V), keys_R, sampling)
        return token_R, _ends(token_R, program.run.model), made + 1

    with program.activations():
        model = program.model(params)
        logits_RxV, cache = read_prompts(
            model, batch["tokens"], batch["lengths"], cells, bidirectional=bidirectional, cache_dtype=cache_dtype
        )
        decoded = decode_rows(
            model,
            logits_RxV,
            cache,
            choose=choose_next,
            chooser=jnp.int32(0),
            limits_R=batch["limits"],
            cells=cells,
        )
        return jax.lax.with_sharding_constraint(decoded.tokens_RxN, NamedSharding(program.mesh, PartitionSpec()))
