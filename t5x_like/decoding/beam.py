"""Beam search, compiled: B hypotheses per prompt go on, B that have ended are kept, and the top-k is exact.

Two kinds, which differ in more than their penalty. n is the number of new tokens, EOS included.

                          t5x                            transformers
  score                   log p / ((5 + n) / 6)**alpha   log p / n**alpha
  may end                 of the best (1 + E) B          of the best B candidates only
                          candidates, those in EOS
  at the limit            what has not ended is dropped  what has not ended counts as ended
                          unless nothing has
  a prompt is done when   no live one, with the penalty  no live one, with the penalty of now, is better (that of
                          of its limit, is better        its limit where `early_stopping` is "never"); or B have
                                                         ended, where it is True

(1 + E) B, with E ids that end a text, is the number of candidates: so B always go on. T5X's bound is exact: log p only
falls, and the penalty of the limit is the greatest, so that what is found is what an unbounded search with the same
beams would find.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config import ConfigError, ModelConfig, Problem
from t5x_like.decoding import choosing
from t5x_like.decoding.choosing import Rules, State
from t5x_like.decoding.loop import read_prompts
from t5x_like.decoding.ready import ReadyParams, decoding_model
from t5x_like.decoding.stops import FOUND
from t5x_like.models.cache import Cache
from t5x_like.program import Program

Tree = Any


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Settings.

    Attributes:
      size: Hypotheses per prompt, B.
      length_penalty: alpha; 0 scores by log p alone. T5X's default is 0.6 (Wu et al. 2016), that of transformers 1.0.
      like: See the module.
      early_stopping: Of "transformers".

    Raises:
      ConfigError: a value out of range.
    """

    size: int = 4
    length_penalty: float = 0.6
    like: Literal["t5x", "transformers"] = "t5x"
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        problems = []
        if self.size < 1:
            problems.append(Problem("beam_size", str(self.size), "at least 1"))
        if not 0.0 <= self.length_penalty < float("inf"):
            problems.append(Problem("length_penalty", repr(self.length_penalty), "0 or more"))
        if self.like == "t5x" and self.early_stopping is not False:
            problems.append(Problem("early_stopping", repr(self.early_stopping), "False with T5X's search"))
        if problems:
            raise ConfigError(problems)

    def normalized(self, log_p: Array, length: Array) -> Array:
        """Scores of hypotheses of so many tokens."""
        base = (5.0 + length) / 6.0 if self.like == "t5x" else length.astype(jnp.float32)
        return log_p / base**self.length_penalty


class Beams(NamedTuple):
    """R prompts with B hypotheses each.

    Attributes:
      steps: int32 scalar, tokens of the live hypotheses of prompts that are not done.
      lengths_R: int32, tokens of each prompt's live hypotheses.
      live_log_p: float32 [R, B], minus infinity where there is none.
      live_tokens: int32 [R, B, N].
      ended_scores: float32 [R, B], best first, minus infinity where there is none.
      ended_tokens: int32 [R, B, N], EOS included.
      ended_lengths: int32 [R, B].
      done_R: bool, nothing better can come.
      cache: Of R * B rows.
      chooser: Of as many rows.
    """

    steps: Array
    lengths_R: Array
    live_log_p: Array
    live_tokens: Array
    ended_scores: Array
    ended_tokens: Array
    ended_lengths: Array
    done_R: Array
    cache: Cache
    chooser: State


