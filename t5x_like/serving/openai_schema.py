"""Request bodies of OpenAI's completions endpoint, and what both endpoints have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import pydantic
import pydantic_core
from pydantic import AfterValidator, Field

from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.token_logprobs import MAX_TOP_LOGPROBS
from t5x_like.errors import ConfigError, DataError
from t5x_like.serving.response_forms import COMPLETIONS, ResponseForm, error_body

MAX_STOP_STRINGS = 16
MAX_CHOICES = 128
"""Largest number of completions per request: prompts times `n`."""
DEFAULT_MAX_TOKENS = 16
"""OpenAI's default of `max_tokens`."""
_MAX_SEED = 2**63
_MAX_NUMBER = 1e30
_MAX_QUOTED = 100
"""Characters of the client's own text that an error message repeats."""


RequestT = TypeVar("RequestT", bound=pydantic.BaseModel)


class BadRequest(Exception):
    """A request that is refused.

    Attributes:
      status: HTTP status, 4xx or 503.
      param: Name of the field at fault, or None.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, Any]:
        """Return the response body in OpenAI's form."""
        return error_body(str(self), self.status, self.param)


def require_default(default: Any) -> AfterValidator:
    """Return a validator for an option of OpenAI's that is accepted only with a value that has no effect."""

    def require(value: Any) -> Any:
        if value != default:
            raise pydantic_core.PydanticCustomError("unsupported", "is not supported: leave it out")
        return value

    return AfterValidator(require)


# fail_fast: a list that does not match is refused at its first element, however long it is.
_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[int], Field(fail_fast=True)]
_Prompts = (
    str
    | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    | Annotated[list[int], Field(min_length=1, fail_fast=True)]
    | Annotated[list[_Ids], Field(min_length=1, fail_fast=True)]
)
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
EXPECTED_TOP_LOGPROBS = f"a whole number from 0 to {MAX_TOP_LOGPROBS}"
_Number = Annotated[float, Field(gt=-_MAX_NUMBER, lt=_MAX_NUMBER, allow_inf_nan=False)]


class StreamOptions(pydantic.BaseModel):
    """Options of a streamed response; others of OpenAI's are ignored."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="ignore")

    include_usage: bool | None = False


class SamplingRequest(pydantic.BaseModel):
    """Fields that the bodies of all endpoints have in common. Null means the same as a field that is left out.

    A field's description is what the error message says was expected. `top_k`, `min_p` and `repetition_penalty` are
    extensions of OpenAI's interface, with the names that vLLM uses.
    """

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid")

    model: str | None = Field(None, description="a text")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description=f"a whole number from 1 to {MAX_CHOICES}")
    max_tokens: int | None = Field(None, description="a whole number")
    temperature: _Number = Field(1.0, description="a number")
    top_p: _Number = Field(1.0, description="a number")
    top_k: int = Field(0, ge=-1, lt=2**31, description=f"a whole number from -1 to {2**31 - 1}")
    min_p: _Number = Field(0.0, description="a number")
    repetition_penalty: _Number = Field(1.0, description="a number")
    stop: _Text | Annotated[list[_Text], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] = Field(
        [], description=f"a text, or a list of at most {MAX_STOP_STRINGS}, none of them empty"
    )
    seed: int | None = Field(
        None, ge=-_MAX_SEED, le=_MAX_SEED, description=f"a whole number from {-_MAX_SEED} to {_MAX_SEED}"
    )
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions = Field(StreamOptions(), description="an object with include_usage, true or false")
    user: Any = None

    # OpenAI's options that would change the completion and are not implemented: accepted where they have no effect.
    presence_penalty: Annotated[Any, require_default(0)] = None
    frequency_penalty: Annotated[Any, require_default(0)] = None
    logit_bias: Annotated[Any, require_default({})] = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class CompletionRequest(SamplingRequest):
    """Body of a POST to /v1/completions, as sent by the client."""

    prompt: _Prompts = Field(description="a text, ids, or a list of either")
    echo: bool = Field(False, description="true or false")
    logprobs: TopLogprobs | None = Field(None, description=EXPECTED_TOP_LOGPROBS)
    suffix: str | None = Field(None, description="a text")
    best_of: Annotated[Any, require_default(1)] = None


@dataclasses.dataclass(frozen=True)
class PreparedRequest:
    """A valid request in the terms of the decoder.

    Attributes:
      prompts: Token ids of each prompt, as the model reads them.
      num_completions: Completions of each prompt.
      stop: Strings that end a completion.
      include_usage: The response reports the numbers of tokens.
      form: Form of the response.
      num_logprobs: Number of most likely tokens whose log-probabilities are reported at each position, beside that of
        the token; None: no log-probabilities.
      echo: The text begins with the prompt, and so do the log-probabilities.
      suffix: Token ids after the completion.
    """

    prompts: tuple[tuple[int, ...], ...]
    num_completions: int
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    seed: int
    stream: bool
    include_usage: bool
    form: ResponseForm
    num_logprobs: int | None = None
    echo: bool = False
    suffix: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of the requests that are accepted.

    Attributes:
      model: Name of the served model; a request may leave it out, but may not name another one.
      vocab_size: Upper bound (exclusive) of ids that are given as numbers.
      max_prompt_length, max_new_tokens: In tokens.
      draw_seed: Returns a seed for a request that has none.
      scores_prompts: The model predicts the tokens of its prompts.
      fills_gaps: The model reads a suffix.
      unmasks: The model fills masked positions, and gives no log-probabilities of next tokens.
    """

    model: str
    vocab_size: int
    max_prompt_length: int
    max_new_tokens: int
    draw_seed: Callable[[], int]
    scores_prompts: bool = True
    fills_gaps: bool = False
    unmasks: bool = False


