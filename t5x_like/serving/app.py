"""The HTTP application. Requests wait in a bounded queue, and give their slots back when their client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from t5x_like.decoding.continuous import Batcher, Finish, Request
from t5x_like.serving import protocol
from t5x_like.serving.protocol import BadRequest, Completion
from t5x_like.serving.texts import Growing

LEFT = 499
"""The status that is noted where nobody reads it any more, as nginx does."""


@dataclasses.dataclass(frozen=True)
class Service:
    """What the application serves.

    Attributes:
      model: The name in requests and answers.
      encode, decode: A prompt's text to ids, ids to an answer's text.
      vocab_size: Ids of the model.
      most_waiting: Answers that may wait for a slot; further requests are turned away with 429.
      timeout: Seconds that an answer may take, waiting included.
      most_bytes: Of a request's body.
    """

    model: str
    batcher: Batcher
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    vocab_size: int
    most_waiting: int = 256
    timeout: float = 600.0
    most_bytes: int = 2**20


@dataclasses.dataclass(eq=False)
class _Answer:
    """One answer on its way: pieces of text come out of `pieces`, with how it ended in the last."""

    index: int
    growing: Growing
    request: Request | None = None
    pieces: asyncio.Queue[tuple[str, str | None]] = dataclasses.field(default_factory=asyncio.Queue)
    finish: str | None = None


def make_app(service: Service) -> Starlette:
    """The application:

    POST /v1/completions  OpenAI's completions, streamed or not; see `protocol` for what may be asked
    GET /v1/models        the one model
    GET /health           slots taken and answers waiting
    """

    async def completions(http: HttpRequest) -> Response:
        try:
            wanted = await _wanted(http, service)
            answers = _submit(service, wanted)
        except BadRequest as error:
            return JSONResponse(error.body(), error.status)
        except ClientDisconnect:
            return Response(status_code=LEFT)
        identity = f"cmpl-{secrets.token_hex(12)}"
        if wanted.stream:
            lines = _streamed(service, wanted, answers, identity)
            return StreamingResponse(lines, media_type="text/event-stream")
        return await _whole(http, service, wanted, answers, identity)

    async def models(_: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": service.model, "object": "model", "owned_by": "user"}]})

    async def health(_: HttpRequest) -> Response:
        batcher = service.batcher
        found = {"slots": batcher.sizes.slots, "taken": batcher.taken, "waiting": batcher.waiting}
        if batcher.failure is not None:
            return JSONResponse({"status": "failed", **found}, 500)
        return JSONResponse({"status": "ok", **found})

    async def refused(_: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse(protocol.error_body(error.detail, error.status_code), error.status_code, error.headers)

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: refused})


async def _wanted(http: HttpRequest, service: Service) -> Completion:
    """The request's body, read as far as it may go, and checked."""
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > service.most_bytes:
            raise BadRequest(f"a body of more than {service.most_bytes:,} bytes", status=413)
    sizes = service.batcher.sizes
    return await run_in_threadpool(
        protocol.parse,
        bytes(body),
        model=service.model,
        encode=service.encode,
        vocab_size=service.vocab_size,
        longest_prompt=sizes.prompt_length,
        most_tokens=sizes.new_tokens,
        draw_seed=lambda: secrets.randbits(32),
    )


