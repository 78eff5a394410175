"""HTTP application of the completions server.

Requests wait in a bounded queue for a slot of the continuous batcher. When a client disconnects, the slots of its
request are freed. Two threads are involved: the batcher's thread runs the model and hands over tokens; the server's
event loop converts them to text and writes responses.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from t5x_like.decoding.continuous_batching import Batcher, FinishReason, Request
from t5x_like.serving import chat_schema, openai_schema
from t5x_like.serving.access import AccessControl, AccessRules
from t5x_like.serving.chat_schema import EncodeChat
from t5x_like.serving.incremental_text import IncrementalDetokenizer
from t5x_like.serving.openai_schema import BadRequest, PreparedRequest

Parse = Callable[[bytes], PreparedRequest]
"""Converts the body of a request, or raises BadRequest."""
CLIENT_CLOSED_REQUEST = 499
"""Status of a response whose client has disconnected (nginx's convention). No client receives it."""

_NOT_FINITE = "found logits that are not finite, expected finite ones: the model is damaged, or its numbers overflow"


@dataclasses.dataclass(frozen=True)
class Service:
    """Model and limits of the application.

    Attributes:
      model: Name of the model in requests and responses.
      batcher: Decoder; another thread runs it.
      encode: Converts a prompt's text to token ids.
      encode_chat: Converts messages and tools to token ids; None: the model answers no dialogues.
      decode: Converts token ids to a completion's text.
      vocab_size: Number of token ids of the model.
      max_waiting: Largest number of completions that wait for a slot; further requests get status 429.
      timeout: Largest duration of a request in seconds, waiting included.
      max_waiting_per_client: Largest number of completions of one client that wait; None: as for all clients.
      max_body_bytes: Largest size of a request's body.
      body_seconds: Time that a client may take to send a request's body.
    """

    model: str
    batcher: Batcher
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    vocab_size: int
    encode_chat: EncodeChat | None = None
    max_waiting: int = 256
    timeout: float = 600.0
    max_waiting_per_client: int | None = None
    max_body_bytes: int = 2**20
    body_seconds: float = 30.0


@dataclasses.dataclass(eq=False)
class _PendingCompletion:
    """Completion that is being decoded.

    Attributes:
      index: Position in the response's `choices`.
      detokenizer: Text so far.
      request: Request of the batcher.
      chunks: Pieces of new text with None, and at the end the last piece with the finish reason.
      finish_reason: None until the completion is complete.
    """

    index: int
    detokenizer: IncrementalDetokenizer
    request: Request | None = None
    chunks: asyncio.Queue[tuple[str, str | None]] = dataclasses.field(default_factory=asyncio.Queue)
    finish_reason: str | None = None


def make_app(service: Service, access: AccessRules = AccessRules()) -> Starlette:  # noqa: B008 - immutable
    """Return the application with these routes, of which all but the last are under the rules of `access`:

    POST /v1/completions       OpenAI's completions, streamed or not; `openai_schema.CompletionRequest` is the body
    POST /v1/chat/completions  the same for dialogues; `chat_schema.ChatRequest` is the body
    GET /v1/models             list of the one model
    GET /v1/models/{id}        the model
    GET /health                number of slots in use and of completions that wait
    """
    limits = openai_schema.Limits(
        model=service.model,
        vocab_size=service.vocab_size,
        max_prompt_length=service.batcher.config.max_prompt_length,
        max_new_tokens=service.batcher.config.max_new_tokens,
        draw_seed=lambda: secrets.randbits(32),
    )
    model_body = {"id": service.model, "object": "model", "created": int(time.time()), "owned_by": "user"}

    def parse_completion(body: bytes) -> PreparedRequest:
        return openai_schema.parse(body, limits, service.encode)

    def parse_dialogue(body: bytes) -> PreparedRequest:
        if service.encode_chat is None:
            raise BadRequest("this model answers no dialogues; POST to /v1/completions", status=404)
        return chat_schema.parse_chat(body, limits, service.encode_chat)

    async def create_completions(http: HttpRequest) -> Response:
        return await respond(http, parse_completion)

    async def create_chat_completions(http: HttpRequest) -> Response:
        return await respond(http, parse_dialogue)

    async def respond(http: HttpRequest, parse: Parse) -> Response:
        try:
            request = await _read_request(http, service, parse)
            completions = _submit(service, request, http.scope.get("client_name", ""))
        except BadRequest as error:
            return JSONResponse(error.body(), error.status)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        response_id = f"{request.form.prefix}-{secrets.token_hex(12)}"
        if request.stream:
            events = _stream_events(service, request, completions, response_id)
            return StreamingResponse(events, media_type="text/event-stream")
        return await _full_response(http, service, request, completions, response_id)

    async def list_models(_: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [model_body]})

    async def show_model(http: HttpRequest) -> Response:
        try:
            openai_schema.require_model(http.path_params["model"], service.model)
        except BadRequest as error:
            return JSONResponse(error.body(), error.status)
        return JSONResponse(model_body)

    async def health(_: HttpRequest) -> Response:
        batcher = service.batcher
        counts = {"slots": batcher.config.slots, "taken": batcher.num_active, "waiting": batcher.num_waiting}
        if batcher.failure is not None:
            return JSONResponse({"status": "failed", **counts}, 500)
        return JSONResponse({"status": "ok", **counts})

    async def http_error(_: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse(openai_schema.error_body(error.detail, error.status_code), error.status_code, error.headers)

    routes = [
        Route("/v1/completions", create_completions, methods=["POST"]),
        Route("/v1/chat/completions", create_chat_completions, methods=["POST"]),
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", show_model),
        Route("/health", health),
    ]
    middleware = [Middleware(AccessControl, rules=access)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: http_error})


