"""Requests of continuous batching, and their prompts and settings as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from t5x_like.decoding.bucketing import bucket, pad_rows
from t5x_like.decoding.sampling import Sampling
from t5x_like.decoding.token_logprobs import TokenLogprob
from t5x_like.program import Program

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""Why a request has ended; "error": the logits of its next token are not finite."""
OnTokens = Callable[[list[int], FinishReason | None], None]
"""Called with new tokens without EOS, and the finish reason with the last ones (None before)."""

OnLogprobs = Callable[[list[TokenLogprob]], None]
"""Called with the log-probabilities of tokens, in their order."""

NUM_SEEDS = 2**32


@dataclasses.dataclass(eq=False)
class Request:
    """Request to continue one prompt.

    Attributes:
      prompt: Token ids, as `generate_tokens` takes them.
      max_new_tokens: Largest number of new tokens, EOS included; 0 only for a prompt that is scored.
      sampling: Sampling settings.
      on_tokens: Called with new tokens, in the thread that runs the batcher.
      seed, row: Seed and row number of the draws, as in `generate_tokens`.
      client: Name of the client; clients are served in turn.
      on_logprobs: Called with the log-probabilities of new tokens before `on_tokens` is called with the tokens; None:
        they are not computed.
      on_prompt_logprobs: Called once with those of the prompt, before any token; None: the prompt is not scored.
      suffix: Token ids after the new tokens, which a model that fills masked positions reads.
      cancelled: Set by `RequestScheduler.cancel`.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    on_tokens: OnTokens
    seed: int = 0
    row: int = 0
    client: str = ""
    on_logprobs: OnLogprobs | None = None
    on_prompt_logprobs: OnLogprobs | None = None
    suffix: Sequence[int] = ()
    cancelled: bool = False


def request_arrays(
    program: Program, requests: Sequence[Request], rows: int, max_prompt_length: int
) -> dict[str, npt.NDArray[Any]]:
    """Return the prompts and settings as arrays of `rows` rows; those after the last request have length 1."""
    model_config = program.run.model
    streams = [
        list(request.prompt)
        if model_config.encoder is not None
        else [model_config.decoder_start_token_id, *request.prompt]
        for request in requests
    ]
    # A decoder's stream begins with the start token, which is not counted as part of the prompt.
    max_length = max_prompt_length + (model_config.encoder is None)
    width = min(bucket(max(map(len, streams))), max_length)

    def column(values: Sequence[float], dtype: Any, filler: float) -> npt.NDArray[Any]:
        return np.array([*values, *[filler] * (rows - len(requests))], dtype)

    settings = [request.sampling for request in requests]
    return {
        "tokens": pad_rows(streams, rows, width),
        "lengths": column([len(stream) for stream in streams], np.int32, 1),
        "limits": column([request.max_new_tokens for request in requests], np.int32, 0),
        "seeds": column([request.seed % NUM_SEEDS for request in requests], np.uint32, 0),
        "rows": column([request.row for request in requests], np.int32, 0),
        "logprobs": column([request.on_logprobs is not None for request in requests], np.bool_, 0),
        "temperature": column([sampling.temperature for sampling in settings], np.float32, 0),
        # Settings that a request does not use get the value without effect, because all requests share one program.
        "top_k": column([sampling.top_k or model_config.vocab_size for sampling in settings], np.int32, 1),
        "top_p": column([1.0 if sampling.top_p is None else sampling.top_p for sampling in settings], np.float32, 1),
        "min_p": column([sampling.min_p or 0.0 for sampling in settings], np.float32, 0),
        "penalty": column([sampling.repetition_penalty for sampling in settings], np.float32, 1),
    }
