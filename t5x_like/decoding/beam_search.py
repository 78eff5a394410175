"""Compiled beam search: B live and B finished hypotheses per prompt, with exact top-k.

There are two variants, which differ in more than the length penalty. n is the number of new tokens, EOS included.

                          t5x                            transformers
  score                   log p / ((5 + n) / 6)**alpha   log p / n**alpha
  may finish              those of the best (1 + E) B    those of the best B candidates only
                          candidates that end in EOS
  at the length limit     unfinished hypotheses are      unfinished hypotheses count as finished
                          dropped, unless none has
                          finished
  a prompt is done when   no live hypothesis, with the   no live hypothesis, with the penalty of its current length
                          penalty of the limit, is       (of the limit where `early_stopping` is "never"), is better;
                          better                         or B have finished, where `early_stopping` is True

(1 + E) B candidates, with E ids that end a text, ensure that at least B candidates do not end. Stop strings can end any
number of them, so with stop strings the live hypotheses are chosen among all continuations. T5X's bound is exact:
log p only falls, and the divisor is largest at the limit, so the result is that of an unbounded search with the same
beams.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.config import ModelConfig
from t5x_like.decoding import token_selection
from t5x_like.decoding.decode_loop import read_prompts
from t5x_like.decoding.inference_params import InferenceParams, decoding_model
from t5x_like.decoding.stop_strings import FOUND
from t5x_like.decoding.token_selection import SelectionParams, SelectionState
from t5x_like.errors import ConfigError, ConfigProblem
from t5x_like.models.kv_cache import KVCache
from t5x_like.program import Program
from t5x_like.utils.type_aliases import PyTree


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Settings of a beam search.

    Attributes:
      size: Number of hypotheses per prompt, B.
      length_penalty: Exponent alpha; 0 scores by log p alone. T5X's default is 0.6 (Wu et al. 2016, "Google's Neural
        Machine Translation System"), that of transformers is 1.0.
      variant: Variant of the search, see the module.
      early_stopping: Option of the variant "transformers".

    Raises:
      ConfigError: a value is out of range.
    """

    size: int = 4
    length_penalty: float = 0.6
    variant: Literal["t5x", "transformers"] = "t5x"
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        problems = []
        if self.size < 1:
            problems.append(ConfigProblem("beam_size", str(self.size), "at least 1"))
        if not 0.0 <= self.length_penalty < float("inf"):
            problems.append(ConfigProblem("length_penalty", repr(self.length_penalty), "0 or more"))
        if self.variant == "t5x" and self.early_stopping is not False:
            problems.append(ConfigProblem("early_stopping", repr(self.early_stopping), "False with T5X's search"))
        if problems:
            raise ConfigError(problems)

    def normalize_score(self, log_p: Array, length: Array) -> Array:
        """Return the scores of hypotheses with log-probability `log_p` and `length` tokens."""
        match self.variant:
            case "t5x":
                base = (5.0 + length) / 6.0
            case "transformers":
                base = length.astype(jnp.float32)
            case unknown:
                assert_never(unknown)
        return log_p / base**self.length_penalty


