"""HTTP application of the completions server.

Requests wait in a bounded queue for a slot of the continuous batcher. When a client disconnects, the slots of its
request are freed. Two threads are involved: the batcher's thread runs the model and hands over tokens; the server's
event loop converts them to text and writes responses.
"""

from __future__ import annotations

import asyncio
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

from t5x_like.serving import chat_schema, openai_schema, response_forms
from t5x_like.serving.access import AccessControl, AccessRules
from t5x_like.serving.openai_schema import BadRequest, PreparedRequest
from t5x_like.serving.pending_completions import Chunk, PendingCompletion, cancel_unfinished, submit
from t5x_like.serving.response_forms import CLIENT_CLOSED_REQUEST
from t5x_like.serving.service import Service
from t5x_like.serving.tokenizer_routes import tokenizer_routes

Parse = Callable[[bytes], PreparedRequest]
"""Converts the body of a request, or raises BadRequest."""

_NOT_FINITE = "found logits that are not finite, expected finite ones: the model is damaged, or its numbers overflow"


def make_app(service: Service, access: AccessRules = AccessRules()) -> Starlette:  # noqa: B008 - immutable
    """Return the application with these routes, of which all but the last are under the rules of `access`:

    POST /v1/completions       OpenAI's completions, streamed or not; `openai_schema.CompletionRequest` is the body
    POST /v1/chat/completions  the same for dialogues; `chat_schema.ChatRequest` is the body
    GET /v1/models             list of the one model
    GET /v1/models/{id}        the model
    GET /tokenizer_info        names of special tokens, and POST /tokenize, /detokenize: see `tokenizer_routes`
    GET /health                number of slots in use and of completions that wait
    """
    limits = openai_schema.Limits(
        model=service.model,
        vocab_size=service.vocab_size,
        max_prompt_length=service.batcher.config.max_prompt_length,
        max_new_tokens=service.batcher.config.max_new_tokens,
        draw_seed=lambda: secrets.randbits(32),
        scores_prompts=service.batcher.scores_prompts,
        fills_gaps=service.batcher.fills_gaps,
        unmasks=service.batcher.unmasks,
    )
    model_body = {"id": service.model, "object": "model", "created": int(time.time()), "owned_by": "user"}

    def parse_completion(body: bytes) -> PreparedRequest:
        return openai_schema.parse(body, limits, service.encode)

    def parse_dialogue(body: bytes) -> PreparedRequest:
        if service.encode_chat is None:
            raise BadRequest("this model answers no dialogues; POST to /v1/completions", status=404)
        return chat_schema.parse_chat(body, limits, service.encode_chat)

    async def read_body(http: HttpRequest) -> bytes:
        return await _read_body(http, service)

    async def create_completions(http: HttpRequest) -> Response:
        return await respond(http, parse_completion)

    async def create_chat_completions(http: HttpRequest) -> Response:
        return await respond(http, parse_dialogue)

    async def respond(http: HttpRequest, parse: Parse) -> Response:
        try:
            request = await run_in_threadpool(parse, await read_body(http))
            completions = submit(service, request, http.scope.get("client_name", ""))
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
        return JSONResponse(
            response_forms.error_body(error.detail, error.status_code), error.status_code, error.headers
        )

    routes = [
        Route("/v1/completions", create_completions, methods=["POST"]),
        Route("/v1/chat/completions", create_chat_completions, methods=["POST"]),
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", show_model),
        *tokenizer_routes(service, read_body),
        Route("/health", health),
    ]
    middleware = [Middleware(AccessControl, rules=access)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: http_error})


async def _read_body(http: HttpRequest, service: Service) -> bytes:
    """Return the request's body.

    Raises:
      BadRequest: the body is too large or too slow.
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
    return bytes(body)


async def _full_response(
    http: HttpRequest,
    service: Service,
    request: PreparedRequest,
    completions: list[PendingCompletion],
    response_id: str,
) -> Response:
    """Wait for all completions, and return them in one response. The wait ends early when the client disconnects."""

    async def wait_for_all() -> None:
        for completion in completions:
            while (await completion.chunks.get()).finish_reason is None:
                pass

    finished = asyncio.create_task(wait_for_all())
    disconnected = asyncio.create_task(_wait_for_disconnect(http))
    try:
        await asyncio.wait({finished, disconnected}, timeout=service.timeout, return_when=asyncio.FIRST_COMPLETED)
        if not finished.done():
            if disconnected.done():
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            message = f"no completion within {service.timeout:g} s"
            return JSONResponse(response_forms.error_body(message, 503), 503)
    finally:
        finished.cancel()
        disconnected.cancel()
        cancel_unfinished(service, completions)
    if any(completion.finish_reason == "error" for completion in completions):
        return JSONResponse(response_forms.error_body(_NOT_FINITE, 500), 500)
    if any(completion.finish_reason == "cancelled" for completion in completions):
        return JSONResponse(response_forms.error_body("the server is shutting down", 503), 503)
    choices = [
        request.form.choice(
            completion.index, completion.detokenizer.text, completion.finish_reason, completion.logprobs
        )
        for completion in completions
    ]
    usage = _usage(request, completions)
    return JSONResponse(request.form.body(response_id, service.model, choices, usage))


async def _wait_for_disconnect(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _stream_events(
    service: Service, request: PreparedRequest, completions: list[PendingCompletion], response_id: str
) -> AsyncIterator[bytes]:
    """Yield server-sent events: text of all completions as it is decoded, the usage if requested, and [DONE]."""
    merged: asyncio.Queue[tuple[int, Chunk]] = asyncio.Queue()
    deadline = asyncio.get_running_loop().time() + service.timeout

    async def forward(completion: PendingCompletion) -> None:
        chunk = None
        while chunk is None or chunk.finish_reason is None:
            chunk = await completion.chunks.get()
            merged.put_nowait((completion.index, chunk))

    tasks = [asyncio.create_task(forward(completion)) for completion in completions]
    begun: set[int] = set()
    try:
        unfinished = len(completions)
        while unfinished:
            # The timeout must not enclose `yield`: it would cancel the task that writes to a slow client, where the
            # exception cannot be handled here.
            async with asyncio.timeout_at(deadline):
                index, chunk = await merged.get()
            if chunk.finish_reason == "error":
                yield _event(response_forms.error_body(_NOT_FINITE, 500))
                return
            unfinished -= chunk.finish_reason is not None
            choices = [
                request.form.event_choice(index, chunk.text, chunk.finish_reason, chunk.logprobs, index not in begun)
            ]
            begun.add(index)
            yield _event(request.form.event(response_id, service.model, choices))
        if request.include_usage:
            usage = _usage(request, completions)
            yield _event(request.form.event(response_id, service.model, [], usage))
        yield b"data: [DONE]\n\n"
    except TimeoutError:
        yield _event(response_forms.error_body(f"no completion within {service.timeout:g} s", 503))
    finally:
        for task in tasks:
            task.cancel()
        cancel_unfinished(service, completions)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def _usage(request: PreparedRequest, completions: Sequence[PendingCompletion]) -> dict[str, int]:
    return response_forms.usage(
        sum(map(len, request.prompts)) * request.num_completions,
        sum(len(completion.detokenizer.tokens) for completion in completions),
    )
