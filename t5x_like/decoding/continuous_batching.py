"""Continuous batching: requests of unequal length are decoded in fixed slots of one compiled step.

A request takes a slot when one is free. Its prompt is read into the slot, and each step decodes one token for every
slot in use. The settings of requests are arrays with one value per slot, so neither new requests nor their settings
compile a new program. The result of a request depends on its prompt, its settings and its seed only, not on the other
requests.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from t5x_like.decoding.bucketing import bucket, check_positions, num_row_shards, pad_rows
from t5x_like.decoding.fair_queue import FairQueue
from t5x_like.decoding.inference_params import inference_params
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.slots import SlotSettings, decode_slots, empty_slots, free_slots, prefill_slots
from t5x_like.decoding.token_selection import NOT_FINITE
from t5x_like.program import Program
from t5x_like.utils.stall_limit import progress, stall_seconds
from t5x_like.utils.type_aliases import PyTree

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""Why a request has ended; "error": the logits of its next token are not finite."""
OnTokens = Callable[[list[int], FinishReason | None], None]
"""Called with new tokens without EOS, and the finish reason with the last ones (None before)."""

NUM_SEEDS = 2**32
_IDLE_SECONDS = 60.0


@dataclasses.dataclass(eq=False)
class Request:
    """Request to continue one prompt.

    Attributes:
      prompt: Token ids, as `generate_tokens` takes them.
      max_new_tokens: Largest number of new tokens, EOS included.
      sampling: Sampling settings.
      on_tokens: Called with new tokens, in the thread that runs the batcher.
      seed, row: Seed and row number of the draws, as in `generate_tokens`.
      client: Name of the client; clients are served in turn.
      cancelled: Set by `Batcher.cancel`.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    on_tokens: OnTokens
    seed: int = 0
    row: int = 0
    client: str = ""
    cancelled: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class BatcherConfig:
    """Sizes that are fixed when the programs are compiled.

    Attributes:
      slots: Number of requests that are decoded at once.
      max_prompt_length: Largest number of tokens of a prompt.
      max_new_tokens: Largest number of new tokens of a request.
      steps_per_sync: Number of tokens that every slot decodes before the host looks for new requests.
      prefill_batch_size: Number of prompts that are read at once.
    """

    slots: int = 8
    max_prompt_length: int = 512
    max_new_tokens: int = 256
    steps_per_sync: int = 4
    prefill_batch_size: int = 4


class Batcher:
    """Continuous batcher. `submit`, `cancel` and `close` may be called from any thread; `run` and `run_once` from one.

    Attributes:
      failure: Exception that ended `run`; None after `close`.
    """

    def __init__(
        self,
        program: Program,
        params: PyTree,
        *,
        allowed_V: npt.NDArray[np.bool_],
        bidirectional: bool = False,
        config: BatcherConfig | None = None,
        cache_dtype: str | None = None,
    ):
        """Allocate the slots.

        Args:
          program: A program whose model has a decoder. Its mesh splits the slots, whose number is rounded up to a
            multiple of the split.
          allowed_V, bidirectional, cache_dtype: See `generate_tokens`.

        Raises:
          ConfigError: the longest prompt and its continuation do not fit a table of learned positions.
        """
        config = config or BatcherConfig()
        model_config = program.run.model
        prompt_positions = config.max_prompt_length + (model_config.encoder is None)
        check_positions(model_config, prompt_positions, config.max_new_tokens)
        shards = num_row_shards(program)
        self.config = dataclasses.replace(
            config,
            slots=-(-config.slots // shards) * shards,
            # Both numbers are dimensions that the mesh splits, so they are rounded up to multiples of its shards.
            prefill_batch_size=-(-min(config.prefill_batch_size, config.slots) // shards) * shards,
        )
        self.program, self.params = program, inference_params(program, params)
        self._settings = SlotSettings(
            program,
            max_prompt_length=config.max_prompt_length,
            max_new_tokens=config.max_new_tokens,
            steps_per_sync=config.steps_per_sync,
            bidirectional=bidirectional,
            cache_dtype=cache_dtype,
        )
        self._allowed = jnp.asarray(allowed_V)
        self._queue: FairQueue[Request] = FairQueue()
        self._active: list[Request | None] = [None] * self.config.slots
        # The condition guards queue, `_closed` and `cancelled`. `_active` and the slots belong to the thread that runs
        # the batcher and need no lock.
        self._changed = threading.Condition()
        self._closed = False
        self.failure: BaseException | None = None
        placeholder = Request([1], 1, Sampling(), lambda tokens, finish: None)
        arrays = _request_arrays(program, [placeholder], self.config.slots, self.config)
        self._slots = empty_slots(self._settings, arrays)

    def submit(self, request: Request) -> None:
        """Queue one request; see `submit_all`."""
        self.submit_all([request])

    def submit_all(self, requests: Sequence[Request]) -> None:
        """Append requests to the queue, all of them or none.

        Raises:
          ValueError: a prompt is empty or too long, too many tokens are requested, or the batcher is closed.
        """
        config = self.config
        for request in requests:
            if not 0 < len(request.prompt) <= config.max_prompt_length:
                raise ValueError(f"a prompt of {len(request.prompt)} tokens, expected 1 to {config.max_prompt_length}")
            if not 0 < request.max_new_tokens <= config.max_new_tokens:
                raise ValueError(f"{request.max_new_tokens} new tokens, expected 1 to {config.max_new_tokens}")
        with self._changed:
            if self._closed:
                raise ValueError("the server is shutting down")
            # All of them under one lock: the prompts of one call are queued together or refused together.
            self._queue.extend(requests)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Cancel a request: its slot is free from the next step on. `on_tokens` is called with "cancelled"."""
        with self._changed:
            request.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """End `run` after the current step."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    @property
    def num_waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue)

    def num_waiting_of(self, client: str) -> int:
        """Return the number of requests of a client in the queue."""
        with self._changed:
            return self._queue.count(client)

    @property
    def num_active(self) -> int:
        """Number of slots in use."""
        return sum(request is not None for request in self._active)

    def run(self) -> None:
        """Decode until `close` is called. Unfinished requests are then cancelled, also if a step fails."""
        try:
            while True:
                with self._changed:
                    # A server without requests waits for the next one, which is no stall.
                    while not (self._closed or self._queue or self.num_active):
                        self._changed.wait(timeout=min(_IDLE_SECONDS, stall_seconds() / 4))
                        progress()
                    if self._closed:
                        break
                self.run_once()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self._changed:
                self._closed = True
                # Under the lock, so that no request can be queued after it: it would never get an answer.
                unfinished = [request for request in (*self._active, *self._queue) if request is not None]
                self._queue.clear()
            self._active = [None] * self.config.slots
            for request in unfinished:
                request.on_tokens([], "cancelled")

    def warm_up(self) -> None:
        """Compile all programs that requests can need, so that no request waits for a compilation."""
        config = self.config
        width = bucket(1)
        while True:
            prompt = [self.program.run.model.vocab_size - 1] * min(width - 1, config.max_prompt_length)
            max_new_tokens = min(2, config.max_new_tokens)
            # A single prompt twice: the initial free slots have another placement on the devices than later ones, which
            # compiles another program.
            for count in (1, 1, min(2, config.prefill_batch_size)):
                for _ in range(count):
                    self.submit(Request(prompt, max_new_tokens, Sampling(), lambda tokens, finish: None))
                while self.num_waiting or self.num_active:
                    self.run_once()
            if width > config.max_prompt_length:
                return
            width *= 2

    def run_once(self) -> None:
        """Free the slots of cancelled requests, read waiting prompts into free slots, and run a step."""
        progress()
        # Cancelled requests go first, so that their slots can be taken by waiting prompts in the same call.
        self._drop_cancelled()
        # Several prefills may follow each other before the next step: a new request costs the active ones one prefill
        # of delay, but never waits for a slot that is free.
        while self._admit():
            pass
        if self.num_active:
            self._slots, tokens_KxS, is_new_KxS, ended_KxS = decode_slots(
                self._settings, self.params, self._slots, self._allowed
            )
            # One transfer per call and the only synchronization with the device.
            self._deliver(*jax.device_get((tokens_KxS, is_new_KxS, ended_KxS)))

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [request for request in self._queue if request.cancelled]
            for waiting in dropped:
                self._queue.remove(waiting)
        freed = np.zeros(self.config.slots, bool)
        for slot, request in enumerate(self._active):
            if request is not None and request.cancelled:
                dropped.append(request)
                self._active[slot], freed[slot] = None, True
        if freed.any():
            self._slots = free_slots(self._slots, freed)
        for request in dropped:
            # Outside of the lock: the callback may submit or cancel requests.
            request.on_tokens([], "cancelled")

    def _admit(self) -> bool:
        """Read the prompts of some requests into free slots. Return False if there are no requests or no free slots."""
        config = self.config
        free = [slot for slot, request in enumerate(self._active) if request is None][: config.prefill_batch_size]
        with self._changed:
            active = collections.Counter(request.client for request in self._active if request is not None)
            admitted: list[Request] = []
            for _ in range(min(len(free), len(self._queue))):
                admitted.append(self._queue.pop(active))
                active[admitted[-1].client] += 1
        if not admitted:
            return False
        # Requests are recorded before anything can fail, so that `run` cancels them after an error.
        for slot, request in zip(free, admitted, strict=False):
            self._active[slot] = request
        # Two programs only: a single prompt, or a full prefill batch.
        is_batch = len(admitted) > 1 or num_row_shards(self.program) > 1
        rows = config.prefill_batch_size if is_batch else 1
        arrays = _request_arrays(self.program, admitted, rows, config)
        # Rows that only fill the batch get a slot number after the last slot, and are dropped by the scatter.
        slots = np.full(rows, config.slots, np.int32)
        slots[: len(admitted)] = free[: len(admitted)]
        self._slots, tokens, is_new, ended = prefill_slots(
            self._settings, self.params, self._slots, self._allowed, {**arrays, "slots": slots}
        )
        # The first tokens are delivered at once; waiting for the next step would delay them by `steps_per_sync` tokens.
        tokens, is_new, ended = jax.device_get((tokens, is_new, ended))
        # The first tokens in the layout of a step's result: [3, steps = 1, slots].
        results = np.zeros((3, 1, config.slots), np.int32)
        results[:, 0, slots[: len(admitted)]] = np.stack([tokens, is_new, ended])[:, : len(admitted)]
        self._deliver(results[0], results[1] > 0, results[2] > 0)
        return True

    def _deliver(
        self, tokens_KxS: npt.NDArray[np.int32], is_new_KxS: npt.NDArray[np.bool_], ended_KxS: npt.NDArray[np.bool_]
    ) -> None:
        """Pass new tokens to their requests, and free the slots of requests that are done."""
        eos_ids = self.program.run.model.eos_ids
        for slot, request in enumerate(self._active):
            if request is None or not is_new_KxS[:, slot].any():
                continue
            tokens = tokens_KxS[is_new_KxS[:, slot], slot].tolist()
            finish: FinishReason | None = None
            if ended_KxS[:, slot].any():
                finish = "error" if tokens[-1] == NOT_FINITE else "stop" if tokens[-1] in eos_ids else "length"
                self._active[slot] = None
            request.on_tokens(tokens if finish in (None, "length") else tokens[:-1], finish)


def _request_arrays(
    program: Program, requests: Sequence[Request], rows: int, config: BatcherConfig
) -> dict[str, npt.NDArray[Any]]:
    """Return the prompts and settings as arrays of `rows` rows; those after the last request have length 1."""
    model_config = program.run.model
    streams = [
        list(request.prompt)
        if model_config.encoder is not None
        else [model_config.decoder_start_token_id, *request.prompt]
        for request in requests
    ]
    # A decoder's stream begins with the start token, which is not counted as part of the prompt.
    max_length = config.max_prompt_length + (model_config.encoder is None)
    width = min(bucket(max(map(len, streams))), max_length)

    def column(values: Sequence[float], dtype: Any, filler: float) -> npt.NDArray[Any]:
        return np.array([*values, *[filler] * (rows - len(requests))], dtype)

    settings = [request.sampling for request in requests]
    return {
        "tokens": pad_rows(streams, rows, width),
        "lengths": column([len(stream) for stream in streams], np.int32, 1),
        "limits": column([request.max_new_tokens for request in requests], np.int32, 0),
        "seeds": column([request.seed % NUM_SEEDS for request in requests], np.uint32, 0),
        "rows": column([request.row for request in requests], np.int32, 0),
        "temperature": column([sampling.temperature for sampling in settings], np.float32, 0),
        # Settings that a request does not use get the value without effect, because all requests share one program.
        "top_k": column([sampling.top_k or model_config.vocab_size for sampling in settings], np.int32, 1),
        "top_p": column([1.0 if sampling.top_p is None else sampling.top_p for sampling in settings], np.float32, 1),
        "min_p": column([sampling.min_p or 0.0 for sampling in settings], np.float32, 0),
        "penalty": column([sampling.repetition_penalty for sampling in settings], np.float32, 1),
    }