class BeamState(NamedTuple):
    """State of the search for R prompts with B hypotheses each. A pytree of fixed shapes.

    Attributes:
      steps: int32 scalar, number of tokens of the live hypotheses of prompts that are not done.
      lengths_R: int32, number of tokens of each prompt's live hypotheses.
      live_log_p: float32 [R, B], log-probabilities of live hypotheses, minus infinity where there is none.
      live_tokens: int32 [R, B, N].
      finished_scores: float32 [R, B], best first, minus infinity where there is none.
      finished_tokens: int32 [R, B, N], EOS included.
      finished_lengths: int32 [R, B].
      done_R: bool, True where no better hypothesis can be found.
      cache: Keys and values of the R * B live hypotheses.
      selection_state: Penalty, constraint and stop-string state of the R * B live hypotheses.
    """

    steps: Array
    lengths_R: Array
    live_log_p: Array
    live_tokens: Array
    finished_scores: Array
    finished_tokens: Array
    finished_lengths: Array
    done_R: Array
    cache: KVCache
    selection_state: SelectionState


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("buffer_length", "search", "bidirectional", "cache_dtype")
)
def search_batch(
    program: Program,
    params: PyTree | InferenceParams,
    batch: Mapping[str, Array],
    selection: SelectionParams,
    *,
    buffer_length: int,
    search: BeamSearch,
    bidirectional: bool,
    cache_dtype: str | None,
) -> tuple[Array, Array, Array]:
    """Search the best continuations of a batch of prompts.

    Args:
      batch: "tokens" [R, P], "lengths" [R] and "limits" [R], as `read_prompts` and `decode_rows` take them.
      selection: Selection of R rows; its sampling settings are ignored, except for the repetition penalty.
      buffer_length: Length N of the result, at least the largest limit.

    Returns:
      Tokens [R, B, N] with EOS, their numbers [R, B], and scores [R, B], best first, replicated on all devices. A score
      of minus infinity marks a hypothesis that does not exist.
    """
    config = program.run.model
    with program.mesh_context():
        model = decoding_model(program, params)
        logits_RxV, cache = read_prompts(
            model,
            batch["tokens"],
            batch["lengths"],
            buffer_length,
            bidirectional=bidirectional,
            cache_dtype=cache_dtype,
        )
        rows, vocabulary = logits_RxV.shape
        decoder_prompt = batch["tokens"], batch["lengths"]
        if config.encoder is not None:
            decoder_prompt = (
                jnp.full((rows, 1), config.decoder_start_token_id, jnp.int32),
                jnp.ones(rows, jnp.int32),
            )
        # The prompts are read once; their caches are then repeated for the beams.
        prompt_of_beam = jnp.repeat(jnp.arange(rows), search.size)
        selection_state = token_selection.initial_state(selection, *decoder_prompt, vocabulary)
        initial = BeamState(
            steps=jnp.int32(0),
            lengths_R=jnp.zeros(rows, jnp.int32),
            # All beams of a prompt are equal at first. Only the first one is live, or candidates would be duplicated.
            live_log_p=jnp.where(jnp.arange(search.size) == 0, 0.0, -jnp.inf) * jnp.ones((rows, 1)),
            live_tokens=jnp.zeros((rows, search.size, buffer_length), jnp.int32),
            finished_scores=jnp.full((rows, search.size), -jnp.inf),
            finished_tokens=jnp.zeros((rows, search.size, buffer_length), jnp.int32),
            finished_lengths=jnp.zeros((rows, search.size), jnp.int32),
            done_R=batch["limits"] < 1,
            # Prompt r has the rows r B to r B + B - 1, an order that `_gather_beams` and the reshapes to [R, B] rely
            # on.
            cache=cache.for_beams(search.size),
            selection_state=token_selection.reorder(selection_state, prompt_of_beam),
        )
        selection = _repeat_for_beams(selection, prompt_of_beam)
        logits = jnp.take(logits_RxV, prompt_of_beam, axis=0)

        def step(state: BeamState) -> BeamState:
            last_RxB = jax.lax.dynamic_index_in_dim(state.live_tokens, state.steps - 1, axis=2, keepdims=False)
            # A prompt that is done adds nothing to its cache, but is computed: shapes are fixed.
            live = jnp.repeat(~state.done_R, search.size).astype(jnp.int32)
            logits, cache = model.decode(last_RxB.reshape(-1, 1), state.cache, counts_B=live)
            return _extend(state._replace(cache=cache), logits[:, 0], selection, batch["limits"], search, config)

        final = jax.lax.while_loop(
            lambda state: ~jnp.all(state.done_R),
            step,
            _extend(initial, logits, selection, batch["limits"], search, config),
        )
        replicated = NamedSharding(program.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(_finalize(final, search), replicated)


def _repeat_for_beams(selection: SelectionParams, prompt_of_beam: Array) -> SelectionParams:
    """Return the settings of R rows repeated for R * B rows."""
    return selection._replace(
        allowed=selection.allowed if selection.allowed.ndim == 1 else selection.allowed[prompt_of_beam],
        sampling=jax.tree.map(lambda leaf: leaf[prompt_of_beam], selection.sampling),
        seeds_R=selection.seeds_R[prompt_of_beam],
        rows_R=selection.rows_R[prompt_of_beam],
    )


def _extend(
    state: BeamState,
    logits: Array,
    selection: SelectionParams,
    limits_R: Array,
    search: BeamSearch,
    config: ModelConfig,
) -> BeamState:
    """Extend every live hypothesis by one token: choose the new finished and the new live hypotheses of each prompt.

    Args:
      logits: [R * B, V], of the next token of each live hypothesis.
    """
    rows, size = state.live_log_p.shape
    # Of each hypothesis at most E continuations end in EOS, so at least B of these candidates do not.
    num_candidates = (1 + max(len(config.eos_ids), 1)) * size
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    # The log-softmax is taken before the constraints: forbidden tokens are excluded, and their probability is not given
    # to the others.
    log_p = token_selection.process_logits(log_p, selection, state.selection_state)
    log_p_RxBxV = log_p.reshape(rows, size, -1) + state.live_log_p[:, :, None]
    candidates_log_p, beam_RxC, token_RxC = _top_candidates(log_p_RxBxV, num_candidates)
    # All candidates have `steps` tokens, so the new token goes to the same index in each.
    tokens_RxCxN = jax.lax.dynamic_update_index_in_dim(
        _gather_beams(state.live_tokens, beam_RxC), token_RxC, state.steps, axis=2
    )
    steps = state.steps + 1
    at_limit_R = steps >= limits_R
    eos_ids = jnp.array(config.eos_ids, jnp.int32)
    ends_RxC = jnp.isin(token_RxC, eos_ids)
    going_on = None
    if state.selection_state.stop_R is not None and selection.stops_SxV is not None:
        # The stop state before the token is that of its beam; the table gives the state after it.
        stop_RxB = state.selection_state.stop_R.reshape(rows, size)
        ends_RxC = ends_RxC | (selection.stops_SxV[_gather_beams(stop_RxB, beam_RxC), token_RxC] == FOUND)
        # Any number of tokens can complete a stop string, so that all candidates may end. The live hypotheses are
        # therefore chosen among all continuations that do not end.
        ends_V = jnp.isin(jnp.arange(log_p_RxBxV.shape[-1]), eos_ids)
        ends_RxBxV = ends_V | (selection.stops_SxV[stop_RxB] == FOUND)
        going_on = _top_candidates(jnp.where(ends_RxBxV, -jnp.inf, log_p_RxBxV), size)
    match search.variant:
        case "t5x":
            may_finish_RxC = ends_RxC
        case "transformers":
            ends_RxC = ends_RxC | at_limit_R[:, None]
            # transformers ignores an end of text that is not among the best B candidates.
            may_finish_RxC = ends_RxC & (jnp.arange(token_RxC.shape[1]) < size)
        case unknown:
            assert_never(unknown)
    may_finish_RxC = may_finish_RxC & ~state.done_R[:, None]

    # Finished hypotheses: the best B of the old ones and the candidates that end.
    new_scores = jnp.where(may_finish_RxC, search.normalize_score(candidates_log_p, steps), -jnp.inf)
    new_lengths = jnp.full(new_scores.shape, steps)
    scores = jnp.concatenate([state.finished_scores, new_scores], axis=1)
    # Old hypotheses come first: `top_k` keeps the earlier of two equal scores.
    finished_scores, kept_RxB = jax.lax.top_k(scores, size)
    finished_tokens = _gather_beams(jnp.concatenate([state.finished_tokens, tokens_RxCxN], axis=1), kept_RxB)
    finished_lengths = _gather_beams(jnp.concatenate([state.finished_lengths, new_lengths], axis=1), kept_RxB)

    # Live hypotheses: the best B candidates that do not end. With T5X's search at the limit, they are kept only in case
    # no hypothesis has finished.
    if going_on is None:
        live_log_p, chosen_RxB = jax.lax.top_k(jnp.where(ends_RxC, -jnp.inf, candidates_log_p), size)
        parent_RxB, next_RxB = _gather_beams(beam_RxC, chosen_RxB), _gather_beams(token_RxC, chosen_RxB)
    else:
        live_log_p, parent_RxB, next_RxB = going_on
    live_tokens = jax.lax.dynamic_update_index_in_dim(
        _gather_beams(state.live_tokens, parent_RxB), next_RxB, state.steps, axis=2
    )

    def take_parents(leaf: Array) -> Array:
        # Children continue their parent's text, so they need the penalties of the parent.
        by_prompt = leaf.reshape(rows, size, *leaf.shape[1:])
        return _gather_beams(by_prompt, parent_RxB).reshape(leaf.shape)

    cache = state.cache.follow_beams(parent_RxB)
    selection_state = token_selection.advance(
        next_RxB.reshape(-1), selection, jax.tree.map(take_parents, state.selection_state)
    )
    # `top_k` sorts, so the first live hypothesis is the best one, and the last finished one the worst.
    complete_R = _is_complete(live_log_p[:, 0], finished_scores, steps, limits_R, search)
    was_done = state.done_R[:, None]
    return BeamState(
        steps=steps,
        lengths_R=jnp.where(state.done_R, state.lengths_R, steps),
        live_log_p=jnp.where(was_done, state.live_log_p, live_log_p),
        live_tokens=jnp.where(was_done[:, :, None], state.live_tokens, live_tokens),
        finished_scores=finished_scores,
        finished_tokens=finished_tokens,
        finished_lengths=finished_lengths,
        done_R=state.done_R | at_limit_R | complete_R,
        cache=cache,
        selection_state=selection_state,
    )


def _top_candidates(log_p_RxBxV: Array, count: int) -> tuple[Array, Array, Array]:
    """Return (log p, beam, token), [R, C] each, of the best C candidates.

    The result is exact. Of equal candidates those of lower beams and token ids come first. The top-k is taken per beam
    first and of these then, which avoids a sort of all B * V candidates.
    """
    rows, size, vocabulary = log_p_RxBxV.shape
    per_beam = min(count, vocabulary)
    best_RxBxC, token_RxBxC = jax.lax.top_k(log_p_RxBxV, per_beam)
    log_p, index = jax.lax.top_k(best_RxBxC.reshape(rows, -1), min(count, size * per_beam))
    token = jnp.take_along_axis(token_RxBxC.reshape(rows, -1), index, axis=1)
    return log_p, index // per_beam, token.astype(jnp.int32)


def _gather_beams(x_RxBx: Array, beam_RxC: Array) -> Array:
    """Gather [R, C, ...] from [R, B, ...] within each prompt, so that a mesh that splits prompts transfers nothing."""
    return jax.vmap(lambda x, beam: x[beam])(x_RxBx, beam_RxC)


def _is_complete(
    best_live_R: Array, finished_scores: Array, steps: Array, limits_R: Array, search: BeamSearch
) -> Array:
    """Return bool [R], True where B hypotheses have finished and no live one can still enter the best B."""
    worst_R = finished_scores[:, -1]
    if search.variant == "transformers" and search.early_stopping is True:
        # The worst of B finished ones is finite only if all B exist.
        return worst_R > -jnp.inf
    # The bound of transformers: it ignores that a longer hypothesis has a larger divisor, and can stop too early.
    length_R = jnp.broadcast_to(steps, limits_R.shape)
    if search.variant == "t5x" or search.early_stopping == "never":
        length_R = limits_R
    return search.normalize_score(best_live_R, length_R) <= worst_R


def _finalize(state: BeamState, search: BeamSearch) -> tuple[Array, Array, Array]:
    """Return tokens, lengths and scores of the finished hypotheses, or of the live ones where none has finished."""
    none_finished_Rx1 = state.finished_scores[:, :1] == -jnp.inf
    lengths_Rx1 = state.lengths_R[:, None]
    live_scores = search.normalize_score(state.live_log_p, jnp.maximum(lengths_Rx1, 1))
    return (
        jnp.where(none_finished_Rx1[:, :, None], state.live_tokens, state.finished_tokens),
        jnp.where(none_finished_Rx1, lengths_Rx1, state.finished_lengths),
        jnp.where(none_finished_Rx1, live_scores, state.finished_scores),
    )