@functools.partial(jax.jit, static_argnums=0, static_argnames=("cells", "search", "bidirectional", "cache_dtype"))
def search_batch(
    program: Program,
    params: Tree | ReadyParams,
    batch: Mapping[str, Array],
    rules: Rules,
    *,
    cells: int,
    search: BeamSearch,
    bidirectional: bool,
    cache_dtype: str | None,
) -> tuple[Array, Array, Array]:
    """(tokens [R, B, N], their numbers [R, B], scores [R, B]), best first, on every device; a score of minus infinity
    is no hypothesis. EOS is among the tokens.

    Args:
      batch: "tokens" [R, P], "lengths" [R], "limits" [R], as `loop.read_prompts` and `loop.decode_rows` take them.
      rules: Of R rows; of its sampling, the penalty alone is read.
    """
    config = program.run.model
    with program.activations():
        model = decoding_model(program, params)
        logits_RxV, cache = read_prompts(
            model, batch["tokens"], batch["lengths"], cells, bidirectional=bidirectional, cache_dtype=cache_dtype
        )
        rows, vocabulary = logits_RxV.shape
        every = jnp.repeat(jnp.arange(rows), search.size)
        reads = batch["tokens"], batch["lengths"]
        if config.encoder is not None:
            reads = jnp.full((rows, 1), config.start_id, jnp.int32), jnp.ones(rows, jnp.int32)
        now = Beams(
            steps=jnp.int32(0),
            lengths_R=jnp.zeros(rows, jnp.int32),
            live_log_p=jnp.where(jnp.arange(search.size) == 0, 0.0, -jnp.inf) * jnp.ones((rows, 1)),
            live_tokens=jnp.zeros((rows, search.size, cells), jnp.int32),
            ended_scores=jnp.full((rows, search.size), -jnp.inf),
            ended_tokens=jnp.zeros((rows, search.size, cells), jnp.int32),
            ended_lengths=jnp.zeros((rows, search.size), jnp.int32),
            done_R=batch["limits"] < 1,
            cache=jax.tree.map(lambda leaf: jnp.take(leaf, every, axis=0), cache),
            chooser=choosing.reorder(choosing.start(rules, *reads, vocabulary), every),
        )
        wide = _widened(rules, every)
        now = _extend(now, jnp.take(logits_RxV, every, axis=0), wide, batch["limits"], search, config)

        def step(now: Beams) -> Beams:
            last_RxB = jax.lax.dynamic_index_in_dim(now.live_tokens, now.steps - 1, axis=2, keepdims=False)
            going = jnp.repeat(~now.done_R, search.size).astype(jnp.int32)
            logits, cache = model.decode(last_RxB.reshape(-1, 1), now.cache, counts_B=going)
            return _extend(now._replace(cache=cache), logits[:, 0], wide, batch["limits"], search, config)

        now = jax.lax.while_loop(lambda now: ~jnp.all(now.done_R), step, now)
        everywhere = NamedSharding(program.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(_result(now, search), everywhere)


def _widened(rules: Rules, every: Array) -> Rules:
    """The rules of R rows for R * B."""
    return rules._replace(
        allowed=rules.allowed if rules.allowed.ndim == 1 else rules.allowed[every],
        sampling=jax.tree.map(lambda leaf: leaf[every], rules.sampling),
        seeds_R=rules.seeds_R[every],
        rows_R=rules.rows_R[every],
    )


def _extend(now: Beams, logits: Array, rules: Rules, limits_R: Array, search: BeamSearch, config: ModelConfig) -> Beams:
    """One more token for every live hypothesis: logits [R * B, V] of what comes next."""
    rows, size = now.live_log_p.shape
    count = (1 + max(len(config.eos_ids), 1)) * size
    log_p = choosing.processed(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), rules, now.chooser)
    candidates_log_p, beam_RxC, token_RxC = _best(log_p.reshape(rows, size, -1) + now.live_log_p[:, :, None], count)
    tokens_RxCxN = jax.lax.dynamic_update_index_in_dim(
        _of_beams(now.live_tokens, beam_RxC), token_RxC, now.steps, axis=2
    )
    steps = now.steps + 1
    at_limit_R = steps >= limits_R
    ends_RxC = jnp.isin(token_RxC, jnp.array(config.eos_ids, jnp.int32))
    if now.chooser.stop_R is not None and rules.stops_SxV is not None:
        stop_RxC = _of_beams(now.chooser.stop_R.reshape(rows, size), beam_RxC)
        ends_RxC = ends_RxC | (rules.stops_SxV[stop_RxC, token_RxC] == FOUND)
    if search.like == "transformers":
        ends_RxC = ends_RxC | at_limit_R[:, None]
        may_end_RxC = ends_RxC & (jnp.arange(token_RxC.shape[1]) < size)
    else:
        may_end_RxC = ends_RxC
    may_end_RxC = may_end_RxC & ~now.done_R[:, None]

    # Those that have ended: the best of the old and the new.
    new_scores = jnp.where(may_end_RxC, search.normalized(candidates_log_p, steps), -jnp.inf)
    new_lengths = jnp.full(new_scores.shape, steps)
    scores = jnp.concatenate([now.ended_scores, new_scores], axis=1)
    ended_scores, kept_RxB = jax.lax.top_k(scores, size)
    ended_tokens = _of_beams(jnp.concatenate([now.ended_tokens, tokens_RxCxN], axis=1), kept_RxB)
    ended_lengths = _of_beams(jnp.concatenate([now.ended_lengths, new_lengths], axis=1), kept_RxB)

    # Those that go on. Of T5X's at the limit nobody has to: they are what is left if nothing has ended.
    live_log_p, going_RxB = jax.lax.top_k(jnp.where(ends_RxC, -jnp.inf, candidates_log_p), size)
    parent_RxB, next_RxB = _of_beams(beam_RxC, going_RxB), _of_beams(token_RxC, going_RxB)
    live_tokens = _of_beams(tokens_RxCxN, going_RxB)

    def follow(leaf: Array) -> Array:
        by_prompt = leaf.reshape(rows, size, *leaf.shape[1:])
        return _of_beams(by_prompt, parent_RxB).reshape(leaf.shape)

    # What came of the encoder is the same for all beams of a prompt.
    cache = now.cache._replace(lengths=follow(now.cache.lengths), layers=jax.tree.map(follow, now.cache.layers))
    chooser = choosing.advance(next_RxB.reshape(-1), rules, jax.tree.map(follow, now.chooser))
    done_R = now.done_R | at_limit_R | _settled(live_log_p[:, 0], ended_scores, steps, limits_R, search)
    old = now.done_R[:, None]
    return Beams(
        steps=steps,
        lengths_R=jnp.where(now.done_R, now.lengths_R, steps),
        live_log_p=jnp.where(old, now.live_log_p, live_log_p),
        live_tokens=jnp.where(old[:, :, None], now.live_tokens, live_tokens),
        ended_scores=ended_scores,
        ended_tokens=ended_tokens,
        ended_lengths=ended_lengths,
        done_R=done_R,
        cache=cache,
        chooser=chooser,
    )