def parse(body: bytes, limits: Limits, encode: Callable[[str], Sequence[int]]) -> PreparedRequest:
    """Return the request for completions that the body describes.

    Args:
      body: JSON in UTF-8.
      limits: What a request may ask for.
      encode: Converts a prompt's text to ids, with the tokens that surround it in training.

    Raises:
      BadRequest: the first problem found.
    """
    request = validated(body, CompletionRequest)
    require_model(request.model, limits.model)
    prompts = tuple(tuple(ids) for ids in _prompt_ids(request.prompt, encode, limits.vocab_size))
    suffix: tuple[int, ...] = ()
    if request.suffix:
        if not limits.fills_gaps:
            raise BadRequest("suffix is not supported: leave it out", "suffix")
        suffix = tuple(_prompt_ids(request.suffix, encode, limits.vocab_size)[0])
    if limits.unmasks:
        _require_unmasking(request)
    most = min(DEFAULT_MAX_TOKENS, limits.max_new_tokens) if request.max_tokens is None else request.max_tokens
    if request.echo and request.logprobs is not None and not limits.scores_prompts:
        message = (
            "echo with logprobs: this model does not predict the tokens of its prompts, since it reads a prompt in "
            "both directions; leave out one of the two"
        )
        raise BadRequest(message, "echo")
    return prepared(
        request,
        prompts,
        most,
        limits,
        COMPLETIONS,
        "prompt",
        num_logprobs=request.logprobs,
        echo=request.echo,
        suffix=suffix,
    )


def _require_unmasking(request: CompletionRequest) -> None:
    """Raise BadRequest if the request has options without a meaning where masked positions are filled."""
    given = {"logprobs": request.logprobs is not None, "repetition_penalty": request.repetition_penalty != 1.0}
    names = [name for name, is_set in given.items() if is_set]
    if names:
        message = (
            f"{', '.join(names)}: this model fills masked positions in any order and has no next token; leave out "
            f"{names[0] if len(names) == 1 else 'them'}"
        )
        raise BadRequest(message, names[0])


def require_model(name: str | None, served: str) -> None:
    """Raise BadRequest if a request names another model."""
    if name is not None and name != served:
        raise BadRequest(f"no model {name[:_MAX_QUOTED]!r} here; this server has {served!r}", "model", 404)


