"""Tokenizer files of published models: which file of a directory holds the tokenizer, read to one form."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from t5x_like.data.tokenizers import fairseq_layouts, sentencepiece_json, sentencepiece_proto
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.data.tokenizers.tokenizer import Tokenizer
from t5x_like.data.tokenizers.vocabulary import require_id
from t5x_like.errors import DataError
from t5x_like.utils.json_reader import parse_json, read_json
from t5x_like.utils.links import require_links_inside

JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model", "spm.model")
WORDPIECE_FILE = "vocab.txt"
BPE_FILES = ("vocab.json", "merges.txt")
_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_ADDED_TOKENS = "added_tokens.json"
_KEPT = ("chat_template.jinja", "generation_config.json")
_BYTE_CLASS = "ByT5Tokenizer"
_BYTE_LEVEL_CLASSES = {
    "GPT2Tokenizer": False,
    "RobertaTokenizer": True,
    "BartTokenizer": True,
    "LongformerTokenizer": True,
    "LEDTokenizer": True,
}
"""Classes of transformers for vocab.json and merges.txt, and whether they put special tokens around a text."""
_SPECIAL_FIELDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Fields of tokenizer_config.json for special tokens, in the order in which transformers gives new ones their ids."""
_PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
"""Fields of an added token of vocab.json that is not named as a special one."""
_OFFSET_FILE = "sentencepiece.bpe.model"
"""SentencePiece model of XLM-R, mBART and CamemBERT, whose ids are not those of the file."""


def has_tokenizer(folder: Path) -> bool:
    """Return whether the folder has the tokenizer of a published model."""
    names = (JSON_FILE, *SENTENCEPIECE_FILES, WORDPIECE_FILE, BPE_FILES[0], _OFFSET_FILE)
    return any((folder / name).is_file() for name in names) or _is_byt5(folder)


def load_published(path: Path, num_sentinels: int) -> Tokenizer:
    """Load the tokenizer of a published model, with the ids that transformers gives.

    Args:
      path: Directory of the model, or one of its tokenizer files.
      num_sentinels: Sentinels of a tokenizer that has none of its own.

    Raises:
      DataError: there is no tokenizer that can be read.
      ConfigError: the tokenizer has sentinels, but fewer.
      SafetyError: one of the files is a symbolic link to a place outside the directory.
    """
    folder = path if path.is_dir() else path.parent
    # The files become a part of stores, runs and exports.
    read = (JSON_FILE, *SENTENCEPIECE_FILES, WORDPIECE_FILE, *BPE_FILES, _OFFSET_FILE)
    require_links_inside(folder, (*read, _CONFIG, _SPECIAL_TOKENS, _ADDED_TOKENS, *_KEPT))
    names = [path.name] if path.is_file() else [JSON_FILE, *SENTENCEPIECE_FILES, WORDPIECE_FILE, BPE_FILES[0]]
    name = next((name for name in names if (folder / name).is_file()), None)
    try:
        if name is None and _is_byt5(folder):
            return ByteTokenizer.published()
        # The package is imported on use: other tokenizers do not need it.
        from t5x_like.data.tokenizers.huggingface import HuggingFaceTokenizer, library_errors_as

        with library_errors_as(lambda reason: ValueError(reason)):
            model = _wrapped(folder, name)
        return HuggingFaceTokenizer(model, num_sentinels, str(folder / str(name)))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: found no tokenizer ({error}), expected that of a published model") from None


def _wrapped(folder: Path, name: str | None) -> bytes:
    """Return the contents of `HuggingFaceTokenizer.model` from the files of a folder."""
    config = _json(folder / _SPECIAL_TOKENS) | _json(folder / _CONFIG)
    binary = {}
    if name == JSON_FILE:
        contents = parse_json((folder / JSON_FILE).read_bytes())
    elif name in SENTENCEPIECE_FILES:
        model = (folder / name).read_bytes()
        contents, config = sentencepiece_json.published_json(model, name, config, _json(folder / _ADDED_TOKENS))
        binary = {name: base64.b64encode(model).decode()}
    elif name == WORDPIECE_FILE:
        contents = _wordpiece(folder / WORDPIECE_FILE, config)
        config = {"pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]", "unk_token": "[UNK]"} | config
        config = {"mask_token": "[MASK]"} | config
    elif name in BPE_FILES:
        contents = _byte_level_bpe(folder, config)
    elif (folder / _OFFSET_FILE).is_file():
        contents = fairseq_layouts.tokenizer_json((folder / _OFFSET_FILE).read_bytes(), config)
        config = fairseq_layouts.SPECIAL_TOKENS | config
    else:
        expected = ", ".join((JSON_FILE, *SENTENCEPIECE_FILES, WORDPIECE_FILE, " and ".join(BPE_FILES)))
        raise ValueError(f"none of {expected}")
    files = {kept: (folder / kept).read_text(encoding="utf-8") for kept in _KEPT if (folder / kept).is_file()}
    document = {"tokenizer": contents, "config": config, "files": files, "binary_files": binary}
    return json.dumps(document, ensure_ascii=False).encode()


