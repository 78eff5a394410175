"""The decode engine: one prefill, then one compiled loop over a key/value cache, for every model with a decoder."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config import ModelConfig
from t5x_like.decoding import choosing
from t5x_like.decoding.beam import BeamSearch, search_batch
from t5x_like.decoding.choosing import Rules
from t5x_like.decoding.constraints import Automaton
from t5x_like.decoding.loop import decode_rows, read_prompts
from t5x_like.decoding.ready import ReadyParams, decoding_model, ready_params
from t5x_like.decoding.rows import bucket, on_mesh, padded, require_positions, row_shares
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.speculative import Speculation, speculate_batch
from t5x_like.decoding.stops import FOUND, Stops
from t5x_like.program import Program

Tree = Any
Allowed = npt.NDArray[np.bool_]


def generate_tokens(
    program: Program,
    params: Tree | ReadyParams,
    prompts: Sequence[Sequence[int]],
    *,
    allowed_V: Allowed,
    max_new_tokens: int | Sequence[int],
    bidirectional: bool = False,
    sampling: Sampling | None = None,
    seed: int | Sequence[int] = 0,
    rows: Sequence[int] | None = None,
    batch_size: int = 32,
    cache_dtype: str | None = None,
    stops: Stops | None = None,
    automaton: Automaton | None = None,
    start_states: Sequence[int] | None = None,
) -> list[list[int]]:
    """New tokens for each prompt, up to EOS, which is left out, or with the token that completes a stop string.

    Numbers of rows, prompt lengths and numbers of new tokens are rounded up to powers of two, so that any number of
    calls compiles a few programs only. Between the tokens of a batch nothing goes to the host.

    Args:
      program: With a decoder.
      params: The program's parameters, or what `ready_params` made of them, which is worth it for many calls.
      prompts: Token ids as in training (`PromptFormat.ids`): what the encoder reads, or the beginning of the decoder's
        stream without BOS. Lengths may differ.
      allowed_V: [vocabulary] of the tokens that may be chosen, or [prompts, vocabulary].
      max_new_tokens: Limit per prompt, EOS included; one for all, or of each prompt.
      bidirectional: In a single stream, the prompt's tokens see each other in both directions (prefix-LM).
      sampling: How tokens are chosen; None: greedy.
      seed: Of the draws; one for all, or of each prompt. A row's draws depend on (seed, row number, position) only.
      rows: The number of each row for its draws; by default its place in `prompts`.
      batch_size: Prompts that are decoded at once, those of similar length together.
      cache_dtype: Of remembered keys and values: None for the model's, "bfloat16" or "int8".
      stops: Strings that end a row.
      automaton: What may come after what, of the allowed tokens.
      start_states: Its state before each prompt's first token.

    Raises:
      ConfigError: the prompt and its continuation are longer than the model's table of learned positions.
    """
    asked = _Asked(prompts, max_new_tokens, seed, rows, allowed_V, automaton, start_states, stops, sampling)
    params = ready_params(program, params)
    results: list[list[int]] = [[] for _ in prompts]
    for chosen, batch, rules, cells in _batches(program, asked, batch_size):
        new_RxN = _decode_batch(
            program, params, batch, rules, cells=cells, bidirectional=bidirectional, cache_dtype=cache_dtype
        )
        for index, row in zip(chosen, np.asarray(new_RxN).tolist(), strict=False):
            results[index] = _cut(row[: asked.limits[index]], program.run.model, stops)
    return results


class Hypothesis(NamedTuple):
    """Of a beam search: tokens without EOS, and the score by which they are ordered."""

    tokens: list[int]
    score: float


def beam_tokens(
    program: Program,
    params: Tree | ReadyParams,
    prompts: Sequence[Sequence[int]],
    *,
    search: BeamSearch,
    allowed_V: Allowed,
    max_new_tokens: int | Sequence[int],
    bidirectional: bool = False,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    cache_dtype: str | None = None,
    stops: Stops | None = None,
    automaton: Automaton | None = None,
    start_states: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """The best continuations of each prompt, best first: up to `search.size`, as many as have ended.

    Scores are of log-probabilities over the whole vocabulary: what is not allowed is left out and not made up for. See
    `beam` for the search and `generate_tokens` for the arguments; of `sampling`, the repetition penalty alone is read,
    which then is of log-probabilities, as in transformers.

    Raises:
      ConfigError: the prompt and its continuation are longer than the model's table of learned positions.
    """
    asked = _Asked(prompts, max_new_tokens, 0, None, allowed_V, automaton, start_states, stops, sampling)
    params = ready_params(program, params)
    results: list[list[Hypothesis]] = [[] for _ in prompts]
    for chosen, batch, rules, cells in _batches(program, asked, batch_size):
        tokens, lengths, scores = jax.device_get(
            search_batch(
                program,
                params,
                batch,
                rules,
                cells=cells,
                search=search,
                bidirectional=bidirectional,
                cache_dtype=cache_dtype,
            )
        )
        for row, index in enumerate(chosen):
            results[index] = [
                Hypothesis(
                    _cut(tokens[row, beam, : lengths[row, beam]].tolist(), program.run.model, None), float(score)
                )
                for beam, score in enumerate(scores[row])
                if score > -np.inf
            ]
    return results


class Passes(NamedTuple):
    """What speculation saved: tokens that were made, beside those that came with the prompt, and the model's passes
    over proposals that it took, summed over rows. Without a draft there would be a pass for each token."""

    tokens: int
    passes: int


def speculative_tokens(
    program: Program,
    params: Tree | ReadyParams,
    prompts: Sequence[Sequence[int]],
    *,
    speculation: Speculation,
    allowed_V: Allowed,
    max_new_tokens: int | Sequence[int],
    bidirectional: bool = False,
    sampling: Sampling | None = None,
    seed: int | Sequence[int] = 0,
    rows: Sequence[int] | None = None,
    batch_size: int = 32,
    cache_dtype: str | None = None,
    stops: Stops | None = None,
    automaton: Automaton | None = None,
    start_states: Sequence[int] | None = None,
) -> tuple[list[list[int]], Passes]:
    """What `generate_tokens` makes, in fewer passes of the model: the same tokens where greedy, else other draws from
    the same distribution. See there for the arguments, and `speculative` for how.

    Raises:
      ConfigError: the draft does not fit the model, or as `generate_tokens`.
    """
    speculation.require(program)
    params = ready_params(program, params)
    draft_program, draft_params = speculation.draft or (None, None)
    if draft_program is not None:
        draft_params = ready_params(draft_program, draft_params)
    asked = _Asked(prompts, max_new_tokens, seed, rows, allowed_V, automaton, start_states, stops, sampling)
    results: list[list[int]] = [[] for _ in prompts]
    total = Passes(0, 0)
    for chosen, batch, rules, cells in _batches(program, asked, batch_size):
        new_RxN, made_R, passes_R = jax.device_get(
            speculate_batch(
                program,
                params,
                draft_program,
                draft_params,
                batch,
                rules,
                count=speculation.tokens,
                longest_match=speculation.longest_match,
                cells=cells,
                bidirectional=bidirectional,
                cache_dtype=cache_dtype,
            )
        )
        some = len(chosen)
        total = Passes(total.tokens + int(made_R[:some].sum()) - some, total.passes + int(passes_R[:some].sum()))
        for index, row in zip(chosen, new_RxN.tolist(), strict=False):
            results[index] = _cut(row[: asked.limits[index]], program.run.model, stops)
    return results, total


class _Asked:
    """The arguments of a call, by prompt."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        seed: int | Sequence[int],
        rows: Sequence[int] | None,
        allowed: Allowed,
        automaton: Automaton | None,
        start_states: Sequence[int] | None,
        stops: Stops | None,
        sampling: Sampling | None,
    ):
        count = len(prompts)
        self.prompts = prompts
        self.limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
        self.seeds = [seed] * count if isinstance(seed, int) else list(seed)
        self.rows = range(count) if rows is None else rows
        self.allowed = allowed
        self.automaton = automaton
        self.start_states = [0] * count if start_states is None else start_states
        self.stops = stops
        self.sampling = sampling or Sampling()


