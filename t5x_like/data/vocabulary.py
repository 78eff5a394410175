"""Which ids mean what: the part of a tokenizer that denoisers need."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from t5x_like.config.lengths import INFILLING_MARKERS
from t5x_like.config.objectives import MODES, Mode

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
NUM_SPECIAL = 3


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Ids: pad, eos, unk, text pieces; then sentinels, the first of which has the highest id; then the mode tokens.

    Attributes:
      base_size: Specials and text pieces; ids below it are what `encode` can return.
      num_sentinels: Reserved ids for masked spans.
    """

    base_size: int
    num_sentinels: int

    @property
    def vocab_size(self) -> int:
        return self.base_size + self.num_sentinels + len(MODES)

    @property
    def first_sentinel_id(self) -> int:
        """`<extra_id_0>`; the next sentinels count down from it."""
        return self.base_size + self.num_sentinels - 1

    @property
    def mask_id(self) -> int:
        """The token that masked LM puts in place of a chosen one: the first sentinel."""
        return self.first_sentinel_id

    def sentinel_id(self, index: int) -> int:
        """Raises IndexError beyond the last sentinel: a piece of text must never serve as one."""
        if not 0 <= index < self.num_sentinels:
            raise IndexError(f"sentinel {index} of {self.num_sentinels}")
        return self.first_sentinel_id - index

    @property
    def infilling_ids(self) -> tuple[int, int, int]:
        """Prefix, suffix and middle marker of fill-in-the-middle: the last three sentinels.

        Raises IndexError where there are fewer.
        """
        prefix = self.num_sentinels - INFILLING_MARKERS
        return self.sentinel_id(prefix), self.sentinel_id(prefix + 1), self.sentinel_id(prefix + 2)

    def mode_id(self, mode: Mode) -> int:
        return self.base_size + self.num_sentinels + MODES.index(mode)

    def special_name(self, token: int) -> str | None:
        """`<extra_id_3>`, `[R]`, `</s>`, `<pad>`; None for text (and for unk, which stands for text)."""
        if token >= self.vocab_size:
            return f"<unused_{token}>"
        if token > self.first_sentinel_id:
            return f"[{MODES[token - self.first_sentinel_id - 1]}]"
        if token >= self.base_size:
            return f"<extra_id_{self.first_sentinel_id - token}>"
        return {PAD_ID: "<pad>", EOS_ID: "</s>"}.get(token)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenTraits:
    """What whole-word and sentence objectives must know of a vocabulary's pieces. Both arrays are [base_size].

    Attributes:
      word_starts: The piece begins a word: it starts with whitespace (SentencePiece's U+2581, a byte vocabulary's
        space), which belongs to the word behind it; or it is EOS, a word of its own. In scripts without spaces a word
        is as long as what has none.
      sentence_ends: The piece ends a sentence: it ends in `.`, `!`, `?` or their full-width forms, before closing
        quotes and brackets; or it holds a newline; or it is EOS.
    """

    word_starts: npt.NDArray[np.bool_]
    sentence_ends: npt.NDArray[np.bool_]
