"""Tokenizers of published models have the ids that transformers gives, in both directions."""

from __future__ import annotations

import functools
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers", reason="tokenizers of transformers need the hf extra")

from helpers.published_models import (  # noqa: E402
    KINDS,
    ODD,
    TOPICS,
    save_bpe,
    sentencepiece_model,
    sentencepiece_reference,
    unigram,
    write_model,
    write_sentencepiece,
)

from t5x_like.cli.main import main  # noqa: E402
from t5x_like.config.tokenizer import TRAINED_KINDS, TokenizerConfig  # noqa: E402
from t5x_like.config.validation import validate  # noqa: E402
from t5x_like.data.tokenizers.loading import keep_tokenizer, kept_tokenizer, load_tokenizer  # noqa: E402
from t5x_like.data.tokenizers.published import load_published  # noqa: E402
from t5x_like.data.tokenizers.tokenizer import Tokenizer, have_same_pieces  # noqa: E402
from t5x_like.data.tokenizers.train_vocabulary import train_vocabulary  # noqa: E402
from t5x_like.data.tokenizers.vocabulary import Vocabulary  # noqa: E402
from t5x_like.errors import ConfigError, DataError  # noqa: E402
from t5x_like.interop.huggingface.continued_run import continued_run  # noqa: E402
from t5x_like.interop.huggingface.tokenizer_export import write_tokenizer  # noqa: E402

pytestmark = pytest.mark.hf
TEXTS = [*ODD, *TOPICS[::8]]


def published(layout: str) -> Any:
    """Return a function that writes the SentencePiece model that a family was published with."""

    def write(folder: Path) -> Any:
        write_sentencepiece(folder, layout)
        return sentencepiece_reference(folder)

    write.__name__ = f"write_{layout}"
    return write


write_llama = published("llama")


def fairseq(kind: str, model_type: str) -> Any:
    """Return a function that writes sentencepiece.bpe.model as fairseq's models were published with: a unigram model
    with NFKC, whose ids follow from the class of the tokenizer."""

    def write(folder: Path) -> Any:
        (folder / "sentencepiece.bpe.model").write_bytes(fairseq_model())
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        return sentencepiece_reference(folder)

    write.__name__ = f"write_{kind}"
    return write


@functools.cache
def fairseq_model() -> bytes:
    out = io.BytesIO()
    lines = [line for topic in TOPICS for line in topic.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=500, model_type="unigram", minloglevel=2
    )
    return out.getvalue()


def write_llama_json(folder: Path) -> Any:
    (folder / "source").mkdir()
    write_llama(folder / "source").save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def write_bert(folder: Path) -> Any:
    words = sorted({word for topic in TOPICS for word in topic.lower().split() if word.isalpha()})[:400]
    letters = [prefix + chr(code) for prefix in ("", "##") for code in range(97, 123)]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *"0123456789.,:;-_()日本", *words]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(names)) + "\n", encoding="utf-8")
    return transformers.BertTokenizer(str(folder / "vocab.txt"))


def write_gpt2(folder: Path) -> Any:
    save_bpe(folder, ["<|endoftext|>"])
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    return transformers.GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def write_gpt2_json(folder: Path) -> Any:
    reference = write_gpt2(folder)
    (folder / "tokenizer.json").write_text(reference.backend_tokenizer.to_str(), encoding="utf-8")
    return reference


def write_roberta(folder: Path) -> Any:
    save_bpe(folder, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    mask = tokenizers.AddedToken("<mask>", lstrip=True, special=True)
    return transformers.RobertaTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), mask_token=mask)


def write_t5_json(folder: Path) -> Any:
    unigram(pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


FAIRSEQ = [
    fairseq("XLMRobertaTokenizer", "xlm-roberta"),
    fairseq("CamembertTokenizer", "camembert"),
    fairseq("MBartTokenizer", "mbart"),
    fairseq("MBart50Tokenizer", "mbart"),
]
SENTENCEPIECE = [write_llama, *map(published, ("gemma", "t5", "deberta"))]
WRITERS = [
    *SENTENCEPIECE,
    *FAIRSEQ,
    write_llama_json,
    write_bert,
    write_gpt2,
    write_gpt2_json,
    write_roberta,
    write_t5_json,
]


@pytest.fixture(scope="module", params=WRITERS, ids=lambda writer: writer.__name__)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer, Any]:
    folder = tmp_path_factory.mktemp("published")
    reference = request.param(folder)
    return folder, load_published(folder, 0), reference


