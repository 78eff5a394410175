"""A tokenizer of ours as the files that `AutoTokenizer.from_pretrained` reads, with the same ids.

One difference remains: SentencePiece adds scores in single precision and `tokenizers` in double. Where cuts of a text
have the same score, as in a long row of equal characters, they may choose different ones, with the same pieces in
another order.

tokenizer.json is written from the pieces of the SentencePiece model, or from the bytes, without the `tokenizers`
library. Its class is the plain fast tokenizer, which takes the file as it is: transformers' own T5 class splits text at
every whitespace and so loses newlines and runs of spaces.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from t5x_like.config.objectives import MODES
from t5x_like.data import sentencepiece_model
from t5x_like.data.tokenizers import SentencePieceTokenizer, Tokenizer
from t5x_like.data.vocabulary import EOS_ID, PAD_ID, UNK_ID

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
_SPACE = "▁"
_UNIGRAM = 1
_USER_DEFINED_MALUS = 0.1
"""SentencePiece scores a user-defined symbol by its bytes times the best score, less this."""


def write_tokenizer(directory: Path, tokenizer: Tokenizer, *, max_length: int | None = None) -> list[str]:
    """Writes spiece.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    In Hugging Face's tokenizers text that spells a special token is that token, as in our `encode_marked`; EOS is put
    behind every text, as T5's do.

    Returns:
      What could not be written, and why.
    """
    left_out = []
    if isinstance(tokenizer, SentencePieceTokenizer):
        try:
            (directory / "spiece.model").write_bytes(sentencepiece_model.arranged(tokenizer.model))
        except ValueError as error:
            left_out.append(f"spiece.model: its ids would not be those of the run ({error})")
    obstacle = _obstacle(tokenizer)
    if obstacle is not None:
        return [*left_out, f"tokenizer.json: {obstacle}"]
    _write(directory / "tokenizer.json", tokenizer_json(tokenizer))
    sentinels = [f"<extra_id_{index}>" for index in range(tokenizer.vocabulary.num_sentinels)]
    special: dict[str, Any] = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK}
    special["additional_special_tokens"] = [*sentinels, *(f"[{mode}]" for mode in MODES)]
    _write(directory / "special_tokens_map.json", special)
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "extra_ids": len(sentinels),
        "added_tokens_decoder": {str(entry.pop("id")): entry for entry in tokenizer_json(tokenizer)["added_tokens"]},
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    _write(directory / "tokenizer_config.json", config)
    return left_out


def _obstacle(tokenizer: Tokenizer) -> str | None:
    """Why tokenizer.json cannot say what this tokenizer does."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return None
    settings = sentencepiece_model.settings(tokenizer.model)
    if settings.kind != _UNIGRAM:
        return "the SentencePiece model is no unigram model"
    if settings.whitespace_as_suffix or not settings.escape_whitespace:
        return "the SentencePiece model treats spaces in a way that it cannot say"
    if any(piece.is_unused for piece in sentencepiece_model.pieces(tokenizer.model)):
        return "the SentencePiece model has unused pieces"
    names = [name for name, _ in _scored(tokenizer)]
    if len(set(names)) < len(names):
        return "a piece of text is called like a special token"
    return None


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of tokenizer.json: a unigram model over the whole text, as SentencePiece reads it."""
    scored = _scored(tokenizer)
    vocabulary = tokenizer.vocabulary
    special_ids = [PAD_ID, EOS_ID, UNK_ID, *range(vocabulary.base_size, vocabulary.vocab_size)]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    settings = _settings(tokenizer)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": scored[token][0], **plain} for token in special_ids],
        "normalizer": _normalizer(settings),
        "pre_tokenizer": _pre_tokenizer(settings),
        "post_processor": _post_processor(),
        "decoder": _decoder(settings),
        "model": {
            "type": "Unigram",
            "unk_id": UNK_ID,
            "vocab": [list(each) for each in scored],
            "byte_fallback": settings.byte_fallback,
        },
    }


def _settings(tokenizer: Tokenizer) -> sentencepiece_model.Settings:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return sentencepiece_model.settings(tokenizer.model)
    return sentencepiece_model.Settings(
        byte_fallback=True, dummy_prefix=False, one_space=False, escape_whitespace=False
    )


def _scored(tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """(name, score) of every id of ours."""
    vocabulary = tokenizer.vocabulary
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = [piece for piece in sentencepiece_model.pieces(tokenizer.model) if piece.holds_text]
        best = max((p.score for p in pieces if not (p.is_byte or p.is_user_defined or p.is_unused)), default=0.0)
        text = [
            (p.piece, len(p.piece.encode()) * best - _USER_DEFINED_MALUS if p.is_user_defined else p.score)
            for p in pieces
        ]
    else:
        text = [(f"<0x{value:02X}>", 0.0) for value in range(256)]
    reserved = range(vocabulary.base_size, vocabulary.vocab_size)
    return [
        (PAD, 0.0),
        (EOS, 0.0),
        (UNK, 0.0),
        *text,
        *((vocabulary.special_name(token) or UNK, 0.0) for token in reserved),
    ]


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _sequence(kind: str, parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"type": "Sequence", kind: parts} if parts else None


def _normalizer(settings: sentencepiece_model.Settings) -> dict[str, Any] | None:
    parts: list[dict[str, Any]] = []
    if settings.charsmap:
        table = base64.b64encode(settings.charsmap).decode()
        parts.append({"type": "Precompiled", "precompiled_charsmap": table})
    if settings.one_space:
        parts += [_replace({"Regex": r"\A +| +\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if settings.dummy_prefix:
        parts.append({"type": "Prepend", "prepend": _SPACE})
    if settings.escape_whitespace:
        parts.append(_replace({"String": " "}, _SPACE))
    return _sequence("normalizers", parts)


def _pre_tokenizer(settings: sentencepiece_model.Settings) -> dict[str, Any] | None:
    """Text that spells a byte's piece is cut behind its first character, or it would become that byte."""
    if not settings.byte_fallback:
        return None
    pattern = {"Regex": "<(?=0x[0-9A-F]{2}>)"}
    return {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}


def _post_processor() -> dict[str, Any]:
    eos = {"SpecialToken": {"id": EOS, "type_id": 0}}
    one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [one, eos],
        "pair": [one, eos, other, eos],
        "special_tokens": {EOS: {"id": EOS, "ids": [EOS_ID], "tokens": [EOS]}},
    }


def _decoder(settings: sentencepiece_model.Settings) -> dict[str, Any] | None:
    parts = [_replace({"String": _SPACE}, " ")] if settings.escape_whitespace else []
    if settings.byte_fallback:
        parts += [{"type": "ByteFallback"}]
    parts.append({"type": "Fuse"})
    if settings.dummy_prefix:
        parts.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _sequence("decoders", parts)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
