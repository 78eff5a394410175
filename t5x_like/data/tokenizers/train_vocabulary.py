"""Training of vocabularies: SentencePiece models, and BPE, WordPiece and Unigram by the package tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Literal, assert_never

from t5x_like.config.tokenizer import TokenizerKind
from t5x_like.data.tokenizers import sentencepiece_proto
from t5x_like.data.tokenizers.vocabulary import EOS_ID, PAD_ID, UNK_ID
from t5x_like.errors import DataError

_SPECIAL = ["<pad>", "</s>", "<unk>"]
"""Tokens with the ids PAD_ID, EOS_ID and UNK_ID."""


def train_vocabulary(kind: TokenizerKind, texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a vocabulary of `vocab_size` pieces, with pad 0, EOS 1 and unk 2, and return its `Tokenizer.model`.

    Raises:
      DataError: there is no text, or it does not suffice for that many pieces.
    """
    match kind:
        case "sentencepiece":
            return train_sentencepiece(texts, vocab_size)
        case "bpe" | "wordpiece" | "unigram":
            return _train_by_library(kind, texts, vocab_size)
        case "bytes" | "published" | "task":
            raise ValueError(f"a vocabulary of the kind {kind} is not trained")
        case unknown:
            assert_never(unknown)


def _train_by_library(kind: Literal["bpe", "wordpiece", "unigram"], texts: Iterable[str], vocab_size: int) -> bytes:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    trainer: Any
    match kind:
        case "bpe":
            tokenizer = Tokenizer(models.BPE(byte_fallback=False))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=_SPECIAL, initial_alphabet=alphabet)
        case "wordpiece":
            tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
            tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            tokenizer.decoder = decoders.WordPiece()
            trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=_SPECIAL)
        case "unigram":
            tokenizer = Tokenizer(models.Unigram())
            tokenizer.normalizer = normalizers.NFKC()
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
            tokenizer.decoder = decoders.Metaspace()
            trainer = trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=_SPECIAL, unk_token="<unk>")
        case unknown:
            assert_never(unknown)
    tokenizer.train_from_iterator((text for text in texts if text.strip()), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size: found {vocab_size}, expected at most {found}, which is what the corpus has "
            "pieces for; lower it, bring more text or use the byte vocabulary (--data.tokenizer.kind bytes)"
        )
    names = dict(zip(("pad_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    return json.dumps({"tokenizer": json.loads(tokenizer.to_str()), "config": names}, ensure_ascii=False).encode()


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a lossless unigram model of `vocab_size` pieces (pad, eos and unk included): no normalisation, pieces for
    the newline and for runs of spaces, and a byte for each character that has no piece.

    Args:
      texts: Documents to train on. Their order matters, the number of processors does not.
      vocab_size: Number of pieces; at least 3 specials, 256 bytes, the newline and the characters of the text.

    Raises:
      DataError: the texts are too few or too uniform for that many pieces, or have more characters than that.
    """
    import sentencepiece

    lines = (line for text in texts for line in text.split("\n") if line.strip())
    chunks = (line[start : start + 1000] for line in lines for start in range(0, len(line), 1000))
    first = next(iter(chunks), None)
    if first is None:
        raise DataError("found no text to train a tokenizer on, expected at least one document that is not blank")
    sentencepiece.set_random_generator_seed(0)
    output = sentencepiece_proto.Output()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_prepend(first, chunks),
            model_writer=output,
            model_type="unigram",
            vocab_size=vocab_size,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from None
    return output.getvalue()


def _prepend(first: str, rest: Iterable[str]) -> Iterable[str]:
    yield first
    yield from rest


def _training_error(message: str, vocab_size: int) -> DataError:
    where = "data.tokenizer.vocab_size"
    if too_high := re.search(r"value <= (\d+)", message):
        return DataError(
            f"{where}: found {vocab_size}, expected at most {too_high[1]}, which is what the corpus has pieces for; "
            "lower it, bring more text or use the byte vocabulary (--data.tokenizer.kind bytes)"
        )
    if too_low := re.search(r"required_chars\D+(\d+) vs (\d+)|(\d+) vs (\d+)", message):
        needed = max(int(number) for number in too_low.groups() if number)
        return DataError(f"{where}: found {vocab_size}, expected more than {needed}: specials, bytes and characters")
    return DataError(f"{where}: no tokenizer of {vocab_size} pieces could be trained on the corpus ({message})")