def test_ids_and_texts_equal_those_of_transformers(case: tuple[Path, Tokenizer, Any]) -> None:
    _, tokenizer, reference = case
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == reference(text, add_special_tokens=False)["input_ids"], text
    assert tokenizer.eos_id == (reference.sep_token_id if reference.eos_token_id is None else reference.eos_token_id)
    vocabulary = tokenizer.vocabulary
    assert vocabulary.pad_id == (tokenizer.eos_id if reference.pad_token_id is None else reference.pad_token_id)
    assert vocabulary.own_mask_id == reference.mask_token_id
    for text in ["def f(x):\n    return x\n", "The function returns a list.", "naive cafe"]:
        ids = tokenizer.encode(text)
        decoded = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids) == decoded
        assert "".join(tokenizer.to_bytes(ids).decode().split()) == "".join(decoded.split())


def test_tokenizer_is_kept_and_exported_with_its_added_tokens(
    case: tuple[Path, Tokenizer, Any], tmp_path: Path
) -> None:
    folder, _, reference = case
    tokenizer = load_published(folder, 7)
    keep_tokenizer(tmp_path / "kept", tokenizer)
    kept = kept_tokenizer(tmp_path / "kept")
    assert kept is not None and kept.vocabulary == tokenizer.vocabulary and kept.fingerprint == tokenizer.fingerprint
    assert kept.encode(ODD[-2]) == tokenizer.encode(ODD[-2])
    if tokenizer.vocabulary.num_sentinels == 7:
        assert tokenizer.sentinel_id(6) == tokenizer.vocabulary.base_size
    assert tokenizer.encode_marked("a<extra_id_6>") == [*tokenizer.encode("a"), tokenizer.sentinel_id(6)]
    (tmp_path / "out").mkdir()
    assert write_tokenizer(tmp_path / "out", kept, "decoder") == []
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        if "<extra_id_0>" not in text:
            wanted = reference(text)["input_ids"]
            assert written(text)["input_ids"] == wanted, text
    assert written.convert_tokens_to_ids("<extra_id_6>") == tokenizer.sentinel_id(6)
    for name in ("spiece.model", "tokenizer.model", "spm.model"):
        if (folder / name).exists() and not (folder / "tokenizer.json").exists():
            assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    model = (tmp_path / "kept" / "model").read_bytes()
    (tmp_path / "kept" / "model").write_bytes(model[:-9])
    with pytest.raises(DataError, match="found"):
        kept_tokenizer(tmp_path / "kept")


def appended(model: bytes, names: list[str]) -> bytes:
    """Return a SentencePiece model with user-defined pieces at its end, as mT5's and umT5's were published with."""
    for name in names:
        fields = b"\n" + bytes([len(name.encode())]) + name.encode() + b"\x15" + bytes(4) + b"\x18\x04"
        model += b"\n" + bytes([len(fields)]) + fields
    return model


def test_bytes_and_sentinels_of_mt5_are_those_of_the_file(tmp_path: Path) -> None:
    out = io.BytesIO()
    lines = [line for topic in TOPICS for line in topic.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=700, byte_fallback=True, pad_id=0, eos_id=1,
        bos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    model = appended(out.getvalue(), [f"▁<extra_id_{index}>" for index in reversed(range(7))])
    (tmp_path / "spiece.model").write_bytes(model)
    tokenizer = load_published(tmp_path, 0)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in TEXTS:
        if text != ODD[-2]:
            assert tokenizer.encode(text) == reference.encode(text), text
    assert tokenizer.vocabulary == Vocabulary(700, 7, unk_id=3, start_id=2)
    assert tokenizer.byte_ids is not None and tokenizer.to_bytes(tokenizer.byte_ids) == bytes(range(256))
    assert tokenizer.encode_marked("a <extra_id_6>") == [*tokenizer.encode("a "), 700]
    # Sentinels in front of other pieces are tokens of text; no others can be added.
    (tmp_path / "spiece.model").write_bytes(appended(model, ["<hl>"]))
    assert load_published(tmp_path, 0).vocabulary == Vocabulary(708, 0, unk_id=3, start_id=2, has_modes=False)
    with pytest.raises(ConfigError, match="num_sentinels: found 5, expected 0, since the <extra_id_"):
        load_published(tmp_path, 5)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": {"tokenizer_class": "AlbertTokenizer"}}, "the ids of T5Tokenizer, .* are known"),
        ({"added_tokens.json": {"<new>": 701}}, "ids do not follow the 700 pieces"),
        ({"special_tokens_map.json": {"pad_token": "<none>"}}, "no piece for pad_token '<none>'"),
        ({"added_tokens.json": {"<new>": 2}}, "the added token '<new>' has the id of the piece '</s>'"),
        (
            {"tokenizer_config.json": {"tokenizer_class": "DebertaV2Tokenizer", "do_lower_case": True}},
            "DebertaV2Tokenizer with do_lower_case: save it with tokenizer.json",
        ),
    ],
)
def test_sentencepiece_files_that_do_not_fit_are_refused(
    files: dict[str, dict[str, Any]], message: str, tmp_path: Path
) -> None:
    write_sentencepiece(tmp_path, "llama")
    for name, contents in files.items():
        (tmp_path / name).write_text(json.dumps(contents))
    with pytest.raises(DataError, match=message):
        load_published(tmp_path, 0)


