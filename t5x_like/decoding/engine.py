"""Decoding engine: one prefill, then one compiled loop over a key/value cache, for every model with a decoder."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.decoding import token_selection
from t5x_like.decoding.beam_search import BeamSearch, search_batch
from t5x_like.decoding.bucketing import bucket, check_positions, num_row_shards, pad_rows, put_on_mesh
from t5x_like.decoding.constrained import Automaton
from t5x_like.decoding.decode_loop import decode_rows, read_prompts
from t5x_like.decoding.inference_params import InferenceParams, decoding_model, inference_params
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.speculative import Speculation, speculate_batch
from t5x_like.decoding.stop_strings import StopStrings, truncate
from t5x_like.decoding.token_selection import NOT_FINITE, SelectionParams
from t5x_like.errors import DataError
from t5x_like.program import Program
from t5x_like.utils.type_aliases import PyTree

Allowed = npt.NDArray[np.bool_]


def generate_tokens(
    program: Program,
    params: PyTree | InferenceParams,
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
    stops: StopStrings | None = None,
    automaton: Automaton | None = None,
    start_states: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to EOS, which is left out, or to the token that completes a stop string.

    Numbers of rows, prompt lengths and numbers of new tokens are rounded up to powers of two, so that any number of
    calls compiles a few programs only. Between the tokens of a batch no data is transferred to the host.

    Args:
      program: A program whose model has a decoder.
      params: The program's parameters, or the result of `inference_params`, which saves time over many calls.
      prompts: Token ids as in training (`PromptFormat.ids`): the encoder's input, or the beginning of the decoder's
        stream without BOS. Lengths may differ.
      allowed_V: [vocabulary] of the tokens that may be selected, or [prompts, vocabulary].
      max_new_tokens: Largest number of new tokens, EOS included; one for all prompts, or one for each.
      bidirectional: In a decoder, the prompt's tokens attend to each other in both directions (prefix LM).
      sampling: Sampling settings; None: greedy.
      seed: Seed of the draws; one for all prompts, or one for each. A row's draws depend on (seed, row number,
        position) only.
      rows: Row number of each prompt for its draws; by default the index in `prompts`.
      batch_size: Number of prompts that are decoded at once. Prompts of similar length are batched together.
      cache_dtype: Type of cached keys and values: None for the model's, "bfloat16" or "int8".
      stops: Strings that end a row.
      automaton: Constraint on the order of allowed tokens.
      start_states: Initial state of each prompt in the automaton.

    Raises:
      ConfigError: a prompt and its continuation are longer than the model's table of learned positions.
    """
    arguments = _Arguments(prompts, max_new_tokens, seed, rows, allowed_V, automaton, start_states, stops, sampling)
    params = inference_params(program, params)
    results: list[list[int]] = [[] for _ in prompts]
    for indices, batch, selection, buffer_length in _batches(program, arguments, batch_size):
        new_RxN = _decode_batch(
            program,
            params,
            batch,
            selection,
            buffer_length=buffer_length,
            bidirectional=bidirectional,
            cache_dtype=cache_dtype,
        )
        for index, row in zip(indices, np.asarray(new_RxN).tolist(), strict=False):
            _require_finite(index, row)
            results[index] = truncate(row[: arguments.limits[index]], program.run.model.eos_ids, stops)
    return results


def _require_finite(prompt: int, tokens: list[int]) -> None:
    if NOT_FINITE in tokens:
        raise _not_finite(prompt, f"of its new token {tokens.index(NOT_FINITE)}")


def _not_finite(prompt: int, what: str) -> DataError:
    return DataError(
        f"prompt {prompt}: found logits {what} that are not finite, expected finite ones: the model's weights are "
        "damaged, or its numbers overflow in model.dtype; use another checkpoint, or float32"
    )


class Hypothesis(NamedTuple):
    """Result of a beam search.

    Attributes:
      tokens: New tokens without EOS.
      score: Length-normalized log-probability, by which hypotheses are ordered.
    """

    tokens: list[int]
    score: float


