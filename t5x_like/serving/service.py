"""Model and limits of the completions server."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from t5x_like.data.tokenizers.tokenizer import TokenizerProtocol
from t5x_like.decoding.request_scheduler import RequestScheduler
from t5x_like.serving.chat_schema import EncodeChat
from t5x_like.serving.text_logprobs import TokenText, token_texts


@dataclasses.dataclass(frozen=True)
class Service:
    """Model and limits of the application.

    Attributes:
      model: Name of the model in requests and responses.
      batcher: Decoder; another thread runs it.
      encode: Converts a prompt's text to token ids.
      tokenizer: Tokenizer of the model.
      vocab_size: Number of token ids of the model.
      start_id: Id that the stream of a decoder begins with; None for an encoder-decoder.
      encode_chat: Converts messages and tools to token ids; None: the model answers no dialogues.
      max_waiting: Largest number of completions that wait for a slot; further requests get status 429.
      timeout: Largest duration of a request in seconds, waiting included.
      max_waiting_per_client: Largest number of completions of one client that wait; None: as for all clients.
      max_body_bytes: Largest size of a request's body.
      body_seconds: Time that a client may take to send a request's body.
    """

    model: str
    batcher: RequestScheduler
    encode: Callable[[str], Sequence[int]]
    tokenizer: TokenizerProtocol
    vocab_size: int
    start_id: int | None = None
    encode_chat: EncodeChat | None = None
    max_waiting: int = 256
    timeout: float = 600.0
    max_waiting_per_client: int | None = None
    max_body_bytes: int = 2**20
    body_seconds: float = 30.0

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of a completion."""
        return self.tokenizer.decode(list(tokens))

    @functools.cached_property
    def token_text(self) -> Callable[[int], TokenText]:
        """Function from an id to the text of that token alone."""
        return token_texts(self.tokenizer)