def _batches(
    program: Program, asked: _Asked, batch_size: int
) -> Iterator[tuple[list[int], Mapping[str, jax.Array], Rules, int]]:
    """(indices of prompts, the batch on the mesh, its rules, cells for new tokens); prompts of like lengths together.

    Raises:
      ConfigError: too long for learned positions.
    """
    config = program.run.model
    by_length = sorted(range(len(asked.prompts)), key=lambda index: len(asked.prompts[index]))
    for index in by_length:
        require_positions(config, len(asked.prompts[index]) + (config.encoder is None), asked.limits[index])
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = _make_batch(program, [asked.prompts[i] for i in chosen], [asked.limits[i] for i in chosen])
        count = batch["lengths"].shape[0]

        def of_rows(values: Sequence[int], count: int = count, chosen: Sequence[int] = chosen) -> list[int]:
            return [values[i] for i in chosen] + [0] * (count - len(chosen))

        allowed = asked.allowed
        if allowed.ndim == 2:
            allowed = allowed[of_rows(range(len(asked.prompts)))]
        rules = Rules(
            allowed=_host(allowed),
            sampling=asked.sampling.rows(count),
            seeds_R=_host(np.array([seed % 2**32 for seed in of_rows(asked.seeds)], np.uint32)),
            rows_R=_host(np.array(of_rows(asked.rows), np.int32)),
            automaton=asked.automaton,
            start_state_R=None if asked.automaton is None else _host(np.array(of_rows(asked.start_states), np.int32)),
            stops_SxV=None if asked.stops is None else _host(asked.stops.next_SxV),
        )
        yield chosen, batch, rules, bucket(max(asked.limits[i] for i in chosen))


