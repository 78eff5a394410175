"""Log-likelihood of given targets, token by token, in one forward pass of the model without a cache or a loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config import ModelConfig
from t5x_like.decoding.bucketing import bucket, num_row_shards, pad_rows, put_on_mesh, require_positions
from t5x_like.decoding.inference_params import InferenceParams, decoding_model
from t5x_like.decoding.sampling import argmax_token
from t5x_like.decoding.token_logprobs import Logprobs, TokenLogprob, logprobs_of, on_host
from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.program import Program
from t5x_like.utils.type_aliases import PyTree

Result = TypeVar("Result")
ArrayT = TypeVar("ArrayT", npt.NDArray[Any], jax.Array)
Pair = tuple[Sequence[int], Sequence[int]]
"""(inputs, targets) as token ids."""
MAX_TOKENS_PER_BATCH = 2**14
"""Largest number of token positions of the longer stack in a batch; a single longer row is a batch by itself."""
MAX_LOGITS_PER_BATCH = 2**26
"""Largest number of logits of a batch in memory at once: 256 MiB in float32. Where each device has a single row of more
logits, it computes them in chunks of at most so many."""


class Score(NamedTuple):
    """Log-likelihood of one pair.

    Attributes:
      sum: Log-likelihood of the targets in nats.
      per_token: log p(target | inputs, earlier targets) of each target in nats.
      is_greedy: Greedy decoding with all tokens allowed gives exactly the targets.
    """

    sum: float
    per_token: tuple[float, ...]
    is_greedy: bool


def score_tokens(
    program: Program,
    params: PyTree | InferenceParams,
    pairs: Sequence[Pair],
    *,
    bidirectional: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """Return the log-likelihood of the targets of each pair, given its inputs.

    An encoder-decoder reads the inputs in the encoder, and its decoder predicts the targets. A decoder reads one
    stream: start token, inputs, targets. No tokens are added: the caller adds a mode token and EOS where they belong
    (`PromptFormat.ids`). Pairs of similar length are computed together, longest first, in shapes that are powers of
    two. The score of a row does not depend on its neighbours, apart from rounding.

    Args:
      program: A program whose model has a decoder.
      params: The program's parameters, or the result of `inference_params`.
      pairs: Token ids. Inputs may be empty in a decoder; targets may be empty.
      bidirectional: In a decoder, the inputs attend to each other in both directions (prefix LM).
      advance: Called with the number of pairs that have been scored since the last call.

    Raises:
      ConfigError: a pair has more tokens than the model has learned positions, or the model has no decoder.
      DataError: a token id is outside the vocabulary, or a pair has no inputs for an encoder.
    """
    config = program.run.model
    _check(pairs, config)
    scores: list[Score] = [Score(0.0, (), True)] * len(pairs)
    shards = num_row_shards(program)
    for shape, indices in _batches(pairs, config, shards):
        count = shards * bucket(-(-len(indices) // shards), minimum=1)
        batch = put_on_mesh(program, _features([pairs[i] for i in indices], count, shape, config, bidirectional))
        per_token_RxT, greedy_RxT = jax.device_get(_score_batch(program, params, batch, _chunk(program)))
        for row, index in enumerate(indices):
            scores[index] = _score(per_token_RxT[row], greedy_RxT[row], len(pairs[index][1]))
        advance(len(indices))
    return scores


def _score(per_token_T: npt.NDArray[Any], greedy_T: npt.NDArray[Any], length: int) -> Score:
    """Return the score of a row whose first `length` targets are no padding."""
    values = tuple(per_token_T[:length].tolist())
    return Score(float(np.sum(values, dtype=np.float64)), values, bool(greedy_T[:length].all()))


def score_stream(program: Program, params: PyTree | InferenceParams, tokens: Sequence[int]) -> list[TokenLogprob]:
    """Return the log-probability of each token of a causal decoder's stream, given the start token and those before.

    One stream is computed at a time, so that as many programs are compiled as there are widths, which are powers of
    two.

    Args:
      tokens: The stream without its start token, at least one token.

    Raises:
      ConfigError: the stream has more tokens than the model has learned positions, or the model has an encoder.
      DataError: a token id is outside the vocabulary.
    """
    config, pair = program.run.model, ((), tokens)
    if config.encoder is not None:
        raise ConfigError([ConfigProblem("model", "an encoder-decoder", "a decoder, which predicts its whole stream")])
    _check([pair], config)
    width = _bucketed(_lengths(pair, config), config).decoder
    features = _features([pair], num_row_shards(program), _Shape(0, width, width), config, bidirectional=False)
    batch = put_on_mesh(program, features)
    logprobs = jax.device_get(_score_positions(program, params, batch, _chunk(program)))
    return on_host(np.array(tokens, np.int32), jax.tree.map(lambda array: array[0, : len(tokens)], logprobs))


class MaskedRow(NamedTuple):
    """Row some of whose tokens are predicted, given all others.

    Attributes:
      tokens: Ids of the text, with mask tokens.
      positions: Positions that are predicted, at least one.
      targets: The token at each of them.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    targets: Sequence[int]


