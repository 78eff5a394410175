"""Routes for clients without a tokenizer of their own, with the paths and fields of vLLM's server.

lm-eval's `local-completions` finds the tokens of its requests by them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import pydantic
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from t5x_like.serving.openai_schema import BadRequest, validated
from t5x_like.serving.response_forms import CLIENT_CLOSED_REQUEST
from t5x_like.serving.service import Service


class TokenizeRequest(pydantic.BaseModel):
    """Body of a POST to /tokenize. No tokens are added to those of the text, whatever `add_special_tokens` is."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="ignore")

    prompt: str = Field(description="a text")


class DetokenizeRequest(pydantic.BaseModel):
    """Body of a POST to /detokenize."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="ignore")

    tokens: Annotated[list[int], Field(fail_fast=True)] = Field(description="a list of ids")


def tokenizer_routes(service: Service, read_body: Callable[[HttpRequest], Awaitable[bytes]]) -> list[Route]:
    """Return the routes GET /tokenizer_info, POST /tokenize and POST /detokenize.

    Args:
      read_body: Coroutine that returns the body of a request, or raises BadRequest.
    """
    vocabulary = service.tokenizer.vocabulary

    def name_of(token: int) -> str:
        return service.token_text(token).name or f"<token_{token}>"

    special = {"eos_token": vocabulary.eos_id, "bos_token": service.start_id, "pad_token": vocabulary.pad_id}
    names = {role: None if token is None else name_of(token) for role, token in special.items()}
    ids = {name: token for role, token in special.items() if (name := names[role]) is not None and token is not None}

    async def show_tokenizer(_: HttpRequest) -> Response:
        return JSONResponse({"tokenizer_class": type(service.tokenizer).__name__, **names})

    async def answer(http: HttpRequest, of_body: Callable[[bytes], dict[str, Any]]) -> Response:
        try:
            # In another thread: a large body would keep the event loop from all other requests.
            return JSONResponse(await run_in_threadpool(of_body, await read_body(http)))
        except BadRequest as error:
            return JSONResponse(error.body(), error.status)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    def tokenized(body: bytes) -> dict[str, Any]:
        prompt = validated(body, TokenizeRequest).prompt
        # The name of a special token alone is that token. Inside of a text it is text.
        tokens = [ids[prompt]] if prompt in ids else [int(token) for token in service.tokenizer.encode(prompt)]
        most = service.batcher.config.max_prompt_length
        return {"count": len(tokens), "max_model_len": most, "tokens": tokens}

    def detokenized(body: bytes) -> dict[str, Any]:
        tokens = validated(body, DetokenizeRequest).tokens
        if any(not 0 <= token < service.vocab_size for token in tokens):
            raise BadRequest(f"a token id outside 0 to {service.vocab_size - 1}", "tokens")
        return {"prompt": service.decode(tokens)}

    async def tokenize(http: HttpRequest) -> Response:
        return await answer(http, tokenized)

    async def detokenize(http: HttpRequest) -> Response:
        return await answer(http, detokenized)

    return [
        Route("/tokenizer_info", show_tokenizer),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]
