"""Tokenizer of UTF-8 bytes, as in ByT5."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from t5x_like.data.tokenizers.tokenizer import UNKNOWN, Ids, Tokenizer
from t5x_like.data.tokenizers.vocabulary import NUM_SPECIAL

_BYTES_OF_UTF8 = 0xF5
"""UTF-8 has no byte from this one on."""


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes; the id of a byte is its value plus 3, as in ByT5 and seqio.

    Attributes:
      is_published: Whether the sentinels have the ids of the published ByT5.
    """

    def __init__(self, num_sentinels: int, num_bytes: int = 256):
        self.is_published = num_bytes < 256
        pieces = [b"", b"", UNKNOWN, *(bytes([value]) for value in range(num_bytes))]
        super().__init__(pieces, num_sentinels, "bytes")

    @staticmethod
    def published() -> ByteTokenizer:
        """Return the tokenizer of the published ByT5, whose sentinels are the ids of the last bytes, 258 downwards.

        Those of the 11 bytes that UTF-8 does not have are sentinels here; the ones below are bytes of text as well.
        """
        return ByteTokenizer(256 - _BYTES_OF_UTF8, _BYTES_OF_UTF8)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[Ids]:
        del num_threads
        return [np.frombuffer(text.encode(), np.uint8) + np.uint16(NUM_SPECIAL) for text in texts]