async def _read_request(http: HttpRequest, service: Service, parse: Parse) -> PreparedRequest:
    """Read and validate the request's body.

    Raises:
      BadRequest: the body is too large, too slow or not valid.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(service.body_seconds):
            async for chunk in http.stream():
                body += chunk
                if len(body) > service.max_body_bytes:
                    raise BadRequest(f"the body is larger than {service.max_body_bytes:,} bytes", status=413)
    except TimeoutError:
        raise BadRequest(f"the body was not complete after {service.body_seconds:g} s", status=408) from None
    return await run_in_threadpool(parse, bytes(body))


def _submit(service: Service, request: PreparedRequest, client: str) -> list[_PendingCompletion]:
    """Put all completions of a request into the batcher's queue, or none.

    Raises:
      BadRequest: the queue is full, or the server is shutting down.
    """
    batcher, loop = service.batcher, asyncio.get_running_loop()
    total = request.num_completions * len(request.prompts)
    free = max(batcher.config.slots - batcher.num_active, 0)
    if batcher.num_waiting + total > service.max_waiting + free:
        message = f"{batcher.num_waiting} completions are waiting, of at most {service.max_waiting}: try again later"
        raise BadRequest(message, status=429)
    own, most = batcher.num_waiting_of(client), service.max_waiting_per_client
    if most is not None and own + total > most + free:
        raise BadRequest(f"{own} completions of yours are waiting, of at most {most}: try again later", status=429)
    completions = []
    for index in range(total):
        completion = _PendingCompletion(index, IncrementalDetokenizer(service.decode, request.stop))

        def deliver(
            tokens: list[int], finish: FinishReason | None, completion: _PendingCompletion = completion
        ) -> None:
            # The batcher calls this in its own thread; text and queues belong to the event loop's thread.
            with contextlib.suppress(RuntimeError):  # The event loop has ended.
                loop.call_soon_threadsafe(_append_tokens, batcher, completion, tokens, finish)

        completion.request = Request(
            prompt=request.prompts[index // request.num_completions],
            max_new_tokens=request.max_tokens,
            sampling=request.sampling,
            on_tokens=deliver,
            seed=request.seed,
            row=index,
            client=client,
        )
        completions.append(completion)
    try:
        batcher.submit_all([completion.request for completion in completions if completion.request is not None])
    except ValueError as error:
        raise BadRequest(str(error), status=503) from None
    return completions


def _append_tokens(
    batcher: Batcher, completion: _PendingCompletion, tokens: list[int], finish: FinishReason | None
) -> None:
    """Add new tokens to a completion, in the event loop's thread. A stop string ends it and frees its slot."""
    if completion.finish_reason is not None:
        return
    text = completion.detokenizer.add(tokens, last=finish is not None)
    if completion.detokenizer.stopped:
        finish = "stop"
        assert completion.request is not None
        batcher.cancel(completion.request)
    completion.finish_reason = finish
    if text or finish is not None:
        completion.chunks.put_nowait((text, finish))