def test_added_tokens_of_a_sentencepiece_model_have_their_ids(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, "llama")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 700, "<|im_end|>": 701}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    tokenizer = load_published(tmp_path, 0)
    assert tokenizer.pad_id == 700 and tokenizer.encode("a<|im_end|>") == [*tokenizer.encode("a"), 701]


_STRIPPING = {"2": {"content": "</s>", "lstrip": True, "rstrip": True, "normalized": False, "special": True}}


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("llama", {"add_prefix_space": False}),
        ("llama", {"legacy": True}),
        ("llama", {"add_eos_token": True}),
        ("llama", {"added_tokens_decoder": _STRIPPING}),
        ("t5", {"add_prefix_space": False}),
        ("deberta", {"add_prefix_space": False}),
    ],
)
def test_fields_of_tokenizer_config_mean_what_they_mean_in_transformers(
    layout: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer, reference = configured(tmp_path, layout, fields)
    texts = ["a b", "a </s>  b", "the list[SEP]of it"]
    for text in texts:
        ids = reference(text)["input_ids"]
        assert tokenizer.encode_with_special_tokens([text], 99) == [ids], text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True), text


def configured(folder: Path, layout: str, fields: dict[str, Any]) -> tuple[Tokenizer, Any]:
    """Return the tokenizers of a SentencePiece model with fields of tokenizer_config.json: ours and transformers'."""
    write_sentencepiece(folder, layout)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | fields
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_published(folder, 0), sentencepiece_reference(folder)


def test_llama_begins_a_text_with_bos_by_default(tmp_path: Path) -> None:
    """transformers 5.23 documents the default True of `add_bos_token`, as in version 4, and adds no BOS without it."""
    _, reference = configured(tmp_path, "llama", {"add_bos_token": True})
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = load_published(tmp_path, 0)
    for text in TEXTS:
        assert tokenizer.encode_with_special_tokens([text], 9999) == [reference(text)["input_ids"]], text
    without, reference = configured(tmp_path, "llama", {"add_bos_token": False})
    ids = reference("a b")["input_ids"]
    assert without.encode_with_special_tokens(["a b"], 9) == [ids] and tokenizer.encode("a b") == ids


@pytest.mark.parametrize("layout", ["deberta", "t5"])
def test_texts_are_normalized_as_in_sentencepiece(layout: str, tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, layout)
    tokenizer = load_published(tmp_path, 0)
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(layout))
    for text in TEXTS:
        if text != ODD[-2]:
            assert tokenizer.encode(text) == reference.encode(text), text


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer"])
def test_class_of_vocab_json_says_what_is_put_around_a_text(kind: str, tmp_path: Path) -> None:
    save_bpe(tmp_path, ["<s>", "<pad>", "</s>", "<unk>"])
    # transformers numbers new special tokens in an order of its own.
    names = dict(bos="<s>", eos="</s>", pad="<pad>", unk="<unk>", cls="<s>", sep="<sep>", mask="<mask>")
    config = {f"{role}_token": name for role, name in names.items()} | {"tokenizer_class": kind}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, reference = load_published(tmp_path, 0), getattr(transformers, kind).from_pretrained(tmp_path)
    text = "a<mask> b</s><sep>"
    assert tokenizer.encode_with_special_tokens([text], 99) == [reference(text)["input_ids"]]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(DataError, match="vocab.json with tokenizer_class 'CLIPTokenizer': the ids of GPT2Tokenizer, "):
        load_published(tmp_path, 0)


_STRIPPED = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False, "special": False}


