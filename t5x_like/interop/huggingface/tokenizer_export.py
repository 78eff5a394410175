"""Export of a tokenizer as the files that `AutoTokenizer.from_pretrained` reads, with the same ids.

One difference remains: SentencePiece adds scores in single precision and `tokenizers` in double precision. If several
segmentations of a text have the same score, as in a long run of equal characters, the two may choose different ones,
with the same pieces in another order.

tokenizer.json is written from the pieces of the SentencePiece model, or from the bytes, without the `tokenizers`
library. Its class is the plain fast tokenizer, which takes the file as it is: transformers' own T5 class splits text at
every whitespace and so loses newlines and runs of spaces.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from t5x_like.config.model import Architecture
from t5x_like.config.objectives import MODES
from t5x_like.data.tokenizers import sentencepiece_json, sentencepiece_proto
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.data.tokenizers.loading import stored_config
from t5x_like.data.tokenizers.sentencepiece import SentencePieceTokenizer
from t5x_like.data.tokenizers.sentencepiece_json import PLAIN_TOKEN
from t5x_like.data.tokenizers.tokenizer import Tokenizer
from t5x_like.data.tokenizers.vocabulary import EOS_ID, PAD_ID, UNK_ID

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
_UNIGRAM = 1
_USER_DEFINED_MALUS = 0.1
"""SentencePiece scores a user-defined symbol by its bytes times the best score, minus this number."""


def write_tokenizer(
    directory: Path, tokenizer: Tokenizer, architecture: Architecture, *, max_length: int | None = None
) -> list[str]:
    """Write spiece.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    In Hugging Face tokenizers, text that spells a special token becomes that token, as in `encode_marked`. What is
    added to every text follows from how the rows of training begin and end; see `_post_processor`.

    Args:
      directory: Existing directory.
      tokenizer: Tokenizer to export.
      architecture: Architecture of the model.
      max_length: `model_max_length` of the files; None: not written.

    Returns:
      A line for each file that could not be written, with the reason.
    """
    left_out = []
    if stored_config(tokenizer).kind == "published":
        return _write_published(directory, tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        try:
            (directory / "spiece.model").write_bytes(sentencepiece_proto.arranged(tokenizer.model))
        except ValueError as error:
            left_out.append(f"spiece.model: its ids would differ from those of the run ({error})")
    obstacle = _obstacle(tokenizer)
    if obstacle is not None:
        return [*left_out, f"tokenizer.json: {obstacle}"]
    document = tokenizer_json(tokenizer, architecture)
    _write(directory / "tokenizer.json", document)
    sentinels = [f"<extra_id_{index}>" for index in range(tokenizer.vocabulary.num_sentinels)]
    special: dict[str, Any] = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK}
    if architecture == "decoder":
        special["bos_token"] = PAD
    special["additional_special_tokens"] = [*sentinels, *(f"[{mode}]" for mode in MODES)]
    _write(directory / "special_tokens_map.json", special)
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "extra_ids": len(sentinels),
        "added_tokens_decoder": {str(entry.pop("id")): entry for entry in document["added_tokens"]},
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    _write(directory / "tokenizer_config.json", config)
    return left_out


def _write_published(directory: Path, tokenizer: Tokenizer) -> list[str]:
    """Write the files that a published tokenizer was read from, with added sentinels and mode tokens as special
    tokens."""
    if isinstance(tokenizer, ByteTokenizer):
        _write(directory / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125})
        return []
    # Imported on use: the package `tokenizers` is large, and other tokenizers do not need it.
    from t5x_like.data.tokenizers.huggingface import HuggingFaceTokenizer

    assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.model is not None
    document = json.loads(tokenizer.model)
    contents, vocabulary = document["tokenizer"], tokenizer.vocabulary
    known = {entry["id"] for entry in contents["added_tokens"]}
    pieces = contents["model"]["vocab"]
    size = max(*known, *(pieces.values() if isinstance(pieces, dict) else range(len(pieces))), -1) + 1
    more = [(token, vocabulary.special_name(token)) for token in range(size, vocabulary.vocab_size)]
    contents["added_tokens"] += [{"id": token, "content": name, **PLAIN_TOKEN} for token, name in more]
    _write(directory / "tokenizer.json", contents)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | tokenizer.config
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("added_tokens_decoder", None)
    _write(directory / "tokenizer_config.json", config)
    for name, text in document.get("files", {}).items():
        (directory / name).write_text(text, encoding="utf-8")
    for name, encoded in document.get("binary_files", {}).items():
        (directory / name).write_bytes(base64.b64decode(encoded))
    return []


def _obstacle(tokenizer: Tokenizer) -> str | None:
    """Return why tokenizer.json cannot express this tokenizer, or None."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return None
    settings = sentencepiece_proto.settings(tokenizer.model)
    if settings.kind != _UNIGRAM:
        return "the SentencePiece model is not a unigram model"
    if settings.whitespace_as_suffix or not settings.escape_whitespace:
        return "it cannot express how the SentencePiece model treats spaces"
    if any(piece.is_unused for piece in sentencepiece_proto.pieces(tokenizer.model)):
        return "the SentencePiece model has unused pieces"
    names = [name for name, _ in _scored(tokenizer)]
    if len(set(names)) < len(names):
        return "a piece of text has the name of a special token"
    return None


def tokenizer_json(tokenizer: Tokenizer, architecture: Architecture) -> dict[str, Any]:
    """Return the contents of tokenizer.json: a unigram model over the whole text, as in SentencePiece."""
    scored = _scored(tokenizer)
    vocabulary = tokenizer.vocabulary
    special_ids = [PAD_ID, EOS_ID, UNK_ID, *range(vocabulary.base_size, vocabulary.vocab_size)]
    settings = _settings(tokenizer)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": scored[token][0], **PLAIN_TOKEN} for token in special_ids],
        "normalizer": sentencepiece_json.normalizer(settings),
        "pre_tokenizer": sentencepiece_json.pre_tokenizer(settings),
        "post_processor": _post_processor(architecture),
        "decoder": sentencepiece_json.decoder(settings),
        "model": {
            "type": "Unigram",
            "unk_id": UNK_ID,
            "vocab": [list(pair) for pair in scored],
            "byte_fallback": settings.byte_fallback,
        },
    }


def _settings(tokenizer: Tokenizer) -> sentencepiece_proto.Settings:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return sentencepiece_proto.settings(tokenizer.model)
    return sentencepiece_proto.Settings(
        byte_fallback=True, dummy_prefix=False, one_space=False, escape_whitespace=False
    )


def _scored(tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """Return (name, score) of every id."""
    vocabulary = tokenizer.vocabulary
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = [piece for piece in sentencepiece_proto.pieces(tokenizer.model) if piece.holds_text]
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


def _post_processor(architecture: Architecture) -> dict[str, Any]:
    """Return a template: EOS after a text that an encoder reads, as T5's tokenizers have it; for a decoder, which goes
    on with the text, nothing after it and in front the token that its rows begin with, which is pad."""
    one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    token, token_id = (PAD, PAD_ID) if architecture == "decoder" else (EOS, EOS_ID)
    added = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [added, one] if architecture == "decoder" else [one, added],
        "pair": [added, one, other] if architecture == "decoder" else [one, added, other, added],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
