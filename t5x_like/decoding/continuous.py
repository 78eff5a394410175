"""Continuous batching: requests of unequal length stream through fixed slots of one compiled step.

A request takes a slot when one is free, its prompt is read into it, and each step gives every taken slot a token. Its
settings are arrays with one number per slot, so that neither requests that come and go nor what they ask for ever makes
a new program. What a request answers depends on its prompt, its settings and its seed alone, not on its neighbours.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from t5x_like.decoding import choosing
from t5x_like.decoding.choosing import Rules, State
from t5x_like.decoding.loop import read_prompts
from t5x_like.decoding.ready import decoding_model, ready_params
from t5x_like.decoding.rows import bucket, padded, require_positions, row_shares
from t5x_like.decoding.sampling import RowSampling, Sampling
from t5x_like.models.cache import Cache
from t5x_like.models.model import Model
from t5x_like.program import Program

Tree = Any
Finish = Literal["stop", "length", "cancelled"]
OnTokens = Callable[[list[int], Finish | None], None]
"""Called with new tokens, EOS left out, and how the answer ended with them or None."""

MOST_SEEDS = 2**32


@dataclasses.dataclass(eq=False)
class Request:
    """What is asked for.

    Attributes:
      prompt: Token ids, as `generate_tokens` takes them.
      max_new_tokens: EOS included.
      seed, row: Of the draws, as there.
      on_tokens: Called in the thread that runs the batcher.
      cancelled: Set by `Batcher.cancel`.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    on_tokens: OnTokens
    seed: int = 0
    row: int = 0
    cancelled: bool = False


class _Slots(NamedTuple):
    """What is on the device: S rows, taken or free. A pytree of fixed shapes.

    Attributes:
      cache: Of the tokens before `last_S`.
      left_S: int32, tokens that a row may still make; 0 for a row that is free or done.
      settings, chooser: Of `choosing`; without automata and stop strings.
    """

    cache: Cache
    last_S: jax.Array
    left_S: jax.Array
    sampling: RowSampling
    seeds_S: jax.Array
    rows_S: jax.Array
    chooser: State


@dataclasses.dataclass(frozen=True, eq=False)
class Sizes:
    """What is fixed when the programs are compiled.

    Attributes:
      slots: Requests that are answered at once.
      prompt_length: Tokens of the longest prompt.
      new_tokens: Tokens of the longest answer.
      steps: Tokens that every slot is given between two looks at what waits.
      admitted: Prompts that are read at once.
    """

    slots: int = 8
    prompt_length: int = 512
    new_tokens: int = 256
    steps: int = 4
    admitted: int = 4