@pytest.mark.parametrize(
    ("added", "fields"),
    [
        ({"<|new|>": 501, "<|im_end|>": 502}, {}),
        ({"<|new|>": 502, "<|im_end|>": 501}, {"pad_token": "<|im_end|>"}),
        ({"<|new|>": 501, "<|im_end|>": 502}, {"pad_token": "<pad>"}),
        ({}, {"added_tokens_decoder": {"501": {"content": "<|new|>", **_STRIPPED}}}),
    ],
)
def test_added_tokens_of_vocab_json_have_their_ids(
    added: dict[str, int], fields: dict[str, Any], tmp_path: Path
) -> None:
    save_bpe(tmp_path, ["<|endoftext|>"])
    assert len(json.loads((tmp_path / "vocab.json").read_text())) == 501
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"} | fields))
    tokenizer, reference = load_published(tmp_path, 0), transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    text = "a <|new|> b <|im_end|>c"
    assert tokenizer.encode(text) == reference(text)["input_ids"]
    # transformers gives such a token the next free id, which is not the row of the model's table.
    (tmp_path / "added_tokens.json").write_text('{"<|other|>": 600}')
    with pytest.raises(DataError, match=r"do not follow vocab.json: '<\|other\|>' has 600, expected 50[12]"):
        load_published(tmp_path, 0)


@pytest.mark.parametrize("kind", TRAINED_KINDS[1:])
def test_trained_vocabularies_are_read_by_transformers(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(train_vocabulary(kind, TOPICS, 450))
    tokenizer = load_tokenizer(TokenizerConfig(kind=kind, path=str(path), num_sentinels=5), path)
    assert tokenizer.vocabulary == Vocabulary(450, 5)
    (tmp_path / "out").mkdir()
    assert write_tokenizer(tmp_path / "out", tokenizer, "decoder") == []
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ODD:
        if "<" not in text:
            assert tokenizer.encode(text) == reference(text, add_special_tokens=False)["input_ids"]
    with pytest.raises(DataError, match="which is what the corpus has pieces for"):
        train_vocabulary(kind, ["one small text"], 450)


def test_bytes_of_byt5_have_their_ids_and_sentinels(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}')
    tokenizer, reference = load_published(tmp_path, 0), transformers.ByT5Tokenizer()
    for text in ODD[:10]:
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode_marked("a<extra_id_0>b<extra_id_1>") == [100, 258, 101, 257]
    assert tokenizer.decode([100, 258, 101]) == "a<extra_id_0>b"


def test_directories_without_a_readable_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of tokenizer.json"):
        load_published(tmp_path, 0)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(sentencepiece_model("llama"))
    with pytest.raises(DataError, match="the ids of XLMRobertaTokenizer, .* are known"):
        load_published(tmp_path, 0)
    for broken in ("{}", "[]", '{"model": {}}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(DataError, match="found no tokenizer"):
            load_published(tmp_path, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_run_that_continues_a_model_has_its_ids(kind: str, tmp_path: Path) -> None:
    reference = write_model(tmp_path, kind)
    run = continued_run(tmp_path)
    assert validate(run) == []
    tokenizer = load_tokenizer(run.data.tokenizer, tmp_path)
    vocabulary, model = tokenizer.vocabulary, run.model
    assert model.vocab_size == max(len(reference), vocabulary.vocab_size)
    assert model.pad_token_id in (None, vocabulary.pad_id)
    if model.decoder is not None:
        assert (model.eos_ids, model.decoder_start_token_id) == ((vocabulary.eos_id,), vocabulary.start_id)
    sentinels = {"t5": 100, "umt5": 100, "t5gemma": 100}
    assert vocabulary.num_sentinels == sentinels.get(kind, 0)
    assert (model.vocab_size > len(reference)) == (kind in sentinels)
    if model.architecture == "encoder":
        assert vocabulary.mask_id == reference.mask_token_id
    assert have_same_pieces(tokenizer, load_published(tmp_path, 3))


def test_tokenizer_that_is_not_the_models_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "gpt2", "gpt2")
    rng = random.Random(0)
    (tmp_path / "text.txt").write_text(" ".join(rng.choices("one two three four five".split(), k=4000)))
    command = ["train", "--from", str(tmp_path / "gpt2"), "--workdir", str(tmp_path / "run")]
    command += ["--data.corpus.files", str(tmp_path / "*.txt"), "--data.store-dir", str(tmp_path / "stores")]
    command += ["--data.inputs-length", "8", "--data.targets-length", "8"]
    own = ["--data.tokenizer.kind", "bytes", "--data.tokenizer.path", "None"]
    assert main([*command, *own]) == 2
    error = capsys.readouterr().err
    assert "model.decoder_start_token_id: found" in error and "model.eos_ids" in error
    own += ["--model.decoder-start-token-id", "0", "--model.eos-ids", "1"]
    assert main([*command, *own]) == 3
    assert "found another tokenizer" in capsys.readouterr().err
