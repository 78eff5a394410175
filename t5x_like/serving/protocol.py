"""What a client may ask for, checked, and what it is answered, in the form of OpenAI's completions."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5x_like.config import ConfigError, DataError
from t5x_like.decoding.requests import is_text
from t5x_like.decoding.sampling import Sampling

MOST_STOPS = 16
MOST_CHOICES = 128
"""Prompts times `n` of one request."""
_LARGEST_SEED = 2**63

# What OpenAI's clients may send and what would change the answer: taken where it is what would happen anyway.
_FIXED: dict[str, tuple[Any, ...]] = {
    "echo": (False, None),
    "logprobs": (None, 0),
    "suffix": (None, ""),
    "best_of": (1, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": (None, {}),
}
_KNOWN = {
    *_FIXED,
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "stream",
    "stream_options", "stop", "seed", "user",
}  # fmt: skip


class BadRequest(Exception):
    """What is wrong with a request.

    Attributes:
      status: HTTP status, 4xx.
      param: The field.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, Any]:
        return error_body(str(self), self.status, self.param)


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    kinds = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    kind = kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


@dataclasses.dataclass(frozen=True)
class Completion:
    """A request that can be answered.

    Attributes:
      prompts: Token ids of each prompt, as the model reads them.
      count: Answers to each.
      stops: Text that ends an answer.
    """

    prompts: tuple[tuple[int, ...], ...]
    count: int
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    seed: int
    stream: bool
    with_usage: bool


def parse(
    body: bytes,
    *,
    model: str,
    encode: Callable[[str], Sequence[int]],
    vocab_size: int,
    longest_prompt: int,
    most_tokens: int,
    draw_seed: Callable[[], int],
) -> Completion:
    """Reads and checks the body of a request.

    Args:
      model: The name that `model` may have; it may be left out.
      encode: A prompt's text to ids, with what stands around it in training.
      vocab_size: Ids given as numbers are below it.
      longest_prompt, most_tokens: Limits, in tokens.
      draw_seed: For requests without a seed.

    Raises:
      BadRequest: the first thing that is wrong.
    """
    fields = _object(body)
    unknown = sorted(fields.keys() - _KNOWN)
    if unknown:
        # What the answer repeats of the request must be text that it can hold, and no longer than one likes to read.
        message = f"unknown field {unknown[0][:100]!r}; known are {', '.join(sorted(_KNOWN))}"
        raise BadRequest(message, unknown[0][:100] if is_text(unknown[0]) else None)
    for name, accepted in _FIXED.items():
        if name in fields and fields[name] not in accepted:
            raise BadRequest(f"{name} is not supported: leave it out", name)
    if fields.get("model", model) != model:
        raise BadRequest(f"no model {str(fields['model'])[:100]!r} here; this is {model!r}", "model", 404)

    prompts = tuple(tuple(ids) for ids in _prompts(fields, encode, vocab_size))
    for ids in prompts:
        if not 0 < len(ids) <= longest_prompt:
            message = f"a prompt of {len(ids)} tokens, with what stands around it; expected 1 to {longest_prompt}"
            raise BadRequest(message, "prompt")
    count = _integer(fields, "n", 1, 1, MOST_CHOICES)
    if count * len(prompts) > MOST_CHOICES:
        raise BadRequest(f"{len(prompts)} prompts with {count} answers each; expected {MOST_CHOICES} in all", "n")
    top_p = _number(fields, "top_p", 1.0)
    top_k = _integer(fields, "top_k", 0, -1, 2**31 - 1)
    try:
        sampling = Sampling(
            temperature=_number(fields, "temperature", 1.0),
            top_p=None if top_p == 1.0 else top_p,
            top_k=top_k if top_k > 0 else None,
            min_p=_number(fields, "min_p", 0.0) or None,
            repetition_penalty=_number(fields, "repetition_penalty", 1.0),
        )
    except ConfigError as error:
        problem = error.problems[0]
        message = f"{problem.where}: found {problem.found}, expected {problem.expected}"
        raise BadRequest(message, problem.where) from None
    stream = _boolean(fields, "stream")
    return Completion(
        prompts=prompts,
        count=count,
        max_tokens=_integer(fields, "max_tokens", min(16, most_tokens), 1, most_tokens),
        sampling=sampling,
        stops=_stops(fields),
        seed=draw_seed() if fields.get("seed") is None else _integer(fields, "seed", 0, -_LARGEST_SEED, _LARGEST_SEED),
        stream=stream,
        with_usage=bool((fields.get("stream_options") or {}).get("include_usage")) if stream else True,
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is no UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is no JSON ({error})") from None
    if not isinstance(fields, dict):
        raise BadRequest(f"the body is a JSON {type(fields).__name__}, expected an object")
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadRequest("stream_options: expected an object", "stream_options")
    return fields


def _prompts(fields: Mapping[str, Any], encode: Callable[[str], Sequence[int]], vocab_size: int) -> list[Sequence[int]]:
    """The prompts as ids. Ids given as numbers are taken as they are, with nothing put around them."""
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return [_encoded(prompt, encode)]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(one, str) for one in prompt):
            return [_encoded(one, encode) for one in prompt]
        rows = [prompt] if all(type(one) is int for one in prompt) else prompt
        if all(isinstance(row, list) and all(type(one) is int for one in row) for row in rows):
            if any(not 0 <= one < vocab_size for row in rows for one in row):
                raise BadRequest(f"an id that is not in 0 to {vocab_size - 1}", "prompt")
            return rows
    raise BadRequest("expected a text, ids, or a list of either", "prompt")


def _encoded(text: str, encode: Callable[[str], Sequence[int]]) -> Sequence[int]:
    if not is_text(text):
        raise BadRequest("half of a surrogate pair, expected text that UTF-8 can hold", "prompt")
    try:
        return encode(text)
    except DataError as error:  # A sentinel that the vocabulary does not have.
        raise BadRequest(str(error), "prompt") from None


def _number(fields: Mapping[str, Any], name: str, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise BadRequest(f"{name}: found {str(value)[:100]!r}, expected a number", name)
    return float(value)


def _integer(fields: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise BadRequest(f"{name}: found {str(value)[:100]!r}, expected a whole number from {least} to {most}", name)
    return value


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value not in (None, True, False):
        raise BadRequest(f"{name}: expected true or false", name)
    return bool(value)


def _stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
    stop = fields.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise BadRequest("stop: expected a text or a list of them, none of them empty", "stop")
    if len(stops) > MOST_STOPS:
        raise BadRequest(f"stop: found {len(stops)} texts, expected at most {MOST_STOPS}", "stop")
    return tuple(stops)


def answer_body(
    identity: str, model: str, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The answer, or a part of one that is streamed."""
    body: dict[str, Any] = {
        "id": identity,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": list(choices),
    }
    return body if usage is None else body | {"usage": dict(usage)}


def choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
