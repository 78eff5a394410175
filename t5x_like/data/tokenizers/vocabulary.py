"""Layout of token ids: the part of a tokenizer that the denoising objectives need."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from t5x_like.config.objectives import MODES, Mode
from t5x_like.config.objectives.fill_in_the_middle import INFILLING_MARKERS

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
NUM_SPECIAL = 3
MAX_TOKENS = 2**22
"""Largest number of ids of a published tokenizer, several times that of the largest: the table of all ids is made."""


def require_id(token: int) -> None:
    """Raise ValueError if a published tokenizer has a token with an id that no vocabulary reaches."""
    if token >= MAX_TOKENS:
        raise ValueError(f"a token has the id {token}, expected an id below {MAX_TOKENS}")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Ranges of ids: text pieces and the tokenizer's own special tokens; then sentinels, the first with the highest id;
    then the mode tokens. The tokenizers trained here begin with pad, eos and unk; published ones have their own ids.

    Attributes:
      base_size: Number of special tokens and text pieces; `encode` returns ids below it.
      num_sentinels: Number of ids that are reserved for masked spans.
      pad_id: Id after the end of a row. A published tokenizer without one has its EOS in this place.
      eos_id: Id at the end of a document.
      unk_id: Id of text without a piece; None if there is no such text.
      start_id: Id that the rows of a decoder begin with, and those of labelled texts in an encoder if `has_start`.
      own_mask_id: Id of the tokenizer's own mask token; None: the first sentinel is the mask token.
      has_modes: There are ids of mode tokens. A published tokenizer without sentinels has none, so that its model keeps
        its table.
    """

    base_size: int
    num_sentinels: int
    pad_id: int = PAD_ID
    eos_id: int = EOS_ID
    unk_id: int | None = UNK_ID
    start_id: int = PAD_ID
    own_mask_id: int | None = None
    has_modes: bool = True

    @property
    def vocab_size(self) -> int:
        return self.base_size + self.num_sentinels + (len(MODES) if self.has_modes else 0)

    @property
    def has_start(self) -> bool:
        """True if the tokenizer has a token of its own for the beginning of a text: [CLS] or <s>."""
        return self.start_id not in (self.pad_id, self.eos_id)

    @property
    def first_text_id(self) -> int:
        """First id that can stand for text: after pad, eos and unk where they are the first ids."""
        return NUM_SPECIAL if (self.pad_id, self.eos_id, self.unk_id) == (PAD_ID, EOS_ID, UNK_ID) else 0

    @property
    def first_sentinel_id(self) -> int:
        """Id of `<extra_id_0>`; the next sentinels have lower ids."""
        return self.base_size + self.num_sentinels - 1

    @property
    def mask_id(self) -> int:
        """Id of the mask token of masked LM: the tokenizer's own, or the first sentinel.

        Raises:
          IndexError: there is neither.
        """
        return self.sentinel_id(0) if self.own_mask_id is None else self.own_mask_id

    def sentinel_id(self, index: int) -> int:
        """Return the id of a sentinel; raise IndexError beyond the last one, whose id would be that of a text piece."""
        if not 0 <= index < self.num_sentinels:
            raise IndexError(f"sentinel {index} of {self.num_sentinels}")
        return self.first_sentinel_id - index

    def is_sentinel(self, tokens: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return a mask over `tokens`: True for sentinels."""
        return (tokens >= self.base_size) & (tokens <= self.first_sentinel_id)

    @property
    def infilling_ids(self) -> tuple[int, int, int]:
        """Ids of the prefix, suffix and middle markers of fill-in-the-middle: the last three sentinels.

        Raises:
          IndexError: the vocabulary has fewer sentinels.
        """
        prefix = self.num_sentinels - INFILLING_MARKERS
        return self.sentinel_id(prefix), self.sentinel_id(prefix + 1), self.sentinel_id(prefix + 2)

    def mode_id(self, mode: Mode) -> int:
        if not self.has_modes:
            raise IndexError(f"mode token {mode} of a tokenizer without mode tokens: set data.tokenizer.num_sentinels")
        return self.base_size + self.num_sentinels + MODES.index(mode)

    def special_name(self, token: int) -> str | None:
        """Return the name of a special token (`<extra_id_3>`, `[R]`, `</s>`, `<pad>`); None for text and unk."""
        if token >= self.vocab_size:
            return f"<unused_{token}>"
        if token > self.first_sentinel_id:
            return f"[{MODES[token - self.first_sentinel_id - 1]}]"
        if token >= self.base_size:
            return f"<extra_id_{self.first_sentinel_id - token}>"
        return {self.pad_id: "<pad>", self.eos_id: "</s>"}.get(token)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenTraits:
    """Properties of pieces that whole-word and sentence objectives read. Both arrays are bool [base_size].

    Attributes:
      word_starts: The piece begins a word: it starts with whitespace (SentencePiece's U+2581, a byte vocabulary's
        space), which belongs to the word that follows it; or it is EOS, a word of its own. In scripts without spaces a
        word is a whole stretch of text without spaces.
      sentence_ends: The piece ends a sentence: it ends in `.`, `!`, `?` or their full-width forms, before closing
        quotes and brackets; or it holds a newline; or it is EOS.
      eos_id: Id of EOS.
    """

    word_starts: npt.NDArray[np.bool_]
    sentence_ends: npt.NDArray[np.bool_]
    eos_id: int = EOS_ID