def score_masked_tokens(program: Program, params: PyTree | InferenceParams, rows: Sequence[MaskedRow]) -> list[Score]:
    """Return the score of each row, whose tokens are predicted independently: log p(target | row).

    Rows of similar length are computed together, as in `score_tokens`.

    Raises:
      ConfigError: a row has more tokens than the model has learned positions, or the model predicts no masked tokens.
    """
    config = program.run.model
    require_masked_model(config)
    ((name, stack),) = config.stacks.items()
    require_positions(config, "the longest row", {name: max((len(row.tokens) for row in rows), default=0)})
    limit = stack.max_positions if stack.positions == "learned" else None
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, row in enumerate(rows):
        width = bucket(len(row.tokens)) if limit is None else min(bucket(len(row.tokens)), limit)
        by_shape.setdefault((width, min(bucket(len(row.positions), minimum=1), width)), []).append(index)
    scores: list[Score] = [Score(0.0, (), True)] * len(rows)
    shards = num_row_shards(program)
    for width, predicted in sorted(by_shape, reverse=True):
        size = _rows_per_batch(width, predicted, config.vocab_size, shards)
        indices = by_shape[width, predicted]
        for first in range(0, len(indices), size):
            some = [rows[index] for index in indices[first : first + size]]
            count = shards * bucket(-(-len(some) // shards), minimum=1)
            lengths_R = np.zeros(count, np.int32)
            lengths_R[: len(some)] = [len(row.tokens) for row in some]
            batch = {
                **in_place_features(pad_rows([row.tokens for row in some], count, width), lengths_R, config),
                "target_tokens": pad_rows([row.targets for row in some], count, predicted),
                "target_positions": pad_rows([row.positions for row in some], count, predicted),
            }
            placed = put_on_mesh(program, batch)
            per_token_RxT, greedy_RxT = jax.device_get(_score_batch(program, params, placed, _chunk(program)))
            for number, index in enumerate(indices[first : first + size]):
                scores[index] = _score(per_token_RxT[number], greedy_RxT[number], len(rows[index].targets))
    return scores


def require_masked_model(config: ModelConfig) -> None:
    """Raise ConfigError unless the model is a single stack with a head that predicts masked tokens."""
    if config.task_head is not None:
        found = "a task head"
    elif config.generator is not None:
        found = "a generator and a discriminator"
    elif len(config.stacks) != 1:
        found = "an encoder and a decoder"
    else:
        return
    expected = "an encoder with a head over the vocabulary, or a decoder with a bidirectional prefix"
    raise ConfigError([ConfigProblem("model", found, expected)])


def in_place_features(tokens_RxL: ArrayT, lengths_R: ArrayT, config: ModelConfig) -> dict[str, ArrayT]:
    """Return the features of rows whose position p predicts token p, given all tokens, as in training.

    An encoder reads the tokens; a bidirectional stream begins with the start token and ends before the last token.

    Args:
      tokens_RxL: int32, padded on the right; an array of NumPy or of jax.
      lengths_R: Number of tokens of each row.
      config: A model with one stack.
    """
    numpy: Any = np if isinstance(tokens_RxL, np.ndarray) else jnp
    # Segment ids mark the valid positions, so that no token id counts as padding.
    valid_RxL = (numpy.arange(tokens_RxL.shape[1]) < lengths_R[:, None]).astype(np.int32)
    if config.decoder is None:
        return {"encoder_input_tokens": tokens_RxL, "encoder_segment_ids": valid_RxL}
    start_Rx1 = numpy.full_like(tokens_RxL[:, :1], config.decoder_start_token_id)
    return {
        "decoder_input_tokens": numpy.concatenate([start_Rx1, tokens_RxL[:, :-1]], axis=1),
        "decoder_segment_ids": valid_RxL,
        "decoder_causal_attention": valid_RxL,
    }


def _rows_per_batch(width: int, scored: int, vocab_size: int, shards: int) -> int:
    """Return the number of rows of a batch: a power of two per shard, bound by tokens and by logits."""
    rows = min(MAX_TOKENS_PER_BATCH // width, MAX_LOGITS_PER_BATCH // (scored * vocab_size))
    return shards * max(1 << max(rows // shards, 1).bit_length() - 1, 1)


class _Shape(NamedTuple):
    """Numbers of token positions of a row: in the encoder (0 without), in the decoder, and of the targets."""

    encoder: int
    decoder: int
    targets: int


def _lengths(pair: Pair, config: ModelConfig) -> _Shape:
    num_inputs, num_targets = map(len, pair)
    if config.encoder is not None:
        return _Shape(num_inputs, num_targets, num_targets)
    return _Shape(0, num_inputs + num_targets, num_targets)


def _check(pairs: Sequence[Pair], config: ModelConfig) -> None:
    if config.decoder is None:
        raise ConfigError(
            [
                ConfigProblem(
                    "model", "an encoder without a decoder", "a model with a decoder", "use `eval` for an encoder"
                )
            ]
        )
    for number, pair in enumerate(pairs):
        inputs, targets = pair
        if config.encoder is not None and not inputs:
            raise DataError(f"pair {number}: found no inputs, expected at least one token for the encoder, e.g. EOS")
        if unknown := [token for token in (*inputs, *targets) if not 0 <= token < config.vocab_size]:
            raise DataError(f"pair {number}: found the id {unknown[0]}, expected one below {config.vocab_size}")
    lengths = [_lengths(pair, config) for pair in pairs]
    longest = {name: max((getattr(shape, name) for shape in lengths), default=0) for name in config.stacks}
    require_positions(config, "the longest pair", longest)


def _batches(pairs: Sequence[Pair], config: ModelConfig, shards: int) -> Iterator[tuple[_Shape, list[int]]]:
    """Yield (shape of a row, indices of pairs) for the pairs that have targets, the longest first."""
    by_shape: dict[_Shape, list[int]] = {}
    for index, pair in enumerate(pairs):
        # Empty targets have log-likelihood 0 and need no forward pass.
        if pair[1]:
            # Grouped by shape and not only sorted: each shape compiles one program.
            by_shape.setdefault(_bucketed(_lengths(pair, config), config), []).append(index)
    # Longest first: a batch that needs too much memory fails at once and not after hours.
    for shape in sorted(by_shape, key=lambda shape: max(shape), reverse=True):
        # Short targets of a large vocabulary are bound by their logits, long texts by their tokens.
        size = _rows_per_batch(max(shape), shape.targets, config.vocab_size, shards)
        for start in range(0, len(by_shape[shape]), size):
            yield shape, by_shape[shape][start : start + size]


def _bucketed(lengths: _Shape, config: ModelConfig) -> _Shape:
    """Return the lengths rounded up to powers of two, within the tables of learned positions."""
    widths = {name: bucket(getattr(lengths, name)) for name in config.stacks}
    for name, stack in config.stacks.items():
        if stack.positions == "learned":
            widths[name] = min(widths[name], stack.max_positions)
    targets = min(bucket(lengths.targets, minimum=4), widths["decoder"])
    return _Shape(widths.get("encoder", 0), widths["decoder"], targets)


def _features(
    pairs: Sequence[Pair], count: int, shape: _Shape, config: ModelConfig, bidirectional: bool
) -> dict[str, np.ndarray]:
    """Return the model's features, and what is scored.

    Segment ids mark the valid positions, so that no token id counts as padding. `target_tokens` [rows, T] are the
    scored tokens, and `target_positions` [rows, T] the decoder positions that predict them.
    """

    def valid(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
        return pad_rows([[1] * len(row) for row in rows], count, width)

    inputs = [list(pair[0]) for pair in pairs]
    targets = [list(pair[1]) for pair in pairs]
    # Number of stream tokens before the first target, without the start token.
    offsets = [0 if config.encoder is not None else len(tokens) for tokens in inputs]
    predicted = targets if config.encoder is not None else [a + b for a, b in zip(inputs, targets, strict=True)]
    # Position p of the stream predicts token p of `predicted`.
    streams = [[config.decoder_start_token_id, *tokens[:-1]] for tokens in predicted]
    positions = [list(range(first, first + len(tokens))) for first, tokens in zip(offsets, targets, strict=True)]
    features = {
        "decoder_input_tokens": pad_rows(streams, count, shape.decoder),
        "decoder_segment_ids": valid(streams, shape.decoder),
        "target_tokens": pad_rows(targets, count, shape.targets),
        "target_positions": pad_rows(positions, count, shape.targets),
    }
    if config.encoder is not None:
        features["encoder_input_tokens"] = pad_rows(inputs, count, shape.encoder)
        features["encoder_segment_ids"] = valid(inputs, shape.encoder)
    elif bidirectional:
        # The position that reads the last input and predicts the first target belongs to the prefix, as in training.
        prefixes = [tokens[: length + 1] for tokens, length in zip(streams, offsets, strict=True)]
        features["decoder_causal_attention"] = valid(prefixes, shape.decoder)
    return features


def _chunk(program: Program) -> int:
    """Return the number of positions whose logits are computed at once if each device has one row."""
    return max(1, MAX_LOGITS_PER_BATCH // program.run.model.vocab_size)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _score_batch(
    program: Program, params: PyTree, batch: Mapping[str, jax.Array], chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Score a batch.

    Returns:
      Log-likelihoods float32 [R, T], and bool [R, T], True where the target is the most likely token; replicated on all
      devices.
    """

    def score(logits_RxTxV: jax.Array, targets_RxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_z_RxT = jax.nn.logsumexp(logits_RxTxV, axis=-1)
        at_target_RxT = jnp.take_along_axis(logits_RxTxV, targets_RxT[:, :, None], axis=-1)[:, :, 0]
        return at_target_RxT - log_z_RxT, argmax_token(logits_RxTxV) == targets_RxT

    return _of_target_logits(program, params, batch, chunk, score)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _score_positions(program: Program, params: PyTree, batch: Mapping[str, jax.Array], chunk: int) -> Logprobs:
    """Return the log-probabilities of a batch's targets [R, T], and of the most likely tokens; replicated."""
    return _of_target_logits(program, params, batch, chunk, logprobs_of)


def _of_target_logits(
    program: Program,
    params: PyTree,
    batch: Mapping[str, jax.Array],
    chunk: int,
    function: Callable[[jax.Array, jax.Array], Result],
) -> Result:
    """Return a function's results at the positions that predict a target, replicated on all devices.

    Args:
      program: The program.
      params: Its parameters.
      batch: Features of R rows with T targets each.
      chunk: Number of positions whose logits a device with one row computes at once.
      function: Maps float32 logits [R, t, V] and targets [R, t] of any t positions to arrays [R, t, ...].
    """
    with program.mesh_context():
        features = dict(batch)
        targets_RxT, positions_RxT = features.pop("target_tokens"), features.pop("target_positions")
        model = decoding_model(program, params)
        states_RxLxd, _ = model.states(features)
        # The head is the largest product of a small model, and long prompts have few scored positions.
        states_RxTxd = jnp.take_along_axis(states_RxLxd, positions_RxT[:, :, None], axis=1)

        def of_chunk(arrays: tuple[jax.Array, jax.Array]) -> Result:
            states, targets = arrays
            return function(model.head(states, model.token_embedder.embedding[...]).astype(jnp.float32), targets)

        rows, length = targets_RxT.shape
        # Several rows on a device are few enough for all of their logits (`_rows_per_batch`).
        if length <= chunk or rows > num_row_shards(program):
            results = of_chunk((states_RxTxd, targets_RxT))
        else:
            # Equal chunks, of which the last one is padded with as few positions as possible.
            number = -(-length // chunk)
            size = -(-length // number)

            def split(array: jax.Array) -> jax.Array:
                padding = [(0, 0), (0, number * size - length), *[(0, 0)] * (array.ndim - 2)]
                return jnp.moveaxis(jnp.pad(array, padding).reshape(rows, number, size, *array.shape[2:]), 1, 0)

            def joined(array: jax.Array) -> jax.Array:
                return jnp.moveaxis(array, 0, 1).reshape(rows, number * size, *array.shape[3:])[:, :length]

            results = jax.tree.map(joined, jax.lax.map(of_chunk, (split(states_RxTxd), split(targets_RxT))))
        return jax.lax.with_sharding_constraint(results, NamedSharding(program.mesh, PartitionSpec()))
