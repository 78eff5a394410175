"""Tokenizer of a run."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from t5x_like.config.bounds import NonNegativeInt
from t5x_like.config.dataclass import config_dataclass

MIN_SENTENCEPIECE_SIZE = 260
"""pad, eos, unk, one piece for each byte and one for the newline: the pieces of `prepare` besides characters."""


TokenizerKind = Literal["sentencepiece", "bpe", "wordpiece", "unigram", "bytes", "published", "task"]
TRAINED_KINDS: tuple[TokenizerKind, ...] = ("sentencepiece", "bpe", "wordpiece", "unigram")


@config_dataclass
class TokenizerConfig:
    """Vocabulary. Ids: pad 0, eos 1, unk 2, pieces, sentinels (the first has the highest id), mode tokens R, S, X.
    Published tokenizers keep their own ids, before the sentinels and mode tokens."""

    kind: TokenizerKind = "sentencepiece"
    """sentencepiece: unigram pieces without normalization, and bytes for the rest. bpe: byte-level BPE, as in GPT-2.
    wordpiece: lower-cased words, as in BERT. unigram: pieces of NFKC-normalized text, as in T5, by the tokenizers
    library. bytes: as in ByT5. published: the tokenizer of a published model, with its ids. task: the vocabulary of
    the corpus's seqio Task, whose ids the store then contains."""
    path: str | None = None
    """sentencepiece: an existing model file. published: directory of a Hugging Face model, or one of its files:
    tokenizer.json, spiece.model, tokenizer.model, vocab.txt, vocab.json. None: `prepare` trains the vocabulary on the
    corpus."""
    vocab_size: Annotated[int, pydantic.Field(ge=MIN_SENTENCEPIECE_SIZE)] = 4096
    """Number of pieces of a vocabulary that `prepare` trains."""
    num_sentinels: NonNegativeInt = 100
    """Number of ids reserved for masked spans. A model file that has its own <extra_id_*> pieces must have at least
    this many, or none. With 0, a published tokenizer gets no mode tokens either, and the model's table does not
    grow."""

    @property
    def is_trained(self) -> bool:
        """True if `prepare` trains the vocabulary."""
        return self.kind in TRAINED_KINDS and self.path is None
