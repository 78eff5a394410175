"""Tiny random models and their tokenizers, written by transformers as published directories."""

from __future__ import annotations

import functools
import io
import json
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from t5x_like.data.tokenizers import sentencepiece_proto

TOPICS = list(pydoc_data.topics.topics.values())[:40]
ODD = [
    "",
    " ",
    "   two  spaces,   three ",
    "\n\n\tdef f(x):\n\t\treturn x  # done\n",
    "Ünïcödé naïve café — “quotes” … 10 µm ½ ﬁ ﬀ № ² Ⅳ",
    "日本語のテキスト、全角　空白。ＡＢＣ１２３",
    "emoji 🙂👩‍👩‍👧 and e\u0301 combining, \u200bzero\u200dwidth\ufeff",
    "a line\u2028separator\x00\x01\x7f\x85 control\r\n",
    "bytes <0x0A> and <0xE2><0x82> in text, <0x> <unk_1> ▁ and ▁▁x",
    "العربية עברית ไทย हिन्दी Ελληνικά Русский 한국어 ქართული አማርኛ",
    "</s> and <s> <pad> <unk>[MASK] [CLS]x[SEP] <bos><eos> <|endoftext|>y <extra_id_0>",
    "     " * 40,
]
"""Texts of all scripts, with emoji, control characters and spelled special tokens."""

_SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


