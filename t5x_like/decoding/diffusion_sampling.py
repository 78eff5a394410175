"""Sampler of masked diffusion models: masked positions of a text are filled in several passes over the whole text.

The model is an encoder, or a decoder whose whole stream is a bidirectional prefix and that predicts each token one
position earlier (`data.objectives.masked_diffusion`). A pass computes the distributions of all masked positions of a
block, given every token that is known, and unmasks some of them; a token that is known never changes. An
encoder-decoder of block diffusion (`data.objectives.block_diffusion`) reads the text before a block once, in its
encoder, and each pass is one of the decoder over the block alone.

Which positions are unmasked does not depend on what is drawn there, so that with one token per pass a text has exactly
the probability that the model gives it in that order. In random order, all orders are equally likely, and the
distribution of texts is the mean over the orders (Uria et al. 2014), of which the loss of training is a bound. Several
tokens in one pass are drawn independently of each other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config import ModelConfig
from t5x_like.config.continuation import block_objective
from t5x_like.decoding.bucketing import bucket, num_row_shards, pad_rows, put_on_mesh, require_positions
from t5x_like.decoding.inference_params import InferenceParams, decoding_model, inference_params
from t5x_like.decoding.log_likelihood import MAX_LOGITS_PER_BATCH, in_place_features, require_masked_model
from t5x_like.decoding.sampling import RowSampling, Sampling, draw_keys, restrict, sample
from t5x_like.decoding.stop_strings import StopStrings, find_end
from t5x_like.decoding.token_selection import NOT_FINITE, not_finite
from t5x_like.decoding.unmasking_schedule import DiffusionSampling, Order
from t5x_like.errors import ConfigError, ConfigProblem, DataError
from t5x_like.models.kv_cache import KVCache
from t5x_like.models.model import Model
from t5x_like.program import Program
from t5x_like.utils.type_aliases import IntArray, PyTree

_DRAW, _PRIORITY = 0, 1
"""Uses of a position's key."""


class MaskedText(NamedTuple):
    """Text with positions to be filled.

    Attributes:
      tokens: Ids that the model reads, the mask token at the positions.
      positions: Positions that are filled, in ascending order.
    """

    tokens: Sequence[int]
    positions: Sequence[int]


def unmask_tokens(
    program: Program,
    params: PyTree | InferenceParams,
    texts: Sequence[MaskedText],
    *,
    allowed_V: npt.NDArray[np.bool_],
    diffusion: DiffusionSampling | None = None,
    sampling: Sampling | None = None,
    seed: int | Sequence[int] = 0,
    rows: Sequence[int] | None = None,
    batch_size: int = 32,
    ends_at_eos: bool = True,
    stops: StopStrings | None = None,
) -> list[list[int]]:
    """Return the tokens at the masked positions of each text, up to EOS or a stop string if `ends_at_eos`.

    Numbers of rows, lengths, positions and passes are rounded up to powers of two, so that any number of calls compiles
    a few programs only. The result of a text does not depend on the texts beside it, apart from rounding.

    Args:
      program: A program whose model is an encoder or a decoder alone, or an encoder-decoder of block diffusion.
      params: The program's parameters, or the result of `inference_params`.
      texts: The texts. Lengths may differ. In an encoder-decoder the positions are the end of the text.
      allowed_V: [vocabulary] of the tokens that may be selected.
      diffusion: Order and number of passes; None: the defaults.
      sampling: Sampling settings without a repetition penalty; None: greedy.
      seed: Seed of the draws; one for all texts, or one for each. The draws depend on (seed, row number, position)
        only.
      rows: Row number of each text for its draws; by default the index in `texts`.
      batch_size: Largest number of texts that are computed at once. Texts of similar length are batched together.
      ends_at_eos: The text ends with the first EOS at one of the positions, or with a stop string: blocks after the one
        that completes it are not computed.
      stops: Strings that end a text.

    Raises:
      ConfigError: the model has an encoder and a decoder that were not trained with block diffusion, a text has more
        tokens than learned positions, or there is a repetition penalty.
      DataError: the model's logits are not finite, or an encoder-decoder has text after the positions.
    """
    diffusion, sampling = diffusion or DiffusionSampling(), sampling or Sampling()
    config = program.run.model
    if block_objective(program.run.data) is None:
        require_masked_model(config)
    else:
        _require_end_positions(texts)
    if sampling.repetition_penalty != 1.0:
        found = repr(sampling.repetition_penalty)
        raise ConfigError([ConfigProblem("repetition_penalty", found, "1 where a text is unmasked in any order")])
    blocks = [diffusion.passes(len(text.positions)) for text in texts]
    longest = {
        # The start token, and the block.
        "decoder": 1 + max((sum(block) for of_text in blocks for block in of_text), default=0),
        # The first stack reads the text.
        next(iter(config.stacks)): max((len(text.tokens) for text in texts), default=0),
    }
    require_positions(config, "the longest text", longest)
    params = inference_params(program, params)
    seeds = [seed] * len(texts) if isinstance(seed, int) else seed
    results: list[list[int]] = [[] for _ in texts]
    for indices in _batches(program, texts, diffusion, batch_size):
        pending = [
            PendingText(
                texts[index],
                diffusion,
                seed=seeds[index],
                row=index if rows is None else rows[index],
                eos_ids=config.eos_ids if ends_at_eos else (),
                stops=stops if ends_at_eos else None,
            )
            for index in indices
        ]
        shape = BlockShape.of(program, pending)
        settings = sampling.for_rows(shape.rows)
        while not all(text.is_done for text in pending):
            open_texts = [None if text.is_done else text for text in pending]
            unmask_blocks(program, params, open_texts, shape, allowed_V, settings, diffusion.order)
        for index, text in zip(indices, pending, strict=True):
            if NOT_FINITE in text.new:
                raise DataError(
                    f"prompt {index}: found logits of its new token {text.new.index(NOT_FINITE)} that are not finite, "
                    "expected finite ones: the model's weights are damaged, or its numbers overflow in model.dtype; "
                    "use another checkpoint, or float32"
                )
            results[index] = text.result
    return results