def beam_tokens(
    program: Program,
    params: PyTree | InferenceParams,
    prompts: Sequence[Sequence[int]],
    *,
    search: BeamSearch,
    allowed_V: Allowed,
    max_new_tokens: int | Sequence[int],
    bidirectional: bool = False,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    cache_dtype: str | None = None,
    stops: StopStrings | None = None,
    automaton: Automaton | None = None,
    start_states: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Return the best continuations of each prompt, best first: as many as have finished, at most `search.size`.

    Scores use log-probabilities over the whole vocabulary: tokens that are not allowed are left out without
    renormalization. See `beam_search` for the search and `generate_tokens` for the arguments. Of `sampling`, only the
    repetition penalty is read; it applies to log-probabilities, as in transformers.

    Raises:
      ConfigError: a prompt and its continuation are longer than the model's table of learned positions.
    """
    arguments = _Arguments(prompts, max_new_tokens, 0, None, allowed_V, automaton, start_states, stops, sampling)
    params = inference_params(program, params)
    results: list[list[Hypothesis]] = [[] for _ in prompts]
    for indices, batch, selection, buffer_length in _batches(program, arguments, batch_size):
        tokens, lengths, scores = jax.device_get(
            search_batch(
                program,
                params,
                batch,
                selection,
                buffer_length=buffer_length,
                search=search,
                bidirectional=bidirectional,
                cache_dtype=cache_dtype,
            )
        )
        for row, index in enumerate(indices):
            if np.isnan(scores[row]).any():
                raise _not_finite(index, "of a beam")
            results[index] = [
                Hypothesis(
                    truncate(tokens[row, beam, : lengths[row, beam]].tolist(), program.run.model.eos_ids, None),
                    float(score),
                )
                for beam, score in enumerate(scores[row])
                if score > -np.inf
            ]
    return results


class SpeculationStats(NamedTuple):
    """Counts that show the gain of speculation. Without a draft there would be one forward pass per token.

    Attributes:
      tokens: Number of new tokens, without the first of each row, which comes from the prefill.
      passes: Number of the model's forward passes over proposals, summed over rows.
    """

    tokens: int
    passes: int


def speculative_tokens(
    program: Program,
    params: PyTree | InferenceParams,
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
    stops: StopStrings | None = None,
    automaton: Automaton | None = None,
    start_states: Sequence[int] | None = None,
) -> tuple[list[list[int]], SpeculationStats]:
    """Return new tokens as `generate_tokens` does, in fewer forward passes of the model, and the counts of the
    speculation.

    Greedy rows get the same tokens; sampled rows get other draws from the same distribution. See `generate_tokens` for
    the arguments and `speculative` for the method.

    Raises:
      ConfigError: the draft does not fit the model, or as in `generate_tokens`.
    """
    speculation.require(program)
    params = inference_params(program, params)
    draft_program, draft_params = speculation.draft or (None, None)
    if draft_program is not None:
        draft_params = inference_params(draft_program, draft_params)
    arguments = _Arguments(prompts, max_new_tokens, seed, rows, allowed_V, automaton, start_states, stops, sampling)
    results: list[list[int]] = [[] for _ in prompts]
    total = SpeculationStats(0, 0)
    for indices, batch, selection, buffer_length in _batches(program, arguments, batch_size):
        new_RxN, num_new_R, passes_R = jax.device_get(
            speculate_batch(
                program,
                params,
                draft_program,
                draft_params,
                batch,
                selection,
                count=speculation.tokens,
                longest_match=speculation.longest_match,
                buffer_length=buffer_length,
                bidirectional=bidirectional,
                cache_dtype=cache_dtype,
            )
        )
        # Rows after the last prompt only fill the batch.
        count = len(indices)
        # The first token of a row comes from the prefill and is not counted.
        total = SpeculationStats(
            total.tokens + int(num_new_R[:count].sum()) - count, total.passes + int(passes_R[:count].sum())
        )
        for index, row in zip(indices, new_RxN.tolist(), strict=False):
            _require_finite(index, row)
            results[index] = truncate(row[: arguments.limits[index]], program.run.model.eos_ids, stops)
    return results, total


class _Arguments:
    """Arguments of a call, with one value per prompt."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        seed: int | Sequence[int],
        rows: Sequence[int] | None,
        allowed: Allowed,
        automaton: Automaton | None,
        start_states: Sequence[int] | None,
        stops: StopStrings | None,
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
    program: Program, arguments: _Arguments, batch_size: int
) -> Iterator[tuple[list[int], Mapping[str, jax.Array], SelectionParams, int]]:
    """Yield batches of prompts of similar length.

    Each one is (indices of its prompts, arrays on the mesh, selection of its rows, length of the buffer for new
    tokens).

    Raises:
      ConfigError: a prompt and its continuation are longer than a table of learned positions.
    """
    config = program.run.model
    # Prompts of similar length share a batch, which wastes least on padding. The order does not change results: draws
    # depend on the row number of a prompt.
    by_length = sorted(range(len(arguments.prompts)), key=lambda index: len(arguments.prompts[index]))
    for index in by_length:
        check_positions(config, len(arguments.prompts[index]) + (config.encoder is None), arguments.limits[index])
    for start in range(0, len(by_length), batch_size):
        indices = by_length[start : start + batch_size]
        batch = _make_batch(program, [arguments.prompts[i] for i in indices], [arguments.limits[i] for i in indices])
        count = batch["lengths"].shape[0]

        def per_row(values: Sequence[int], count: int = count, indices: Sequence[int] = indices) -> list[int]:
            return [values[i] for i in indices] + [0] * (count - len(indices))

        allowed = arguments.allowed
        if allowed.ndim == 2:
            allowed = allowed[per_row(range(len(arguments.prompts)))]
        automaton, start_states = arguments.automaton, arguments.start_states
        selection = SelectionParams(
            allowed=_host(allowed),
            sampling=arguments.sampling.for_rows(count),
            seeds_R=_host(np.array([seed % 2**32 for seed in per_row(arguments.seeds)], np.uint32)),
            rows_R=_host(np.array(per_row(arguments.rows), np.int32)),
            automaton=automaton,
            start_state_R=None if automaton is None else _host(np.array(per_row(start_states), np.int32)),
            stops_SxV=None if arguments.stops is None else _host(arguments.stops.next_SxV),
        )
        # The buffer is bucketed too. Buffer, width and rows are the only shapes that a program depends on.
        yield indices, batch, selection, bucket(max(arguments.limits[i] for i in indices))


