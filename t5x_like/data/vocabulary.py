"""Which ids mean what: the part of a tokenizer that denoisers need."""

from __future__ import annotations

import dataclasses

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