def _require_end_positions(texts: Sequence[MaskedText]) -> None:
    for number, text in enumerate(texts):
        if list(text.positions) != list(range(len(text.tokens) - len(text.positions), len(text.tokens))):
            raise DataError(f"text {number}: found tokens after a masked position, expected none with block diffusion")


class PendingText:
    """Text whose blocks are filled one after the other.

    Attributes:
      tokens: Ids of the text, with the mask token at positions that are not filled yet.
      new: Tokens of the positions that have been filled.
      seed, row: Seed and row number of the draws.
    """

    def __init__(
        self,
        text: MaskedText,
        diffusion: DiffusionSampling,
        *,
        seed: int,
        row: int,
        eos_ids: Sequence[int] = (),
        stops: StopStrings | None = None,
    ):
        self.tokens = list(text.tokens)
        self.new: list[int] = []
        self.seed, self.row = seed, row
        self._positions = list(text.positions)
        self._passes = diffusion.passes(len(text.positions))
        self._eos_ids, self._stops = eos_ids, stops
        self._block = 0

    @property
    def block(self) -> tuple[list[int], list[int]]:
        """Positions of the next block, and the number of them that each pass unmasks."""
        passes = self._passes[self._block]
        return self._positions[len(self.new) : len(self.new) + sum(passes)], passes

    @property
    def largest_block(self) -> tuple[int, int, int]:
        """Largest number of positions, of passes, and of positions that one pass unmasks, of all blocks."""
        passes = self._passes or [[1]]
        return max(map(sum, passes)), max(map(len, passes)), max(map(max, passes))

    def fill(self, tokens: Sequence[int]) -> None:
        """Write the tokens of the next block."""
        for position, token in zip(self.block[0], tokens, strict=True):
            self.tokens[position] = token
        self.new += tokens
        self._block += 1

    @property
    def end(self) -> int | None:
        """Number of the new tokens before EOS, or up to the one that completes a stop string; None without an end."""
        return find_end(self.new, self._eos_ids, self._stops)

    @property
    def is_done(self) -> bool:
        return self._block == len(self._passes) or self.end is not None or NOT_FINITE in self.new

    @property
    def result(self) -> list[int]:
        """The new tokens without EOS and what follows it."""
        return self.new[: self.end]