class Batcher:
    """Answers requests. `submit`, `cancel` and `close` may be called from any thread; `run` and `run_once` from one.

    Attributes:
      failure: What ended `run` otherwise than `close`.
    """

    def __init__(
        self,
        program: Program,
        params: Tree,
        *,
        allowed_V: npt.NDArray[np.bool_],
        bidirectional: bool = False,
        sizes: Sizes | None = None,
        cache_dtype: str | None = None,
    ):
        """Args:
        program: With a decoder; its mesh splits the slots, whose number it must divide.
        allowed_V, bidirectional, cache_dtype: As of `generate_tokens`.

        Raises:
          ConfigError: the longest prompt and answer do not fit a table of learned positions.
        """
        self.sizes = sizes or Sizes()
        config = program.run.model
        require_positions(config, self.sizes.prompt_length + (config.encoder is None), self.sizes.new_tokens)
        shares = row_shares(program)
        self.sizes = dataclasses.replace(
            self.sizes,
            slots=-(-self.sizes.slots // shares) * shares,
            admitted=-(-min(self.sizes.admitted, self.sizes.slots) // shares) * shares,
        )
        self.program, self.params = program, ready_params(program, params)
        self._how = _How(program, self.sizes, bidirectional, cache_dtype)
        self._allowed = jnp.asarray(allowed_V)
        self._waiting: collections.deque[Request] = collections.deque()
        self._taken: list[Request | None] = [None] * self.sizes.slots
        self._changed = threading.Condition()
        self._closed = False
        self.failure: BaseException | None = None
        self._slots = _empty(self._how)

    def submit(self, request: Request) -> None:
        """See `submit_all`."""
        self.submit_all([request])

    def submit_all(self, requests: Sequence[Request]) -> None:
        """Puts requests at the end of the queue, all of them or none.

        Raises:
          ValueError: a prompt is empty or too long, too many tokens are asked for, or nobody answers any more.
        """
        sizes = self.sizes
        for request in requests:
            if not 0 < len(request.prompt) <= sizes.prompt_length:
                raise ValueError(f"a prompt of {len(request.prompt)} tokens, expected 1 to {sizes.prompt_length}")
            if not 0 < request.max_new_tokens <= sizes.new_tokens:
                raise ValueError(f"{request.max_new_tokens} new tokens, expected 1 to {sizes.new_tokens}")
        with self._changed:
            if self._closed:
                raise ValueError("the server is leaving")
            self._waiting.extend(requests)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Its slot is free from the next step on; `on_tokens` is told."""
        with self._changed:
            request.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def taken(self) -> int:
        return sum(request is not None for request in self._taken)

    def run(self) -> None:
        """Answers until closed; what is not answered by then is cancelled, as all is where a step fails."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._waiting or self.taken)
                    if self._closed:
                        break
                self.run_once()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self._changed:
                self._closed = True
                left = [request for request in (*self._taken, *self._waiting) if request is not None]
                self._waiting.clear()
            self._taken = [None] * self.sizes.slots
            for request in left:
                request.on_tokens([], "cancelled")

    def warm_up(self) -> None:
        """Compiles what any request may need, so that none waits for it."""
        longest = self.sizes.prompt_length
        width = bucket(1)
        while True:
            prompt = [self.program.run.model.vocab_size - 1] * min(width - 1, longest)
            # The first twice: free slots as they are at the beginning lie otherwise on the devices than later.
            for count in (1, 1, min(2, self.sizes.admitted)):
                for _ in range(count):
                    self.submit(Request(prompt, min(2, self.sizes.new_tokens), Sampling(), lambda tokens, finish: None))
                while self.waiting or self.taken:
                    self.run_once()
            if width > longest:
                return
            width *= 2

    def run_once(self) -> None:
        """Frees the slots of cancelled requests, reads as many prompts as there is room for, and steps."""
        self._drop_cancelled()
        while self._admit():
            pass
        if self.taken:
            self._slots, tokens_KxS, is_new_KxS, ended_KxS = _step(self._how, self.params, self._slots, self._allowed)
            self._deliver(*jax.device_get((tokens_KxS, is_new_KxS, ended_KxS)))

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [request for request in self._waiting if request.cancelled]
            for waiting in gone:
                self._waiting.remove(waiting)
        freed = np.zeros(self.sizes.slots, bool)
        for slot, request in enumerate(self._taken):
            if request is not None and request.cancelled:
                gone.append(request)
                self._taken[slot], freed[slot] = None, True
        if freed.any():
            self._slots = _freed(self._slots, freed)
        for request in gone:
            request.on_tokens([], "cancelled")

    def _admit(self) -> bool:
        """Reads the prompts of some requests, if there are any and slots for them."""
        free = [slot for slot, request in enumerate(self._taken) if request is None][: self.sizes.admitted]
        with self._changed:
            chosen = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
        if not chosen:
            return False
        # Before anything can fail, so that none is forgotten.
        for slot, request in zip(free, chosen, strict=False):
            self._taken[slot] = request
        rows = self.sizes.admitted if len(chosen) > 1 or row_shares(self.program) > 1 else 1
        fields = _fields(self.program, chosen, rows, self.sizes)
        # Rows that only fill the batch go behind the last slot, and are dropped.
        slots = np.full(rows, self.sizes.slots, np.int32)
        slots[: len(chosen)] = free[: len(chosen)]
        self._slots, tokens, is_new, ended = _read(
            self._how, self.params, self._slots, self._allowed, {**fields, "slots": slots}
        )
        tokens, is_new, ended = jax.device_get((tokens, is_new, ended))
        everything = np.zeros((3, 1, self.sizes.slots), np.int32)
        everything[:, 0, slots[: len(chosen)]] = np.stack([tokens, is_new, ended])[:, : len(chosen)]
        self._deliver(everything[0], everything[1] > 0, everything[2] > 0)
        return True

    def _deliver(
        self, tokens_KxS: npt.NDArray[np.int32], is_new_KxS: npt.NDArray[np.bool_], ended_KxS: npt.NDArray[np.bool_]
    ) -> None:
        """Tells requests their tokens and frees the slots of those that are done."""
        eos_ids = self.program.run.model.eos_ids
        for slot, request in enumerate(self._taken):
            if request is None or not is_new_KxS[:, slot].any():
                continue
            tokens = tokens_KxS[is_new_KxS[:, slot], slot].tolist()
            finish: Finish | None = None
            if ended_KxS[:, slot].any():
                finish = "stop" if tokens[-1] in eos_ids else "length"
                self._taken[slot] = None
            request.on_tokens(tokens[:-1] if finish == "stop" else tokens, finish)


@dataclasses.dataclass(frozen=True)
class _How:
    """What the compiled functions are made for: static, and equal only to itself by its program."""

    program: Program
    sizes: Sizes
    bidirectional: bool
    cache_dtype: str | None


def _fields(program: Program, requests: Sequence[Request], rows: int, sizes: Sizes) -> dict[str, npt.NDArray[Any]]:
    """Prompts and settings as arrays, with rows of length 1 below them that fill the batch."""
    config = program.run.model
    streams = [
        list(request.prompt) if config.encoder is not None else [config.start_id, *request.prompt]
        for request in requests
    ]
    longest = sizes.prompt_length + (config.encoder is None)
    width = min(bucket(max(map(len, streams))), longest)

    def column(values: Sequence[float], dtype: Any, filler: float) -> npt.NDArray[Any]:
        return np.array([*values, *[filler] * (rows - len(requests))], dtype)

    settings = [request.sampling for request in requests]
    return {
        "tokens": padded(streams, rows, width),
        "lengths": column([len(stream) for stream in streams], np.int32, 1),
        "limits": column([request.max_new_tokens for request in requests], np.int32, 0),
        "seeds": column([request.seed % MOST_SEEDS for request in requests], np.uint32, 0),
        "rows": column([request.row for request in requests], np.int32, 0),
        "temperature": column([one.temperature for one in settings], np.float32, 0),
        "top_k": column([one.top_k or config.vocab_size for one in settings], np.int32, 1),
        "top_p": column([1.0 if one.top_p is None else one.top_p for one in settings], np.float32, 1),
        "min_p": column([one.min_p or 0.0 for one in settings], np.float32, 0),
        "penalty": column([one.repetition_penalty for one in settings], np.float32, 1),
    }


def _sampling(fields: dict[str, jax.Array]) -> RowSampling:
    return RowSampling(*(fields[name] for name in ("temperature", "top_k", "top_p", "min_p", "penalty")))


def _rules(slots: _Slots, allowed_V: jax.Array) -> Rules:
    return Rules(allowed_V, slots.sampling, slots.seeds_S, slots.rows_S)


def _begin(how: _How, model: Model, allowed_V: jax.Array, fields: dict[str, jax.Array]) -> tuple[_Slots, Any]:
    """Rows with their prompts read and their first token chosen."""
    sizes, config = how.sizes, model.config
    tokens, lengths = fields["tokens"], fields["lengths"]
    # Caches are alike whatever the prompt's length, so that rows can be put beside each other.
    unread = sizes.prompt_length + 1 - tokens.shape[1] if config.encoder is None else 0
    logits, cache = read_prompts(
        model,
        tokens,
        lengths,
        sizes.new_tokens + unread,
        bidirectional=how.bidirectional,
        cache_dtype=how.cache_dtype,
    )
    if cache.cross is not None:
        cache = _longer_encoder(cache, sizes.prompt_length)
    start, start_lengths = tokens, lengths
    if config.encoder is not None:
        start = jnp.full((tokens.shape[0], 1), config.start_id, jnp.int32)
        start_lengths = jnp.ones_like(lengths)
    sampling = _sampling(fields)
    rules = Rules(allowed_V, sampling, fields["seeds"], fields["rows"])
    chooser = choosing.start(rules, start, start_lengths, config.vocab_size)
    token, chooser = _chosen(logits, rules, chooser, fields["limits"] > 0)
    ended = jnp.isin(token, jnp.array(config.eos_ids, jnp.int32)) | (fields["limits"] <= 1)
    left = jnp.where(ended, 0, fields["limits"] - 1)
    rows = _Slots(cache, token, left, sampling, fields["seeds"], fields["rows"], chooser)
    return rows, (token, jnp.ones_like(ended), ended)


def _chosen(logits_RxV: jax.Array, rules: Rules, chooser: State, live_R: jax.Array) -> tuple[jax.Array, State]:
    """The next tokens. What no live row asks for is not computed, which is seen anew at each step."""
    asked = rules.sampling
    assert asked.temperature_R is not None and asked.top_k_R is not None and asked.top_p_R is not None
    assert asked.min_p_R is not None
    draws_R = live_R & (asked.temperature_R > 0)
    cuts_R = draws_R & ((asked.top_k_R < logits_RxV.shape[-1]) | (asked.top_p_R < 1) | (asked.min_p_R > 0))

    def choose(sampling: RowSampling) -> tuple[jax.Array, State]:
        token_R, _, after = choosing.choose(logits_RxV, rules._replace(sampling=sampling), chooser)
        return token_R, after

    greedy = RowSampling(penalty_R=asked.penalty_R)
    return jax.lax.cond(
        jnp.any(cuts_R),
        lambda: choose(asked),
        lambda: jax.lax.cond(
            jnp.any(draws_R), lambda: choose(greedy._replace(temperature_R=asked.temperature_R)), lambda: choose(greedy)
        ),
    )


def _longer_encoder(cache: Cache, length: int) -> Cache:
    """With room for an encoder's longest prompt; what is added is padding."""
    assert cache.cross is not None and cache.encoder_segment_ids is not None
    missing = length - cache.encoder_segment_ids.shape[1]

    def longer(leaf: jax.Array) -> jax.Array:
        return jnp.pad(leaf, [(0, missing) if axis == 2 else (0, 0) for axis in range(leaf.ndim)])

    return cache._replace(
        cross=jax.tree.map(longer, cache.cross),
        encoder_segment_ids=jnp.pad(cache.encoder_segment_ids, ((0, 0), (0, missing))),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(
    how: _How, params: Tree, slots: _Slots, allowed_V: jax.Array, fields: dict[str, jax.Array]
) -> tuple[_Slots, jax.Array, jax.Array, jax.Array]:
    """Slots with prompts read into some of them, and of each prompt the first token, and whether it is the last."""
    with how.program.activations():
        rows, said = _begin(how, decoding_model(how.program, params), allowed_V, fields)
        where = fields["slots"]
        return (jax.tree.map(lambda old, new: old.at[where].set(new, mode="drop"), slots, rows), *said)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(
    how: _How, params: Tree, slots: _Slots, allowed_V: jax.Array
) -> tuple[_Slots, jax.Array, jax.Array, jax.Array]:
    """Some tokens more for each slot: [steps, S] tokens, whether they are new, and whether they end their answer."""
    with how.program.activations():
        model = decoding_model(how.program, params)
        rules = _rules(slots, allowed_V)
        eos_ids = jnp.array(model.config.eos_ids, jnp.int32)

        def one(slots: _Slots, _: None) -> tuple[_Slots, tuple[jax.Array, jax.Array, jax.Array]]:
            live_S = slots.left_S > 0
            logits, cache = model.decode(slots.last_S[:, None], slots.cache, counts_B=live_S.astype(jnp.int32))
            token_S, chooser = _chosen(logits[:, 0], rules, slots.chooser, live_S)
            ended_S = live_S & (jnp.isin(token_S, eos_ids) | (slots.left_S == 1))
            left_S = jnp.where(live_S & ~ended_S, slots.left_S - 1, 0)
            slots = slots._replace(cache=cache, last_S=token_S, left_S=left_S, chooser=chooser)
            return slots, (token_S, live_S, ended_S)

        slots, said = jax.lax.scan(one, slots, length=how.sizes.steps)
        return (slots, *said)


@functools.partial(jax.jit, donate_argnums=0)
def _freed(slots: _Slots, freed_S: jax.Array) -> _Slots:
    return slots._replace(left_S=jnp.where(freed_S, 0, slots.left_S))


def _empty(how: _How) -> _Slots:
    """Free slots, of the shapes that reading prompts gives."""
    program, sizes = how.program, how.sizes
    nobody = Request([1], 1, Sampling(), lambda tokens, finish: None)
    fields = _fields(program, [nobody], sizes.slots, sizes)

    shapes = jax.eval_shape(
        lambda params: _begin(
            how, program.model(params), jnp.ones(program.run.model.vocab_size, bool), jax.tree.map(jnp.asarray, fields)
        )[0],
        program.abstract_params,
    )
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