def _wordpiece(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json of a BERT's vocab.txt, as transformers makes it."""
    from tokenizers import BertWordPieceTokenizer, models, processors

    vocab = models.WordPiece.read_file(str(path))
    tokenizer = BertWordPieceTokenizer(
        vocab,
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    pairs = [(name, vocab[name]) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*pairs)
    special = [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name in vocab]
    tokenizer.add_special_tokens(special)
    result: dict[str, Any] = json.loads(tokenizer.to_str())
    return result


def _byte_level_bpe(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json of vocab.json and merges.txt, as transformers makes it for GPT-2 and RoBERTa."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    from t5x_like.data.tokenizers.huggingface import with_usual_tokens

    vocab, merges = (str(folder / name) for name in BPE_FILES)
    tokenizer = Tokenizer(models.BPE.from_file(vocab, merges))
    listed = sentencepiece_json.listed_tokens(config, _json(folder / _ADDED_TOKENS), _PLAIN_TOKEN)
    # The library writes a tokenizer.json by going through all ids.
    require_id(max(*tokenizer.get_vocab().values(), *listed, 0))
    for token, entry in sorted(listed.items()):
        tokenizer.add_tokens([AddedToken(**entry)])
        if (free := tokenizer.token_to_id(entry["content"])) != token:
            raise ValueError(
                f"added tokens whose ids do not follow vocab.json: {entry['content']!r} has {token}, expected {free}"
            )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space", False))
    tokenizer.decoder = decoders.ByteLevel()
    config = with_usual_tokens(config, lambda name: tokenizer.token_to_id(name) is not None)
    values = {field: config[field] for field in _SPECIAL_FIELDS if config.get(field)}
    names = {field: value["content"] if isinstance(value, dict) else value for field, value in values.items()}
    start, end = names.get("cls_token", names.get("bos_token")), names.get("sep_token", names.get("eos_token"))
    mask = names.get("mask_token")
    stated = str(config.get("tokenizer_class")).removesuffix("Fast")
    is_roberta = _BYTE_LEVEL_CLASSES.get(stated)
    if stated in sentencepiece_json.CLASSES_OF_ANY:
        is_roberta = mask is not None and start is not None and end is not None
    if is_roberta is None:
        raise ValueError(
            f"{BPE_FILES[0]} with tokenizer_class {stated!r}: the ids of {', '.join(_BYTE_LEVEL_CLASSES)} are known, "
            f"save others with {JSON_FILE}"
        )
    # The mask token of RoBERTa includes the space in front of it.
    added = [
        AddedToken(name, special=True, lstrip=is_roberta and name == mask) for name in dict.fromkeys(names.values())
    ]
    tokenizer.add_special_tokens(added)
    if is_roberta:
        if start is None or end is None:
            raise ValueError(f"no bos_token or no eos_token, which {stated} puts around a text")
        ids: Any = tokenizer.get_vocab(with_added_tokens=True)
        tokenizer.post_processor = processors.RobertaProcessing((end, ids[end]), (start, ids[start]))
    result: dict[str, Any] = json.loads(tokenizer.to_str())
    return result


def _is_byt5(folder: Path) -> bool:
    return _json(folder / _CONFIG).get("tokenizer_class") == _BYTE_CLASS


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{path.name}: a JSON {type(found).__name__}")
    return found


def has_t5_layout(path: Path) -> bool:
    """Return whether the ids of a SentencePiece model are pad 0, EOS 1, unk 2 and then text, as in T5's."""
    try:
        names = [piece.piece for piece in sentencepiece_proto.pieces(path.read_bytes())[:3]]
    except (OSError, ValueError):
        return False
    return names == ["<pad>", "</s>", "<unk>"]