def _host(array: npt.NDArray[Any]) -> jax.Array:
    """Return an array on the host, typed as an argument of a compiled function."""
    return cast(jax.Array, array)


def _make_batch(program: Program, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> dict[str, jax.Array]:
    """Return prompts padded on the right to a bucket, on the mesh. Rows that only fill the batch have a limit of 0."""
    config = program.run.model
    streams = [
        list(prompt) if config.encoder is not None else [config.decoder_start_token_id, *prompt] for prompt in prompts
    ]
    first_stack = next(iter(config.stacks.values()))  # The encoder, or else the decoder: it reads the prompts.
    width = bucket(max(map(len, streams)))
    if first_stack.positions == "learned":
        # The bucket can be longer than the table of positions; the prompts are not, as `_batches` has checked.
        width = min(width, first_stack.max_positions)
    shards = num_row_shards(program)
    # Rows per device are rounded up to a bucket as well: the last, smaller batch then needs few further programs.
    count = shards * bucket(-(-len(streams) // shards), minimum=1)
    lengths_R, limits_R = np.zeros(count, np.int32), np.zeros(count, np.int32)
    lengths_R[: len(streams)] = [len(stream) for stream in streams]
    limits_R[: len(streams)] = limits
    return put_on_mesh(program, {"tokens": pad_rows(streams, count, width), "lengths": lengths_R, "limits": limits_R})


@functools.partial(jax.jit, static_argnums=0, static_argnames=("buffer_length", "bidirectional", "cache_dtype"))
def _decode_batch(
    program: Program,
    params: PyTree,
    batch: Mapping[str, jax.Array],
    selection: SelectionParams,
    *,
    buffer_length: int,
    bidirectional: bool,
    cache_dtype: str | None,
) -> jax.Array:
    """Return new tokens [R, N], with zeros after a row's end, and `NOT_FINITE` for a token without finite logits."""
    config = program.run.model
    tokens_RxP, lengths_R = batch["tokens"], batch["lengths"]

    def choose(
        logits_RxV: jax.Array, state: token_selection.SelectionState
    ) -> tuple[jax.Array, jax.Array, token_selection.SelectionState]:
        invalid_R = token_selection.not_finite(logits_RxV)
        token_R, stopped_R, state = token_selection.select_tokens(logits_RxV, selection, state)
        token_R = jnp.where(invalid_R, NOT_FINITE, token_R)
        return token_R, stopped_R | invalid_R | jnp.isin(token_R, jnp.array(config.eos_ids, jnp.int32)), state

    with program.mesh_context():
        model = decoding_model(program, params)
        logits_RxV, cache = read_prompts(
            model, tokens_RxP, lengths_R, buffer_length, bidirectional=bidirectional, cache_dtype=cache_dtype
        )
        if config.encoder is not None:
            # What the decoder has read, for the repetition penalty: the encoder's input does not count.
            tokens_RxP, lengths_R = (
                jnp.full_like(tokens_RxP[:, :1], config.decoder_start_token_id),
                jnp.ones_like(lengths_R),
            )
        decoded = decode_rows(
            model,
            logits_RxV,
            cache,
            choose=choose,
            selection_state=token_selection.initial_state(selection, tokens_RxP, lengths_R, logits_RxV.shape[-1]),
            limits_R=batch["limits"],
            buffer_length=buffer_length,
        )
        return jax.lax.with_sharding_constraint(decoded.tokens_RxN, NamedSharding(program.mesh, PartitionSpec()))