def _host(array: npt.NDArray[Any]) -> jax.Array:
    """An argument of a compiled function that lies on the host."""
    return cast(jax.Array, array)


def _make_batch(program: Program, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> dict[str, jax.Array]:
    """Prompts padded on the right to a bucket, on the mesh; rows that only fill it have a limit of 0."""
    config = program.run.model
    streams = [list(prompt) if config.encoder is not None else [config.start_id, *prompt] for prompt in prompts]
    reads_first = next(iter(config.stacks.values()))
    width = bucket(max(map(len, streams)))
    if reads_first.positions == "learned":
        width = min(width, reads_first.max_positions)
    shares = row_shares(program)
    count = shares * bucket(-(-len(streams) // shares), smallest=1)
    lengths_R, limits_R = np.zeros(count, np.int32), np.zeros(count, np.int32)
    lengths_R[: len(streams)] = [len(stream) for stream in streams]
    limits_R[: len(streams)] = limits
    return on_mesh(program, {"tokens": padded(streams, count, width), "lengths": lengths_R, "limits": limits_R})


def _cut(row: list[int], config: ModelConfig, stops: Stops | None) -> list[int]:
    """Up to EOS, or with the token that completes a stop string."""
    state = 0
    for place, token in enumerate(row):
        if token in config.eos_ids:
            return row[:place]
        state = state if stops is None else int(stops.next_SxV[state, token])
        if state == FOUND:
            return row[: place + 1]
    return row


@functools.partial(jax.jit, static_argnums=0, static_argnames=("cells", "bidirectional", "cache_dtype"))
def _decode_batch(
    program: Program,
    params: Tree,
    batch: Mapping[str, jax.Array],
    rules: Rules,
    *,
    cells: int,
    bidirectional: bool,
    cache_dtype: str | None,
) -> jax.Array:
    """New tokens [R, N]; zeros behind a row's end."""
    config = program.run.model
    tokens_RxP, lengths_R = batch["tokens"], batch["lengths"]

    def choose(logits_RxV: jax.Array, state: choosing.State) -> tuple[jax.Array, jax.Array, choosing.State]:
        token_R, stopped_R, state = choosing.choose(logits_RxV, rules, state)
        return token_R, stopped_R | jnp.isin(token_R, jnp.array(config.eos_ids, jnp.int32)), state

    with program.activations():
        model = decoding_model(program, params)
        logits_RxV, cache = read_prompts(
            model, tokens_RxP, lengths_R, cells, bidirectional=bidirectional, cache_dtype=cache_dtype
        )
        if config.encoder is not None:
            tokens_RxP, lengths_R = jnp.full_like(tokens_RxP[:, :1], config.start_id), jnp.ones_like(lengths_R)
        decoded = decode_rows(
            model,
            logits_RxV,
            cache,
            choose=choose,
            chooser=choosing.start(rules, tokens_RxP, lengths_R, logits_RxV.shape[-1]),
            limits_R=batch["limits"],
            cells=cells,
        )
        return jax.lax.with_sharding_constraint(decoded.tokens_RxN, NamedSharding(program.mesh, PartitionSpec()))
