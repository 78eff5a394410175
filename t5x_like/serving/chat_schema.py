"""Request bodies of OpenAI's chat completions endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import Field

from t5x_like.errors import DataError
from t5x_like.serving.openai_schema import (
    EXPECTED_TOP_LOGPROBS,
    BadRequest,
    Limits,
    PreparedRequest,
    SamplingRequest,
    TopLogprobs,
    prepared,
    require_default,
    require_model,
    validated,
)
from t5x_like.serving.response_forms import CHAT

EncodeChat = Callable[[Sequence[dict[str, Any]], Sequence[Any] | None], Sequence[int]]
"""(messages, tools) -> ids of the dialogue, ended by the beginning of the assistant's turn."""


class ChatRequest(SamplingRequest):
    """Body of a POST to /v1/chat/completions, as sent by the client."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] = Field(
        description="a list of objects with role and content"
    )
    tools: list[Any] | None = Field(None, description="a list of tools")
    max_completion_tokens: int | None = Field(None, description="a whole number")
    tool_choice: Annotated[Any, require_default("auto")] = None
    response_format: Annotated[Any, require_default({"type": "text"})] = None
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: TopLogprobs | None = Field(None, description=EXPECTED_TOP_LOGPROBS)
    parallel_tool_calls: Any = None
    metadata: Any = None
    store: Annotated[Any, require_default(False)] = None


def parse_chat(body: bytes, limits: Limits, encode: EncodeChat) -> PreparedRequest:
    """Return the request for an answer to a dialogue that the body describes.

    Args:
      body: JSON in UTF-8.
      limits: What a request may ask for.
      encode: Converts messages and tools to ids.

    Raises:
      BadRequest: the first problem found.
    """
    request = validated(body, ChatRequest)
    require_model(request.model, limits.model)
    for message in request.messages:
        if not isinstance(message.get("role"), str):
            expected = "expected objects with role and content"
            raise BadRequest(f"messages: found one without a text as its role, {expected}", "messages")
        if not isinstance(message.get("content", ""), str | None):
            found = type(message["content"]).__name__
            raise BadRequest(f"messages: found content of type {found}, expected one string", "messages")
    try:
        prompt = tuple(encode(request.messages, request.tools))
    except DataError as error:  # The chat template refuses the messages.
        raise BadRequest(str(error), "messages") from None
    if request.top_logprobs is not None and not request.logprobs:
        raise BadRequest("top_logprobs: found it without logprobs, expected logprobs: true beside it", "top_logprobs")
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    return prepared(
        request,
        (prompt,),
        limits.max_new_tokens if asked is None else asked,
        limits,
        CHAT,
        "messages",
        num_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
