"""Completions that are being decoded: from the batcher's tokens to pieces of text for the response."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from t5x_like.decoding.slot_requests import FinishReason, Request
from t5x_like.decoding.token_logprobs import TokenLogprob
from t5x_like.serving.incremental_text import IncrementalDetokenizer
from t5x_like.serving.openai_schema import BadRequest, PreparedRequest
from t5x_like.serving.service import Service
from t5x_like.serving.text_logprobs import LogprobLog, TextLogprob


class Chunk(NamedTuple):
    """New text of a completion.

    Attributes:
      text: The text.
      finish_reason: None before the last chunk.
      logprobs: Log-probabilities of the tokens whose text begins in this chunk; None: they are not asked for.
    """

    text: str
    finish_reason: str | None
    logprobs: list[TextLogprob] | None


@dataclasses.dataclass(eq=False)
class PendingCompletion:
    """Completion that is being decoded.

    Attributes:
      index: Position in the response's `choices`.
      detokenizer: Text so far.
      log: Log-probabilities whose text has not left; None: they are not asked for.
      request: Request of the batcher; None for the echo of a prompt alone.
      chunks: New text, ended by a chunk with a finish reason.
      logprobs: Log-probabilities of all chunks so far.
      finish_reason: None until the completion is complete.
    """

    index: int
    detokenizer: IncrementalDetokenizer
    log: LogprobLog | None
    request: Request | None = None
    chunks: asyncio.Queue[Chunk] = dataclasses.field(default_factory=asyncio.Queue)
    logprobs: list[TextLogprob] | None = None
    finish_reason: str | None = None

    def append(self, service: Service, tokens: list[int], finish: FinishReason | None) -> None:
        """Add new tokens, in the event loop's thread. A stop string ends the completion and frees its slot."""
        if self.finish_reason is not None:
            return
        text = self.detokenizer.add(tokens, last=finish is not None)
        if self.detokenizer.stopped:
            finish = "stop"
            assert self.request is not None
            service.batcher.cancel(self.request)
        self.finish_reason = finish
        entries = None
        if self.log is not None:
            # A stop string cuts the tokens whose text begins after the cut; otherwise the last ones may have no text.
            is_whole = finish is not None and not self.detokenizer.stopped
            entries = self.log.take(None if is_whole else len(self.detokenizer.text))
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += entries
        if text or entries or finish is not None:
            self.chunks.put_nowait(Chunk(text, finish, entries))


def submit(service: Service, request: PreparedRequest, client: str) -> list[PendingCompletion]:
    """Put all completions of a request into the batcher's queue, or none.

    Raises:
      BadRequest: the queue is full, or the server is shutting down.
    """
    batcher = service.batcher
    total = request.num_completions * len(request.prompts)
    free = max(batcher.config.slots - batcher.num_active, 0)
    if batcher.num_waiting + total > service.max_waiting + free:
        message = f"{batcher.num_waiting} completions are waiting, of at most {service.max_waiting}: try again later"
        raise BadRequest(message, status=429)
    own, most = batcher.num_waiting_of(client), service.max_waiting_per_client
    if most is not None and own + total > most + free:
        raise BadRequest(f"{own} completions of yours are waiting, of at most {most}: try again later", status=429)
    completions = [_pending(service, request, index, client) for index in range(total)]
    try:
        batcher.submit_all([completion.request for completion in completions if completion.request is not None])
    except ValueError as error:
        raise BadRequest(str(error), status=503) from None
    for completion in completions:
        if completion.request is None:
            completion.append(service, [], "length")
    return completions


def _pending(service: Service, request: PreparedRequest, index: int, client: str) -> PendingCompletion:
    loop = asyncio.get_running_loop()
    sent = request.prompts[index // request.num_completions]
    # A client that sends ids may begin with the start token, which a decoder reads anyway.
    has_start = len(sent) > 1 and sent[0] == service.start_id
    prompt = sent[has_start:]
    echoed = prompt if request.echo else ()
    log = None
    if request.num_logprobs is not None:
        log = LogprobLog(service.token_text, service.decode, request.num_logprobs)
        if request.echo and has_start:
            log.add([TokenLogprob(sent[0], None)])
    completion = PendingCompletion(index, IncrementalDetokenizer(service.decode, request.stop, echoed), log)
    scores_prompt = request.echo and log is not None
    if not (request.max_tokens or scores_prompt):
        return completion

    # The batcher calls these in its own thread; text and queues belong to the event loop's thread.
    def deliver(tokens: list[int], finish: FinishReason | None) -> None:
        with contextlib.suppress(RuntimeError):  # The event loop has ended.
            loop.call_soon_threadsafe(completion.append, service, tokens, finish)

    def deliver_logprobs(entries: list[TokenLogprob]) -> None:
        assert log is not None
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(log.add, entries)

    completion.request = Request(
        prompt=prompt,
        max_new_tokens=request.max_tokens,
        sampling=request.sampling,
        on_tokens=deliver,
        seed=request.seed,
        row=index,
        client=client,
        on_logprobs=None if log is None else deliver_logprobs,
        on_prompt_logprobs=deliver_logprobs if scores_prompt else None,
        suffix=request.suffix,
    )
    return completion


def cancel_unfinished(service: Service, completions: Sequence[PendingCompletion]) -> None:
    """Free the slots of completions that no client waits for."""
    for completion in completions:
        if completion.finish_reason is None and completion.request is not None:
            service.batcher.cancel(completion.request)