def _best(log_p_RxBxV: Array, count: int) -> tuple[Array, Array, Array]:
    """(log p, beam, token), [R, C] each, of the best C: exactly, and of equal ones those of lower beams and ids."""
    rows, size, vocabulary = log_p_RxBxV.shape
    of_each = min(count, vocabulary)
    best_RxBxC, token_RxBxC = jax.lax.top_k(log_p_RxBxV, of_each)
    log_p, place = jax.lax.top_k(best_RxBxC.reshape(rows, -1), min(count, size * of_each))
    token = jnp.take_along_axis(token_RxBxC.reshape(rows, -1), place, axis=1)
    return log_p, place // of_each, token.astype(jnp.int32)


def _of_beams(x_RxBx: Array, beam_RxC: Array) -> Array:
    """[R, C, ...] out of [R, B, ...], prompt by prompt, so that a mesh that splits prompts moves nothing."""
    return jax.vmap(lambda x, beam: x[beam])(x_RxBx, beam_RxC)


def _settled(best_live_R: Array, ended_scores: Array, steps: Array, limits_R: Array, search: BeamSearch) -> Array:
    """bool [R]: B have ended, and no live one can be better than the worst of them."""
    worst_R = ended_scores[:, -1]
    if search.like == "transformers" and search.early_stopping is True:
        return worst_R > -jnp.inf
    length_R = jnp.broadcast_to(steps, limits_R.shape)
    if search.like == "t5x" or search.early_stopping == "never":
        length_R = limits_R
    return search.normalized(best_live_R, length_R) <= worst_R


def _result(now: Beams, search: BeamSearch) -> tuple[Array, Array, Array]:
    none_ended_Rx1 = now.ended_scores[:, :1] == -jnp.inf
    lengths_Rx1 = now.lengths_R[:, None]
    live_scores = search.normalized(now.live_log_p, jnp.maximum(lengths_Rx1, 1))
    return (
        jnp.where(none_ended_Rx1[:, :, None], now.live_tokens, now.ended_tokens),
        jnp.where(none_ended_Rx1, lengths_Rx1, now.ended_lengths),
        jnp.where(none_ended_Rx1, live_scores, now.ended_scores),
    )
