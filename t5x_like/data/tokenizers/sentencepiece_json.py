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
from t5x_like.data.tokenizers.vocabulary import MAX_TOKENS

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
"""Classes of transformers that take the ids of the file unchanged, with the class that has the same special tokens."""
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
_REFUSED = {_DEBERTA: ("do_lower_case", "split_by_punct")}
"""Fields of tokenizer_config.json that change the text of a class, and for which there is no conversion."""


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
    refused = [field for field in _REFUSED.get(kind, ()) if config.get(field)]
    if refused:
        raise ValueError(f"{kind} with {' and '.join(refused)}: save it with tokenizer.json")
    if kind == _LLAMA and config.get("add_prefix_space") is False:
        settings = dataclasses.replace(settings, dummy_prefix=False)
    full = (_DEBERTA_TOKENS if kind == _DEBERTA else _special_pieces(model)) | config
    ids = {piece.piece: index for index, piece in enumerate(pieces)}
    entries = _added_tokens(kind, full, pieces, added)
    ids |= {entry["content"]: entry["id"] for entry in entries}
    is_bpe = settings.kind == _BPE
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": entries,
        # Spaces are the pre-tokenizer's matter.
        "normalizer": normalizer(dataclasses.replace(settings, dummy_prefix=False, escape_whitespace=False)),
        "pre_tokenizer": _spaces(kind, settings, config),
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


def _added_tokens(kind: str, config: Part, pieces: Sequence[Piece], added: dict[str, int]) -> list[Part]:
    """Return the tokens that are found wherever a text spells them: special and user-defined pieces, then the tokens
    after the pieces.

    Raises:
      ValueError: tokens are listed that are not those of the pieces and do not follow them, or a special token has no
        id.
    """
    entries: dict[int, Part] = {
        index: {**PLAIN_TOKEN, "content": piece.piece, "special": not piece.is_user_defined}
        for index, piece in enumerate(pieces)
        if not piece.holds_text or piece.is_user_defined
    }
    listed = listed_tokens(config, added, PLAIN_TOKEN)
    for token, entry in listed.items():
        if 0 <= token < len(pieces) and entry["content"] != pieces[token].piece:
            raise ValueError(f"the added token {entry['content']!r} has the id of the piece {pieces[token].piece!r}")
    entries |= listed
    names = {*(piece.piece for piece in pieces), *(entry["content"] for entry in entries.values())}
    more: list[str] = []
    if kind == _T5 and not any(EXTRA_ID.fullmatch(name) for name in names):
        more = [f"<extra_id_{index}>" for index in reversed(range(_extra_ids(config)))]
    if kind == _DEBERTA and "[MASK]" not in names:
        more = ["[MASK]"]
    following = max(len(pieces), *(token + 1 for token in entries))
    entries |= {following + index: {**PLAIN_TOKEN, "content": name} for index, name in enumerate(more)}
    after = sorted(token for token in entries if not 0 <= token < len(pieces))
    if after != [*range(len(pieces), len(pieces) + len(after))]:
        raise ValueError(f"added tokens whose ids do not follow the {len(pieces)} pieces of the file")
    names |= set(more)
    stated = {field: _content(config[field]) for field in _DEBERTA_TOKENS if config.get(field) is not None}
    missing = [f"{field} {name!r}" for field, name in stated.items() if name not in names]
    if missing:
        raise ValueError(f"no piece for {', '.join(missing)}")
    return [{**entry, "id": token} for token, entry in sorted(entries.items())]


def listed_tokens(config: Part, added: dict[str, int], plain: Part) -> dict[int, Part]:
    """Return the tokens that the files beside a vocabulary list, by id.

    Args:
      config: tokenizer_config.json, whose `added_tokens_decoder` gives tokens with their fields.
      added: added_tokens.json, which gives ids.
      plain: Fields that are not given.

    Raises:
      ValueError: `added_tokens_decoder` is not an object.
    """
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, dict | None):
        raise ValueError(f"added_tokens_decoder: found a {type(decoder).__name__}, expected an object")
    listed = {int(token): {**plain, **entry} for token, entry in (decoder or {}).items()}
    return listed | {token: {**plain, "content": name} for name, token in added.items() if token not in listed}


def _extra_ids(config: Part) -> int:
    """Return the number of sentinels that T5's class adds.

    Raises:
      ValueError: it is not a number of tokens.
    """
    count = config.get("extra_ids", _EXTRA_IDS)
    if not isinstance(count, int) or not 0 <= count <= MAX_TOKENS:
        raise ValueError(f"extra_ids: found {count!r}, expected a number from 0 to {MAX_TOKENS}")
    return count


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


def _spaces(kind: str, settings: Settings, config: Part) -> Part:
    """Return the pre-tokenizer that writes spaces as U+2581 and puts one in front of a text, as in transformers: words
    of a unigram model are encoded one by one, and BPE does it at the beginning of a text only, as does DeBERTa without
    `add_prefix_space`."""
    is_bpe = settings.kind == _BPE
    at_beginning = not config.get("legacy") if is_bpe else kind == _DEBERTA and config.get("add_prefix_space") is False
    scheme = "first" if at_beginning else "always"
    if not settings.dummy_prefix:
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
