"""Log-likelihood of given targets, token by token, by the model's own forward pass: no cache, no loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config import ConfigError, DataError, ModelConfig, Problem
from t5x_like.decoding.ready import ReadyParams, decoding_model
from t5x_like.decoding.rows import bucket, on_mesh, padded, row_shares
from t5x_like.decoding.sampling import most_likely
from t5x_like.program import Program

Tree = Any
Pair = tuple[Sequence[int], Sequence[int]]
"""(inputs, targets) as token ids."""
CELLS_AT_ONCE = 2**14
"""Cells of the longer stack that are computed together, at most (but for a single row that has more)."""
LOGITS_AT_ONCE = 2**26
"""Logits that are there at once, at most: 256 MiB."""


class Score(NamedTuple):
    """Of one pair.

    Attributes:
      sum: Log-likelihood of the targets in nats.
      per_token: log p(target | inputs, targets before it) of each target.
      is_greedy: Greedy decoding, with all tokens of the table allowed, would say exactly the targets.
    """

    sum: float
    per_token: tuple[float, ...]
    is_greedy: bool


def score_tokens(
    program: Program,
    params: Tree | ReadyParams,
    pairs: Sequence[Pair],
    *,
    bidirectional: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """How likely the model finds the targets of each pair, given its inputs, which are not counted.

    Encoder-decoders read the inputs in the encoder, and the decoder predicts the targets. Decoders read one stream: the
    start token, the inputs, the targets. Nothing is added: a mode token in front, an EOS behind the inputs or the
    targets are the caller's (`PromptFormat.ids`). Pairs of like lengths are computed together, longest first, in shapes
    that are powers of two; what a row is scored does not depend on its neighbours beyond rounding. (With a capacity for
    experts the length of its row, padding included, decides how many tokens an expert takes.)

    Args:
      program: With a decoder.
      params: The program's parameters, or what `ready_params` made of them.
      pairs: Token ids; inputs may be empty in a single stream, targets may be empty anywhere.
      bidirectional: In a single stream, the inputs see each other in both directions (prefix-LM).
      advance: Called with the number of pairs that have been scored since the last call.

    Raises:
      ConfigError: a pair has more tokens than the model has learned positions, or the model has no decoder.
      DataError: an id that the model has no row for; a pair without inputs for an encoder.
    """
    config = program.run.model
    _check(pairs, config)
    scores: list[Score] = [Score(0.0, (), True)] * len(pairs)
    shares = row_shares(program)
    for shape, indices in _batches(pairs, config, shares):
        count = shares * bucket(-(-len(indices) // shares), smallest=1)
        batch = on_mesh(program, _features([pairs[i] for i in indices], count, shape, config, bidirectional))
        per_token_RxT, greedy_RxT = jax.device_get(_score_batch(program, params, batch))
        for row, index in enumerate(indices):
            length = len(pairs[index][1])
            values = tuple(per_token_RxT[row, :length].tolist())
            scores[index] = Score(float(np.sum(values, dtype=np.float64)), values, bool(greedy_RxT[row, :length].all()))
        advance(len(indices))
    return scores


class _Shape(NamedTuple):
    """Cells of a row: of the encoder (0 without), of the decoder, and of the targets alone."""

    encoder: int
    decoder: int
    targets: int


def _lengths(pair: Pair, config: ModelConfig) -> _Shape:
    given, wanted = map(len, pair)
    if config.encoder is not None:
        return _Shape(given, wanted, wanted)
    return _Shape(0, given + wanted, wanted)


def _check(pairs: Sequence[Pair], config: ModelConfig) -> None:
    if config.decoder is None:
        raise ConfigError([Problem("model", "an encoder alone", "a model with a decoder", "`eval` scores encoders")])
    for number, pair in enumerate(pairs):
        inputs, targets = pair
        if config.encoder is not None and not inputs:
            raise DataError(f"pair {number}: found no inputs, expected at least one token for the encoder, as EOS")
        if strange := [token for token in (*inputs, *targets) if not 0 <= token < config.vocab_size]:
            raise DataError(f"pair {number}: found the id {strange[0]}, expected one below {config.vocab_size}")
    lengths = [_lengths(pair, config) for pair in pairs]
    problems = [
        Problem(f"the longest pair, {name}", f"{longest} positions", f"at most {stack.max_positions}, the model's")
        for name, stack in config.stacks.items()
        if (longest := max((getattr(one, name) for one in lengths), default=0)) > stack.max_positions
        and stack.positions == "learned"
    ]
    if problems:
        raise ConfigError(problems)


def _batches(pairs: Sequence[Pair], config: ModelConfig, shares: int) -> Iterator[tuple[_Shape, list[int]]]:
    """(cells of a row, indices of pairs with targets): the longest first."""
    by_shape: dict[_Shape, list[int]] = {}
    for index, pair in enumerate(pairs):
        if pair[1]:
            by_shape.setdefault(_bucketed(_lengths(pair, config), config), []).append(index)
    for shape in sorted(by_shape, key=lambda shape: max(shape), reverse=True):
        rows = min(CELLS_AT_ONCE // max(shape), LOGITS_AT_ONCE // (shape.targets * config.vocab_size))
        size = shares * max(1 << max(rows // shares, 1).bit_length() - 1, 1)
        for start in range(0, len(by_shape[shape]), size):
            yield shape, by_shape[shape][start : start + size]


def _bucketed(lengths: _Shape, config: ModelConfig) -> _Shape:
    cells = {name: bucket(getattr(lengths, name)) for name in config.stacks}
    for name, stack in config.stacks.items():
        if stack.positions == "learned":
            cells[name] = min(cells[name], stack.max_positions)
    targets = min(bucket(lengths.targets, smallest=4), cells["decoder"])
    return _Shape(cells.get("encoder", 0), cells["decoder"], targets)


def _features(
    pairs: Sequence[Pair], count: int, shape: _Shape, config: ModelConfig, bidirectional: bool
) -> dict[str, np.ndarray]:
    """The model's features with segment ids, so that no id counts as padding; `target_tokens` and `target_cells`
    [rows, T] say what is scored and which cell predicts it."""

    def valid(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
        return padded([[1] * len(row) for row in rows], count, width)

    given = [list(inputs) for inputs, _ in pairs]
    wanted = [list(targets) for _, targets in pairs]
    before = [0 if config.encoder is not None else len(inputs) for inputs in given]
    whole = wanted if config.encoder is not None else [a + b for a, b in zip(given, wanted, strict=True)]
    streams = [[config.start_id, *tokens[:-1]] for tokens in whole]
    cells = [list(range(first, first + len(targets))) for first, targets in zip(before, wanted, strict=True)]
    features = {
        "decoder_input_tokens": padded(streams, count, shape.decoder),
        "decoder_segment_ids": valid(streams, shape.decoder),
        "target_tokens": padded(wanted, count, shape.targets),
        "target_cells": padded(cells, count, shape.targets),
    }
    if config.encoder is not None:
        features["encoder_input_tokens"] = padded(given, count, shape.encoder)
        features["encoder_segment_ids"] = valid(given, shape.encoder)
    elif bidirectional:
        # The cell that reads the last input and predicts the first target belongs to them, as in training.
        prefixes = [tokens[: length + 1] for tokens, length in zip(streams, before, strict=True)]
        features["decoder_causal_attention"] = valid(prefixes, shape.decoder)
    return features


@functools.partial(jax.jit, static_argnums=0)
def _score_batch(program: Program, params: Tree, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(log-likelihoods float32 [R, T], whether each target is the likeliest token bool [R, T]), on every device.

    Only the cells that predict a target go through the head.
    """
    features = dict(batch)
    targets_RxT, cells_RxT = features.pop("target_tokens"), features.pop("target_cells")
    with program.activations():
        model = decoding_model(program, params)
        states_RxLxd, _ = model.states(features)
        states_RxTxd = jnp.take_along_axis(states_RxLxd, cells_RxT[:, :, None], axis=1)
        logits_RxTxV = model.head(states_RxTxd, model.token_embedder.embedding[...]).astype(jnp.float32)
        log_z_RxT = jax.nn.logsumexp(logits_RxTxV, axis=-1)
        at_target_RxT = jnp.take_along_axis(logits_RxTxV, targets_RxT[:, :, None], axis=-1)[:, :, 0]
        greedy_RxT = most_likely(logits_RxTxV) == targets_RxT
        everywhere = NamedSharding(program.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint((at_target_RxT - log_z_RxT, greedy_RxT), everywhere)