_BPE: dict[str, Any] = {
    "model_type": "bpe", "vocab_size": 700, "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}  # fmt: skip
_LAYOUTS: dict[str, dict[str, Any]] = {
    "llama": {**_BPE, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
    "gemma": {
        **_BPE, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "eos_piece": "<eos>", "bos_piece": "<bos>",
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<mask>", "<start_of_turn>", "\n\n", "\n\n\n", "▁▁", "▁▁▁▁"],
    },
    "t5": {"vocab_size": 500, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "deberta": {
        "vocab_size": 500, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3,
        **{f"{name}_piece": piece for name, piece in zip(
            ("pad", "bos", "eos", "unk"), ("[PAD]", "[CLS]", "[SEP]", "[UNK]"), strict=True)},
    },
}  # fmt: skip
_FILES = {
    "llama": ("tokenizer.model", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
    "gemma": ("tokenizer.model", {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}),
    "t5": ("spiece.model", {"tokenizer_class": "T5Tokenizer"}),
    "deberta": ("spm.model", {"tokenizer_class": "DebertaV2Tokenizer"}),
}


@functools.cache
def sentencepiece_model(layout: str) -> bytes:
    """Return a SentencePiece model with the special pieces of a published one."""
    out = io.BytesIO()
    lines = [line for topic in TOPICS for line in topic.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, minloglevel=2, **_LAYOUTS[layout]
    )
    return out.getvalue()


def write_sentencepiece(folder: Path, layout: str) -> None:
    """Write the files that a model was published with, without tokenizer.json."""
    name, config = _FILES[layout]
    (folder / name).write_bytes(sentencepiece_model(layout))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if not (folder / "config.json").exists():
        kind = {"deberta": "deberta-v2"}.get(layout, layout)
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))


def sentencepiece_reference(folder: Path) -> Any:
    """Return the tokenizer of transformers for such files, with the normalization of the model itself.

    transformers 5 leaves it out for mBART and replaces it by NFC for DeBERTa, whose models were trained with it.
    """
    # AutoTokenizer reads umT5 from tokenizer.json only.
    config = json.loads((folder / "tokenizer_config.json").read_text())
    reference = getattr(transformers, config["tokenizer_class"]).from_pretrained(folder)
    kinds = {"MBartTokenizer": "sentencepiece.bpe.model", "DebertaV2Tokenizer": "spm.model"}
    if type(reference).__name__ in kinds:
        model = (folder / kinds[type(reference).__name__]).read_bytes()
        charsmap = normalizers.Precompiled(sentencepiece_proto.settings(model).charsmap)
        one_space = normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
        parts = [charsmap, one_space, normalizers.Strip()]
        own = type(reference).__name__ == "MBartTokenizer"
        reference.backend_tokenizer.normalizer = charsmap if own else normalizers.Sequence(parts)
    return reference


def byte_level_bpe(**special: str) -> Any:
    """Return a tokenizer of transformers: byte-level BPE with these special tokens after its pieces."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    library.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(TOPICS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    library.add_special_tokens(list(dict.fromkeys(special.values())))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=library, **special)


def save_bpe(folder: Path, names: Sequence[str]) -> None:
    """Write vocab.json, with special tokens as its last pieces, and merges.txt: all that GPT-2 was published with."""
    byte_level_bpe(eos_token="</s>").backend_tokenizer.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab |= {name: len(vocab) + index for index, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocab))


def unigram(**special: str) -> Any:
    """Return a tokenizer of transformers: T5's kind, with pad 0, EOS 1, unk 2."""
    library = tokenizers.Tokenizer(models.Unigram())
    library.normalizer = normalizers.NFKC()  # type: ignore[assignment]
    library.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    library.decoder = decoders.Metaspace()  # type: ignore[assignment]
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(TOPICS, trainer)
    library.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=library, **special)


def write_model(folder: Path, kind: str) -> Any:
    """Write a model of one of `KINDS` with its tokenizer, and return the tokenizer of transformers."""
    config, tokenizer = KINDS[kind]()
    architecture = getattr(transformers, config.architectures[0])
    architecture(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def _gpt2() -> tuple[Any, Any]:
    tokenizer = byte_level_bpe(bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    end = tokenizer.eos_token_id
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=end, eos_token_id=end,
        architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    return config, tokenizer


def _llama() -> tuple[Any, Any]:
    tokenizer = byte_level_bpe(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    config = transformers.LlamaConfig(
        **_SMALL, vocab_size=len(tokenizer), num_key_value_heads=1, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return config, tokenizer


def _bert_names() -> dict[str, str]:
    return {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}


def _modernbert() -> tuple[Any, Any]:
    tokenizer = byte_level_bpe(**_bert_names())
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    config = transformers.ModernBertConfig(
        **_SMALL, vocab_size=len(tokenizer), local_attention=8, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=start, cls_token_id=start, eos_token_id=end, sep_token_id=end,
        architectures=["ModernBertForMaskedLM"],
    )  # fmt: skip
    return config, tokenizer


def _deberta() -> tuple[Any, Any]:
    tokenizer = byte_level_bpe(**_bert_names())
    config = transformers.DebertaV2Config(
        **_SMALL, vocab_size=len(tokenizer), relative_attention=True, position_buckets=8, max_position_embeddings=64,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        type_vocab_size=0, pad_token_id=tokenizer.pad_token_id, architectures=["DebertaV2ForMaskedLM"],
    )  # fmt: skip
    return config, tokenizer


def _t5(kind: str = "T5") -> tuple[Any, Any]:
    tokenizer = unigram(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, architectures=[f"{kind}ForConditionalGeneration"],
    )  # fmt: skip
    return config, tokenizer


def _t5gemma() -> tuple[Any, Any]:
    tokenizer = byte_level_bpe(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")
    module = transformers.models.t5gemma.configuration_t5gemma.T5GemmaModuleConfig
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    fields = {**_SMALL, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer), "sliding_window": 8}
    config = transformers.T5GemmaConfig(
        encoder=module(**fields, **ids), decoder=module(**fields, **ids), vocab_size=len(tokenizer), **ids,
        decoder_start_token_id=tokenizer.bos_token_id, architectures=["T5GemmaForConditionalGeneration"],
    )  # fmt: skip
    return config, tokenizer


KINDS = {
    "gpt2": _gpt2,
    "llama": _llama,
    "modernbert": _modernbert,
    "deberta": _deberta,
    "t5": _t5,
    "umt5": lambda: _t5("UMT5"),
    "t5gemma": _t5gemma,
}
