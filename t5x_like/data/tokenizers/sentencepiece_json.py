"""tokenizer.json of SentencePiece models: of published ones that keep the ids of the file (T5, Llama, Gemma, DeBERTa),
and the parts that follow from the settings of any model."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from t5x_like.data.tokenizers import sentencepiece_proto
from t5x_like.data.tokenizers.sentencepiece_proto import Piece, Settings
from t5x_like.data.tokenizers.tokenizer import EXTRA_ID

Part = dict[str, Any]
"""Object of a tokenizer.json."""

PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
"""Fields of a special token that is found wherever a text spells it."""
_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2
_T5, _LLAMA, _DEBERTA = "T5Tokenizer", "LlamaTokenizer", "DebertaV2Tokenizer"
_CLASSES = {
    _T5: _T5, "MT5Tokenizer": _T5, _LLAMA: _LLAMA, "CodeLlamaTokenizer": _LLAMA, "GemmaTokenizer": _LLAMA,
    _DEBERTA: _DEBERTA,
}  # fmt: skip
"""Classes of transformers whose ids are those of the file, and the class with the same special tokens."""
_CLASS_OF_FILE = {"spiece.model": _T5, "tokenizer.model": _LLAMA, "spm.model": _DEBERTA}
CLASSES_OF_ANY = ("None", "PreTrainedTokenizer", "TokenizersBackend")
"""Values of `tokenizer_class` that do not name a layout; the name of the file does."""
_DEBERTA_TOKENS = {
    "bos_token": "[CLS]", "cls_token": "[CLS]", "eos_token": "[SEP]", "sep_token": "[SEP]", "unk_token": "[UNK]",
    "pad_token": "[PAD]", "mask_token": "[MASK]",
}  # fmt: skip
_EXTRA_IDS = 100
"""Sentinels that T5's class adds to a file without them, if `extra_ids` does not say otherwise."""
_EXPRESSED = ("add_bos_token", "add_eos_token", "add_prefix_space", "extra_ids", "legacy", "sp_model_kwargs")
"""Fields of tokenizer_config.json that tokenizer.json expresses."""


def published_json(model: bytes, name: str, config: Part, added: dict[str, int]) -> tuple[Part, Part]:
    """Return tokenizer.json and tokenizer_config.json of a published SentencePiece model.

    Texts are normalized by the model's own table, as SentencePiece does. transformers 5 replaces DeBERTa's by NFC.

    Args:
      model: Contents of the file.
      name: Name of the file, which says the class if the configuration does not.
      config: tokenizer_config.json; its `tokenizer_class` decides which special tokens are put around a text.
      added: added_tokens.json: ids of tokens that are not in the file.

    Raises:
      ValueError: the class is not known, or the file is not one of this class.
    """
    kind = _class_of(name, config)
    pieces, settings = sentencepiece_proto.pieces(model), sentencepiece_proto.settings(model)
    if settings.kind not in (_UNIGRAM, _BPE) or settings.whitespace_as_suffix or not settings.escape_whitespace:
        raise ValueError("a SentencePiece model that is neither unigram nor BPE, or does not put U+2581 before words")
    full = (_DEBERTA_TOKENS if kind == _DEBERTA else _special_pieces(model)) | config
    ids = {piece.piece: index for index, piece in enumerate(pieces)}
    entries: list[Part] = [
        {"id": index, "content": piece.piece, **PLAIN_TOKEN, "special": not piece.is_user_defined}
        for index, piece in enumerate(pieces)
        if not piece.holds_text or piece.is_user_defined
    ]
    entries += _added_tokens(kind, full, ids, added)
    ids |= {entry["content"]: entry["id"] for entry in entries}
    is_bpe = settings.kind == _BPE
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": entries,
        # Spaces are the pre-tokenizer's matter.
        "normalizer": normalizer(dataclasses.replace(settings, dummy_prefix=False, escape_whitespace=False)),
        "pre_tokenizer": _spaces(settings, config),
        "post_processor": _template(kind, full, ids),
        "decoder": decoder(settings),
        "model": _bpe(pieces, settings, full) if is_bpe else _unigram(pieces, settings),
    }, {field: value for field, value in full.items() if field not in _EXPRESSED}


def _class_of(name: str, config: Part) -> str:
    stated = str(config.get("tokenizer_class")).removesuffix("Fast")
    kind = _CLASS_OF_FILE[name] if stated in CLASSES_OF_ANY else _CLASSES.get(stated)
    if kind is None:
        raise ValueError(
            f"{name} with tokenizer_class {stated!r}: the ids of {', '.join(_CLASSES)} are known, save others with "
            "tokenizer.json"
        )
    return kind