def prepared(
    request: SamplingRequest,
    prompts: tuple[tuple[int, ...], ...],
    max_tokens: int,
    limits: Limits,
    form: ResponseForm,
    param: str,
    *,
    num_logprobs: int | None = None,
    echo: bool = False,
    suffix: tuple[int, ...] = (),
) -> PreparedRequest:
    """Return a request whose prompts and number of tokens are within the limits.

    Args:
      param: Field that holds the prompts, for messages.
      num_logprobs, echo, suffix: See `PreparedRequest`. With an echo, no new token may be asked for.

    Raises:
      BadRequest: they are not, or the sampling settings are not valid.
    """
    for ids in prompts:
        length = len(ids) + len(suffix)
        if not 0 < length <= limits.max_prompt_length:
            message = (
                f"a prompt of {length} tokens, with the tokens added around the text; "
                f"expected 1 to {limits.max_prompt_length}"
            )
            raise BadRequest(message, param)
    if request.n * len(prompts) > MAX_CHOICES:
        message = f"{len(prompts)} prompts with {request.n} completions each; expected {MAX_CHOICES} in all"
        raise BadRequest(message, "n")
    least = 0 if echo else 1
    if not least <= max_tokens <= limits.max_new_tokens:
        found = str(max_tokens)[:_MAX_QUOTED]
        message = f"max_tokens: found {found}, expected a whole number from {least} to {limits.max_new_tokens}"
        raise BadRequest(message, "max_tokens")
    return PreparedRequest(
        prompts=prompts,
        num_completions=request.n,
        max_tokens=max_tokens,
        sampling=_sampling(request),
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop),
        seed=limits.draw_seed() if request.seed is None else request.seed,
        stream=request.stream,
        include_usage=not request.stream or bool(request.stream_options.include_usage),
        form=form,
        num_logprobs=num_logprobs,
        echo=echo,
        suffix=suffix,
    )


def validated(body: bytes, kind: type[RequestT]) -> RequestT:
    """Return the body as a request of an endpoint.

    JSON with half of a surrogate pair is refused as a whole, so that every text of a request, and every message that
    quotes one, can be encoded in UTF-8.

    Raises:
      BadRequest: the first problem that pydantic reports.
    """
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
    if problem["type"] == "json_invalid":
        raise BadRequest(f"the body is not valid JSON ({problem['ctx']['error']})")
    if not problem["loc"]:
        raise BadRequest(f"the body is a JSON {type(problem['input']).__name__}, expected an object")
    name = str(problem["loc"][0])
    fields = kind.model_fields
    if problem["type"] == "extra_forbidden":
        name = name[:_MAX_QUOTED]
        raise BadRequest(f"unknown field {name!r}; known are {', '.join(sorted(fields))}", name)
    if problem["type"] == "unsupported":
        raise BadRequest(f"{name} {problem['msg']}", name)
    found = "" if problem["type"] == "missing" else f"found {str(problem['input'])[:_MAX_QUOTED]!r}, "
    raise BadRequest(f"{name}: {found}expected {fields[name].description}", name)


def _sampling(request: SamplingRequest) -> Sampling:
    """Return the sampling settings. OpenAI's default temperature is 1, unlike that of `generate`."""
    try:
        return Sampling(
            temperature=request.temperature,
            top_p=None if request.top_p == 1.0 else request.top_p,
            top_k=request.top_k if request.top_k > 0 else None,
            min_p=request.min_p or None,
            repetition_penalty=request.repetition_penalty,
        )
    except ConfigError as error:
        problem = error.problems[0]
        message = f"{problem.where}: found {problem.found}, expected {problem.expected}"
        raise BadRequest(message, problem.where) from None


def _prompt_ids(
    prompt: str | list[str] | list[int] | list[list[int]], encode: Callable[[str], Sequence[int]], vocab_size: int
) -> list[Sequence[int]]:
    """Return the ids of each prompt. Ids that are given as numbers are used unchanged, with no tokens added."""
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    ids_of_prompts: list[Sequence[int]] = []
    for item in prompts:
        if isinstance(item, str):
            try:
                ids_of_prompts.append(encode(item))
            except DataError as error:  # A sentinel that the vocabulary does not have.
                raise BadRequest(str(error), "prompt") from None
        else:
            assert isinstance(item, list)
            ids_of_prompts.append(_require_known_ids(item, vocab_size))
    return ids_of_prompts


def _require_known_ids(ids: list[Any], vocab_size: int) -> list[int]:
    if any(not 0 <= token < vocab_size for token in ids):
        raise BadRequest(f"a token id outside 0 to {vocab_size - 1}", "prompt")
    return ids