def _cancel_unfinished(service: Service, completions: Sequence[_PendingCompletion]) -> None:
    """Free the slots of completions that no client waits for."""
    for completion in completions:
        if completion.finish_reason is None and completion.request is not None:
            service.batcher.cancel(completion.request)


async def _full_response(
    http: HttpRequest,
    service: Service,
    request: PreparedRequest,
    completions: list[_PendingCompletion],
    response_id: str,
) -> Response:
    """Wait for all completions, and return them in one response. The wait ends early when the client disconnects."""

    async def wait_for_all() -> None:
        for completion in completions:
            while (await completion.chunks.get())[1] is None:
                pass

    finished = asyncio.create_task(wait_for_all())
    disconnected = asyncio.create_task(_wait_for_disconnect(http))
    try:
        await asyncio.wait({finished, disconnected}, timeout=service.timeout, return_when=asyncio.FIRST_COMPLETED)
        if not finished.done():
            if disconnected.done():
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            message = f"no completion within {service.timeout:g} s"
            return JSONResponse(openai_schema.error_body(message, 503), 503)
    finally:
        finished.cancel()
        disconnected.cancel()
        _cancel_unfinished(service, completions)
    if any(completion.finish_reason == "error" for completion in completions):
        return JSONResponse(openai_schema.error_body(_NOT_FINITE, 500), 500)
    if any(completion.finish_reason == "cancelled" for completion in completions):
        return JSONResponse(openai_schema.error_body("the server is shutting down", 503), 503)
    choices = [
        request.form.choice(completion.index, completion.detokenizer.text, completion.finish_reason)
        for completion in completions
    ]
    usage = _usage(request, completions)
    return JSONResponse(request.form.body(response_id, service.model, choices, usage))


async def _wait_for_disconnect(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _stream_events(
    service: Service, request: PreparedRequest, completions: list[_PendingCompletion], response_id: str
) -> AsyncIterator[bytes]:
    """Yield server-sent events: text of all completions as it is decoded, the usage if requested, and [DONE]."""
    merged: asyncio.Queue[tuple[int, str, str | None]] = asyncio.Queue()
    deadline = asyncio.get_running_loop().time() + service.timeout

    async def forward(completion: _PendingCompletion) -> None:
        finish = None
        while finish is None:
            text, finish = await completion.chunks.get()
            merged.put_nowait((completion.index, text, finish))

    tasks = [asyncio.create_task(forward(completion)) for completion in completions]
    begun: set[int] = set()
    try:
        unfinished = len(completions)
        while unfinished:
            # The timeout must not enclose `yield`: it would cancel the task that writes to a slow client, where the
            # exception cannot be handled here.
            async with asyncio.timeout_at(deadline):
                index, text, finish = await merged.get()
            if finish == "error":
                yield _event(openai_schema.error_body(_NOT_FINITE, 500))
                return
            unfinished -= finish is not None
            choices = [request.form.event_choice(index, text, finish, index not in begun)]
            begun.add(index)
            yield _event(request.form.event(response_id, service.model, choices))
        if request.include_usage:
            usage = _usage(request, completions)
            yield _event(request.form.event(response_id, service.model, [], usage))
        yield b"data: [DONE]\n\n"
    except TimeoutError:
        yield _event(openai_schema.error_body(f"no completion within {service.timeout:g} s", 503))
    finally:
        for task in tasks:
            task.cancel()
        _cancel_unfinished(service, completions)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def _usage(request: PreparedRequest, completions: Sequence[_PendingCompletion]) -> dict[str, int]:
    return openai_schema.usage(
        sum(map(len, request.prompts)) * request.num_completions,
        sum(len(completion.detokenizer.tokens) for completion in completions),
    )
