"""Response bodies of OpenAI's endpoints."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5x_like.serving.text_logprobs import TextLogprob, chat_logprobs, completion_logprobs

CLIENT_CLOSED_REQUEST = 499
"""Status of a response whose client has disconnected (nginx's convention). No client receives it."""

Entries = Sequence[TextLogprob] | None
"""Log-probabilities of a choice; None: the request does not ask for them."""


@dataclasses.dataclass(frozen=True)
class ResponseForm:
    """Form of the responses of an endpoint.

    Attributes:
      prefix: Beginning of the responses' ids.
      object_name, event_name: `object` of a response, and of an event of a streamed one.
      choice: (index, text, finish reason, log-probabilities) -> element of a response's `choices`.
      event_choice: The same for an event, with what is new since the last one and whether it is the first one.
    """

    prefix: str
    object_name: str
    event_name: str
    choice: Callable[[int, str, str | None, Entries], dict[str, Any]]
    event_choice: Callable[[int, str, str | None, Entries, bool], dict[str, Any]]

    def body(
        self, response_id: str, model: str, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int] | None
    ) -> dict[str, Any]:
        """Return the body of a response."""
        return _body(self.object_name, response_id, model, choices, usage)

    def event(
        self,
        response_id: str,
        model: str,
        choices: Sequence[Mapping[str, Any]],
        usage: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Return the body of one event of a streamed response."""
        return _body(self.event_name, response_id, model, choices, usage)


def _body(
    object_name: str,
    response_id: str,
    model: str,
    choices: Sequence[Mapping[str, Any]],
    usage: Mapping[str, int] | None,
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": response_id,
        "object": object_name,
        "created": int(time.time()),
        "model": model,
        "choices": list(choices),
    }
    return body if usage is None else body | {"usage": dict(usage)}


def _completion(
    index: int, text: str, finish_reason: str | None, entries: Entries, is_first: bool = True
) -> dict[str, Any]:
    logprobs = None if entries is None else completion_logprobs(entries)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _chat(index: int, text: str, finish_reason: str | None, entries: Entries) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    logprobs = None if entries is None else chat_logprobs(entries)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}


def _chat_event(index: int, text: str, finish_reason: str | None, entries: Entries, is_first: bool) -> dict[str, Any]:
    delta = {**({"role": "assistant"} if is_first else {}), "content": text}
    logprobs = None if entries is None else chat_logprobs(entries)
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


COMPLETIONS = ResponseForm("cmpl", "text_completion", "text_completion", _completion, _completion)
"""Form of the responses of /v1/completions."""
CHAT = ResponseForm("chatcmpl", "chat.completion", "chat.completion.chunk", _chat, _chat_event)
"""Form of the responses of /v1/chat/completions."""


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the `usage` part of a response."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error response in OpenAI's form."""
    kinds = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    kind = kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