def _submit(service: Service, wanted: Completion) -> list[_Answer]:
    """Puts all answers of a request into the queue, or none.

    Raises:
      BadRequest: there is no room, or the server is leaving.
    """
    batcher, loop = service.batcher, asyncio.get_running_loop()
    total = wanted.count * len(wanted.prompts)
    free = max(batcher.sizes.slots - batcher.taken, 0)
    if batcher.waiting + total > service.most_waiting + free:
        message = f"{batcher.waiting} answers wait already, of at most {service.most_waiting}: come back later"
        raise BadRequest(message, status=429)
    answers = []
    for index in range(total):
        answer = _Answer(index, Growing(service.decode, wanted.stops))

        def deliver(tokens: list[int], finish: Finish | None, answer: _Answer = answer) -> None:
            # Called by the batcher's thread; text is made in the server's.
            with contextlib.suppress(RuntimeError):  # The server's loop has ended.
                loop.call_soon_threadsafe(_grow, batcher, answer, tokens, finish)

        answer.request = Request(
            prompt=wanted.prompts[index // wanted.count],
            max_new_tokens=wanted.max_tokens,
            sampling=wanted.sampling,
            on_tokens=deliver,
            seed=wanted.seed,
            row=index,
        )
        answers.append(answer)
    try:
        batcher.submit_all([answer.request for answer in answers if answer.request is not None])
    except ValueError as error:
        raise BadRequest(str(error), status=503) from None
    return answers


def _grow(batcher: Batcher, answer: _Answer, tokens: list[int], finish: Finish | None) -> None:
    """New tokens of an answer, in the server's thread."""
    if answer.finish is not None:
        return
    text = answer.growing.add(tokens, last=finish is not None)
    if answer.growing.stopped:
        finish = "stop"
        assert answer.request is not None
        batcher.cancel(answer.request)
    answer.finish = finish
    if text or finish is not None:
        answer.pieces.put_nowait((text, finish))


def _abandon(service: Service, answers: Sequence[_Answer]) -> None:
    """Gives back the slots of answers that nobody waits for."""
    for answer in answers:
        if answer.finish is None and answer.request is not None:
            service.batcher.cancel(answer.request)


async def _whole(
    http: HttpRequest, service: Service, wanted: Completion, answers: list[_Answer], identity: str
) -> Response:
    async def finished() -> None:
        for answer in answers:
            while (await answer.pieces.get())[1] is None:
                pass

    waiting = asyncio.create_task(finished())
    leaving = asyncio.create_task(_left(http))
    try:
        await asyncio.wait({waiting, leaving}, timeout=service.timeout, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            if leaving.done():
                return Response(status_code=LEFT)
            message = f"no answer within {service.timeout:g} s"
            return JSONResponse(protocol.error_body(message, 503), 503)
    finally:
        waiting.cancel()
        leaving.cancel()
        _abandon(service, answers)
    if any(answer.finish == "cancelled" for answer in answers):
        return JSONResponse(protocol.error_body("the server is leaving", 503), 503)
    choices = [protocol.choice(answer.index, answer.growing.text, answer.finish) for answer in answers]
    return JSONResponse(protocol.answer_body(identity, service.model, choices, _usage(wanted, answers)))


async def _left(http: HttpRequest) -> None:
    """Returns when the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _streamed(
    service: Service, wanted: Completion, answers: list[_Answer], identity: str
) -> AsyncIterator[bytes]:
    """Server-sent events: pieces of all answers as they come, usage if asked for, and the word [DONE]."""
    merged: asyncio.Queue[tuple[int, str, str | None]] = asyncio.Queue()
    deadline = asyncio.get_running_loop().time() + service.timeout

    async def forward(answer: _Answer) -> None:
        finish = None
        while finish is None:
            text, finish = await answer.pieces.get()
            merged.put_nowait((answer.index, text, finish))

    tasks = [asyncio.create_task(forward(answer)) for answer in answers]
    try:
        left = len(answers)
        while left:
            # Not around `yield`: a slow client's task would be cancelled where nobody here can answer it.
            async with asyncio.timeout_at(deadline):
                index, text, finish = await merged.get()
            left -= finish is not None
            choices = [protocol.choice(index, text, finish)]
            yield _event(protocol.answer_body(identity, service.model, choices))
        if wanted.with_usage:
            yield _event(protocol.answer_body(identity, service.model, [], _usage(wanted, answers)))
        yield b"data: [DONE]\n\n"
    except TimeoutError:
        yield _event(protocol.error_body(f"no answer within {service.timeout:g} s", 503))
    finally:
        for task in tasks:
            task.cancel()
        _abandon(service, answers)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def _usage(wanted: Completion, answers: Sequence[_Answer]) -> dict[str, int]:
    return protocol.usage(
        sum(map(len, wanted.prompts)) * wanted.count, sum(len(answer.growing.tokens) for answer in answers)
    )