def _special_pieces(model: bytes) -> Part:
    """Return the fields of tokenizer_config.json for the pieces that the model itself names."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    roles = {
        "pad_token": processor.pad_id(),
        "eos_token": processor.eos_id(),
        "bos_token": processor.bos_id(),
        "unk_token": processor.unk_id(),
    }
    found = {field: processor.id_to_piece(token) for field, token in roles.items() if token >= 0}
    has_mask = processor.id_to_piece(processor.piece_to_id("<mask>")) == "<mask>"
    return found | ({"mask_token": "<mask>"} if has_mask else {})


def _added_tokens(kind: str, config: Part, ids: dict[str, int], added: dict[str, int]) -> list[Part]:
    """Return the special tokens after the pieces.

    Raises:
      ValueError: their ids do not follow those of the pieces, or a special token has no id.
    """
    listed = {int(token): {**PLAIN_TOKEN, **entry} for token, entry in config.get("added_tokens_decoder", {}).items()}
    listed |= {token: {**PLAIN_TOKEN, "content": name} for name, token in added.items() if token not in listed}
    entries = [entry | {"id": token} for token, entry in sorted(listed.items()) if token >= len(ids)]
    names = {*ids, *(entry["content"] for entry in entries)}
    more: list[str] = []
    if kind == _T5 and not any(EXTRA_ID.fullmatch(name) for name in names):
        more = [f"<extra_id_{index}>" for index in reversed(range(config.get("extra_ids", _EXTRA_IDS)))]
    if kind == _DEBERTA and "[MASK]" not in names:
        more = ["[MASK]"]
    following = len(ids) + len(entries)
    entries += [{"id": following + index, "content": name, **PLAIN_TOKEN} for index, name in enumerate(more)]
    if [entry["id"] for entry in entries] != [*range(len(ids), len(ids) + len(entries))]:
        raise ValueError(f"added tokens whose ids do not follow the {len(ids)} pieces of the file")
    names |= set(more)
    stated = {field: _content(config[field]) for field in _DEBERTA_TOKENS if config.get(field) is not None}
    missing = [f"{field} {name!r}" for field, name in stated.items() if name not in names]
    if missing:
        raise ValueError(f"no piece for {', '.join(missing)}")
    return entries


def _content(token: str | Part) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _template(kind: str, config: Part, ids: dict[str, int]) -> Part:
    """Return the template of the special tokens that the class puts around a text."""
    has_bos = kind == _DEBERTA or (kind == _LLAMA and config.get("add_bos_token", True) and "bos_token" in config)
    has_eos = kind != _LLAMA or config.get("add_eos_token", False)
    first = [_content(config["bos_token"])] if has_bos else []
    last = [_content(config["eos_token"])] if has_eos else []
    # The second text of a pair begins with BOS as well, except after [SEP] of an encoder.
    between = [] if kind == _DEBERTA else first
    return {
        "type": "TemplateProcessing",
        "single": [*_special(first, 0), _sequence_of("A", 0), *_special(last, 0)],
        "pair": [
            *(*_special(first, 0), _sequence_of("A", 0), *_special(last, 0)),
            *(*_special(between, 1), _sequence_of("B", 1), *_special(last, 1)),
        ],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in {*first, *last}},
    }


def _special(names: Iterable[str], type_id: int) -> list[Part]:
    return [{"SpecialToken": {"id": name, "type_id": type_id}} for name in names]


def _sequence_of(name: str, type_id: int) -> Part:
    return {"Sequence": {"id": name, "type_id": type_id}}


def _spaces(settings: Settings, config: Part) -> Part:
    """Return the pre-tokenizer that writes spaces as U+2581 and puts one in front of a text, as in transformers: words
    of a unigram model are encoded one by one, and BPE does it at the beginning of a text only."""
    is_bpe = settings.kind == _BPE
    scheme = "first" if is_bpe and not config.get("legacy") else "always"
    if not settings.dummy_prefix or config.get("add_prefix_space") is False:
        scheme = "never"
    spaces = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": not is_bpe}
    before = None if is_bpe else pre_tokenizer(settings)
    return spaces if before is None else {"type": "Sequence", "pretokenizers": [spaces, before]}


def _bpe(pieces: Sequence[Piece], settings: Settings, config: Part) -> Part:
    vocab = {piece.piece: index for index, piece in enumerate(pieces)}
    return {
        "type": "BPE",
        "unk_token": config.get("unk_token") and _content(config["unk_token"]),
        "fuse_unk": True,
        "byte_fallback": settings.byte_fallback,
        "vocab": vocab,
        "merges": list(_merges(vocab)),
    }


def _merges(vocab: dict[str, int]) -> Iterator[list[str]]:
    """Yield the pairs of pieces that make up a piece, in the order of the ids, which is that of the scores."""
    for piece in vocab:
        for cut in range(1, len(piece)):
            if piece[:cut] in vocab and piece[cut:] in vocab:
                yield [piece[:cut], piece[cut:]]


def _unigram(pieces: Sequence[Piece], settings: Settings) -> Part:
    return {
        "type": "Unigram",
        "unk_id": next(index for index, piece in enumerate(pieces) if piece.is_unknown),
        "vocab": [[piece.piece, piece.score] for piece in pieces],
        "byte_fallback": settings.byte_fallback,
    }


def _replace(pattern: dict[str, str], content: str) -> Part:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _sequence(kind: str, parts: list[Part]) -> Part | None:
    return {"type": "Sequence", kind: parts} if parts else None


def normalizer(settings: Settings) -> Part | None:
    """Return the normalization of a SentencePiece model, with its space in front of a text."""
    parts: list[Part] = []
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


def pre_tokenizer(settings: Settings) -> Part | None:
    """Return a split after the first character of text that spells a byte's piece, which would become that byte."""
    if not settings.byte_fallback:
        return None
    pattern = {"Regex": "<(?=0x[0-9A-F]{2}>)"}
    return {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}


def decoder(settings: Settings) -> Part | None:
    """Return the decoder: pieces and bytes are put together, without the space in front of a text."""
    parts = [_replace({"String": _SPACE}, " ")] if settings.escape_whitespace else []
    if settings.byte_fallback:
        parts += [{"type": "ByteFallback"}]
    parts.append({"type": "Fuse"})
    if settings.dummy_prefix:
        parts.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _sequence("decoders", parts)