class BlockShape(NamedTuple):
    """Sizes that a compiled program depends on.

    Attributes:
      rows: Number of texts.
      width: Number of tokens of a text.
      positions: Number of positions of a block.
      passes: Number of passes of a block.
      per_pass: Number of positions that a pass unmasks.
    """

    rows: int
    width: int
    positions: int
    passes: int
    per_pass: int

    @staticmethod
    def of(program: Program, texts: Sequence[PendingText]) -> BlockShape:
        """Return a shape for these texts, whose numbers are powers of two."""
        shards = num_row_shards(program)
        largest = np.max([text.largest_block for text in texts], axis=0)
        return BlockShape(
            shards * bucket(-(-len(texts) // shards), minimum=1),
            text_width(program.run.model, max(len(text.tokens) for text in texts)),
            *(bucket(int(size), minimum=1) for size in largest),
        ).within_positions(program.run.model)

    def within_positions(self, config: ModelConfig) -> BlockShape:
        """Return the shape with blocks of at most as many positions as a decoder beside an encoder has learned,
        one of them for its start token."""
        decoder = config.decoder
        if config.encoder is None or decoder is None or decoder.positions != "learned":
            return self
        return self._replace(positions=min(self.positions, decoder.max_positions - 1))


def text_width(config: ModelConfig, length: int) -> int:
    """Return the length rounded up to a power of two, within a table of learned positions."""
    stack = next(iter(config.stacks.values()))
    return min(bucket(length), stack.max_positions) if stack.positions == "learned" else bucket(length)


def unmask_blocks(
    program: Program,
    params: InferenceParams,
    texts: Sequence[PendingText | None],
    shape: BlockShape,
    allowed: npt.NDArray[np.bool_],
    sampling: RowSampling,
    order: Order,
) -> None:
    """Fill the next block of each text.

    Args:
      program, params: The model.
      texts: At most `shape.rows` texts, None for rows that are not computed.
      shape: Sizes, at least those of the blocks.
      allowed: bool [V] or [rows, V], the tokens that may be selected.
      sampling: Sampling settings of each row.
      order: See `DiffusionSampling`.
    """
    empty: tuple[list[int], list[int]] = ([], [])
    blocks = [empty if text is None else text.block for text in texts]
    blocks += [empty] * (shape.rows - len(blocks))
    # Positions beyond a block's own are beyond the text, where nothing is read or written.
    positions_RxB = np.full((shape.rows, shape.positions), shape.width, np.int32)
    for row, (positions, _) in enumerate(blocks):
        positions_RxB[row, : len(positions)] = positions

    def per_row(values: Sequence[int]) -> IntArray:
        return np.array([*values, *[0] * (shape.rows - len(values))])

    batch = {
        "tokens": pad_rows([[] if text is None else text.tokens for text in texts], shape.rows, shape.width),
        "lengths": per_row([0 if text is None else len(text.tokens) for text in texts]).astype(np.int32),
        "positions": positions_RxB,
        "counts": pad_rows([passes for _, passes in blocks], shape.rows, shape.passes),
        "seeds": per_row([0 if text is None else text.seed % 2**32 for text in texts]).astype(np.uint32),
        "rows": per_row([0 if text is None else text.row for text in texts]).astype(np.int32),
    }
    found_RxB = jax.device_get(
        _unmask(program, params, put_on_mesh(program, batch), allowed, sampling, order=order, per_pass=shape.per_pass)
    )
    for text, (positions, _), tokens in zip(texts, blocks, found_RxB.tolist(), strict=False):
        if text is not None:
            text.fill(tokens[: len(positions)])


@functools.partial(jax.jit, static_argnums=0, static_argnames=("order", "per_pass"))
def _unmask(
    program: Program,
    params: InferenceParams,
    batch: Mapping[str, jax.Array],
    allowed: jax.Array,
    sampling: RowSampling,
    *,
    order: Order,
    per_pass: int,
) -> jax.Array:
    """Return the tokens at `positions` [R, B], with `NOT_FINITE` for a token without finite logits."""
    config = program.run.model
    positions_RxB, counts_RxT = batch["positions"], batch["counts"]
    rows, width = batch["tokens"].shape
    row_Rx1 = jnp.arange(rows)[:, None]
    inside_RxB = positions_RxB < width
    keys_RxB = jax.vmap(draw_keys, in_axes=(None, None, 1), out_axes=1)(batch["seeds"], batch["rows"], positions_RxB)
    priority_RxB = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, _PRIORITY))))(keys_RxB)
    # One setting for each of a row's positions that a pass unmasks.
    settings = jax.tree.map(lambda values_R: jnp.repeat(values_R, per_pass), sampling)
    allowed = allowed if allowed.ndim == 1 else allowed[:, None]

    with program.mesh_context():
        model = decoding_model(program, params)

        # Positions outside of a row's block read any token; they are masked or not taken below.
        at_RxB = jnp.minimum(positions_RxB, width - 1)
        cache = None
        if config.encoder is not None and config.decoder is not None:
            cache = _read_before(model, batch["tokens"], positions_RxB[:, 0], positions_RxB.shape[1])

        def logits_of(tokens_RxW: jax.Array) -> jax.Array:
            if cache is not None:
                block_RxB = jnp.take_along_axis(tokens_RxW, at_RxB, axis=1)
                return _block_logits(model, block_RxB, jnp.sum(inside_RxB, axis=1), cache)
            states_RxWxd, _ = model.states(in_place_features(tokens_RxW, batch["lengths"], config))
            states_RxBxd = jnp.take_along_axis(states_RxWxd, at_RxB[:, :, None], axis=1)
            return model.head(states_RxBxd, model.token_embedder.embedding[...]).astype(jnp.float32)

        def unmask(index: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            tokens_RxW, open_RxB = state
            raw_RxBxV = logits_of(tokens_RxW)
            logits_RxBxV = restrict(raw_RxBxV, allowed)
            match order:
                case "confidence":
                    # The log-probability of the most likely token.
                    score_RxB = jnp.max(logits_RxBxV, axis=-1) - jax.nn.logsumexp(logits_RxBxV, axis=-1)
                case "random":
                    score_RxB = priority_RxB
                case unknown:
                    assert_never(unknown)
            # Of equal scores the one further left.
            _, choice_RxK = jax.lax.top_k(jnp.where(open_RxB, score_RxB, -jnp.inf), per_pass)
            is_taken_RxK = jnp.arange(per_pass) < counts_RxT[:, index][:, None]
            chosen_RxKxV = jnp.take_along_axis(logits_RxBxV, choice_RxK[:, :, None], axis=1)
            invalid_RxK = not_finite(jnp.take_along_axis(raw_RxBxV, choice_RxK[:, :, None], axis=1))
            keys_RxK = jax.vmap(lambda keys_B, choice_K: keys_B[choice_K])(keys_RxB, choice_RxK).reshape(-1)
            draw_keys_N = jax.vmap(lambda key: jax.random.fold_in(key, _DRAW))(keys_RxK)
            token_RxK = sample(chosen_RxKxV.reshape(rows * per_pass, -1), draw_keys_N, settings).reshape(rows, per_pass)
            token_RxK = jnp.where(invalid_RxK, NOT_FINITE, token_RxK)
            # Positions that are not taken are written beyond the arrays, where nothing is.
            at_RxK = jnp.where(is_taken_RxK, jnp.take_along_axis(positions_RxB, choice_RxK, axis=1), width)
            closed_RxK = jnp.where(is_taken_RxK, choice_RxK, open_RxB.shape[1])
            return (
                tokens_RxW.at[row_Rx1, at_RxK].set(token_RxK, mode="drop"),
                open_RxB.at[row_Rx1, closed_RxK].set(False, mode="drop"),
            )

        passes = jnp.max(jnp.sum(counts_RxT > 0, axis=1))
        tokens_RxW, _ = jax.lax.fori_loop(0, passes, unmask, (batch["tokens"], inside_RxB))
        found_RxB = jnp.take_along_axis(tokens_RxW, at_RxB, axis=1)
        return jax.lax.with_sharding_constraint(found_RxB, NamedSharding(program.mesh, PartitionSpec()))


def _read_before(model: Model, tokens_RxW: jax.Array, start_R: jax.Array, block: int) -> KVCache:
    """Return a cache with the encoder's keys and values of the tokens before `start_R`, followed by EOS as in training,
    and room for the start token and a block."""
    rows, width = tokens_RxW.shape
    index_W = jnp.arange(width)
    inputs_RxW = jnp.where(index_W == start_R[:, None], model.config.eos_ids[0], tokens_RxW)
    valid_RxW = (index_W <= start_R[:, None]).astype(jnp.int32)
    return model.start_decoding(model.encode(inputs_RxW, segment_ids=valid_RxW), valid_RxW, rows, block + 1)


def _block_logits(model: Model, block_RxB: jax.Array, size_R: jax.Array, cache: KVCache) -> jax.Array:
    """Return the logits of the first `size_R` tokens of a block at their own positions: float32 [R, B, V]."""
    start_Rx1 = jnp.full_like(block_RxB[:, :1], model.config.decoder_start_token_id)
    tokens_RxL = jnp.concatenate([start_Rx1, block_RxB], axis=1)
    return model.prefill(tokens_RxL, size_R + 1, cache, bidirectional=True, all_logits=True)[0][:, 1:]


def _batches(
    program: Program, texts: Sequence[MaskedText], diffusion: DiffusionSampling, batch_size: int
) -> list[list[int]]:
    """Return the indices of the texts of each batch, by number of positions and length. Texts without a position are in
    no batch."""
    order = sorted(
        (index for index, text in enumerate(texts) if text.positions),
        key=lambda index: (len(texts[index].positions), len(texts[index].tokens)),
    )
    batches: list[list[int]] = []
    while order:
        # By the largest text of the batch, the last one: the logits of a block are in memory at once.
        size = batch_size
        while size > 1:
            positions = len(texts[order[min(size, len(order)) - 1]].positions)
            block = bucket(min(diffusion.block_length or positions, positions), minimum=1)
            if size * block * program.run.model.vocab_size <= MAX_LOGITS_PER_BATCH:
                break
            size //= 2
        batches.append(order[:size])
        order = order[size:]
    return batches
