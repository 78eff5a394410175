"""Requests that wait for a slot: their queue, and the thread that computes them step by step."""

from __future__ import annotations

import abc
import collections
import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from t5x_like.decoding.fair_queue import FairQueue
from t5x_like.decoding.slot_requests import Request
from t5x_like.utils.stall_limit import progress, stall_seconds

_IDLE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True, eq=False)
class SlotLimits:
    """Sizes that are fixed when the programs are compiled.

    Attributes:
      slots: Number of requests that are computed at once.
      max_prompt_length: Largest number of tokens of a prompt.
      max_new_tokens: Largest number of new tokens of a request.
    """

    slots: int = 8
    max_prompt_length: int = 512
    max_new_tokens: int = 256


class RequestScheduler(abc.ABC):
    """Requests in a fixed number of slots. `submit`, `cancel` and `close` may be called from any thread; `run` and
    `run_once` from one.

    Attributes:
      config: Sizes.
      scores_prompts: The model predicts the tokens of its prompts: it is a causal decoder.
      fills_gaps: A request may have a text after the new tokens.
      unmasks: New tokens fill masked positions, so that there are no probabilities of a next token.
      failure: Exception that ended `run`; None after `close`.
    """

    scores_prompts: bool = False
    fills_gaps: bool = False
    unmasks: bool = False

    def __init__(self, config: SlotLimits):
        self.config = config
        self.failure: BaseException | None = None
        self._queue: FairQueue[Request] = FairQueue()
        self._active: list[Request | None] = [None] * config.slots
        # The condition guards queue, `_closed` and `cancelled`. `_active` and the slots belong to the thread that runs
        # the scheduler and need no lock.
        self._changed = threading.Condition()
        self._closed = False

    @abc.abstractmethod
    def warm_up(self) -> None:
        """Compile all programs that requests can need, so that no request waits for a compilation."""

    @abc.abstractmethod
    def run_once(self) -> None:
        """Free the slots of cancelled requests, give free slots to waiting ones, and compute a step."""

    @abc.abstractmethod
    def _free(self, freed: npt.NDArray[np.bool_]) -> None:
        """Free the state of slots [slots] whose requests are cancelled."""

    def submit(self, request: Request) -> None:
        """Queue one request; see `submit_all`."""
        self.submit_all([request])

    def submit_all(self, requests: Sequence[Request]) -> None:
        """Append requests to the queue, all of them or none.

        Raises:
          ValueError: a prompt is empty or too long, too many tokens are requested, a prompt is to be scored by a model
            that does not predict it, a text follows the new tokens of a model that only continues texts, or the
            scheduler is closed.
        """
        config = self.config
        for request in requests:
            length = len(request.prompt) + len(request.suffix)
            if not 0 < length <= config.max_prompt_length:
                raise ValueError(f"a prompt of {length} tokens, expected 1 to {config.max_prompt_length}")
            if request.suffix and not self.fills_gaps:
                raise ValueError("a text after the new tokens, expected none: this model only continues texts")
            is_scored = request.on_prompt_logprobs is not None
            if is_scored and not self.scores_prompts:
                raise ValueError("a prompt to be scored, expected none: this model does not predict its prompts")
            least = 0 if is_scored else 1
            if not least <= request.max_new_tokens <= config.max_new_tokens:
                raise ValueError(f"{request.max_new_tokens} new tokens, expected {least} to {config.max_new_tokens}")
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
            self._free(freed)
        for request in dropped:
            # Outside of the lock: the callback may submit or cancel requests.
            request.on_tokens([], "cancelled")

    def _next_waiting(self, most: int) -> list[Request]:
        """Remove up to `most` requests from the queue, from the clients in turn."""
        with self._changed:
            active = collections.Counter(request.client for request in self._active if request is not None)
            admitted: list[Request] = []
            for _ in range(min(most, len(self._queue))):
                admitted.append(self._queue.pop(active))
                active[admitted[-1].client] += 1
        return admitted
