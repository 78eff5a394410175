"""Vocabularies: the ids that seqio and the published checkpoints use, nothing lost, no text that becomes a sentinel."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.t5_vocabulary import PATH as T5_VOCABULARY
from helpers.t5_vocabulary import needs_t5_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import CausalLM, CorpusConfig, DataConfig, TokenizerConfig
from t5x_like.data.store.prepare import prepare
from t5x_like.data.tokenizers import sentencepiece, sentencepiece_proto
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.data.tokenizers.loading import load_tokenizer, tokenizer_from_model
from t5x_like.data.tokenizers.published import load_published
from t5x_like.data.tokenizers.sentencepiece import SentencePieceTokenizer
from t5x_like.data.tokenizers.tokenizer import Tokenizer
from t5x_like.data.tokenizers.train_vocabulary import train_sentencepiece
from t5x_like.data.tokenizers.vocabulary import Vocabulary
from t5x_like.errors import ConfigError, DataError

WORDS = "the a model of text reads writes spans tokens and every window once with under its own denoiser".split()
TEXTS = [
    "\n".join(" ".join(WORDS[(i * j + k) % len(WORDS)] for k in range(7)) + f"    {i}." for j in range(5))
    for i in range(120)
]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece(TEXTS, 330)


@pytest.fixture(scope="module")
def trained(model: bytes) -> Tokenizer:
    return SentencePieceTokenizer(model, 20, "test")


def units(tokenizer: Tokenizer, text: str) -> tuple[list[str], list[str]]:
    """Return the text cut before each piece that begins a word, and after each piece that ends a sentence."""
    ids = tokenizer.encode(text)
    starts = [i for i, token in enumerate(ids) if i and tokenizer.traits.word_starts[token]]
    ends = [i + 1 for i, token in enumerate(ids[:-1]) if tokenizer.traits.sentence_ends[token]]

    def parts(cuts: list[int]) -> list[str]:
        return [tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise([0, *cuts, len(ids)])]

    return parts(starts), parts(ends)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_traits_mark_word_starts_and_sentence_ends(kind: str, trained: Tokenizer) -> None:
    tokenizer = ByteTokenizer(9) if kind == "bytes" else trained
    words, sentences = units(tokenizer, "the model reads. every window once\nwith denoiser! text")
    assert "".join(words) == "".join(sentences) == "the model reads. every window once\nwith denoiser! text"
    assert words == ["the", " model", " reads.", " every", " window", " once", "\nwith", " denoiser!", " text"]
    assert sentences == ["the model reads.", " every window once\n", "with denoiser!", " text"]
    assert tokenizer.traits.word_starts[tokenizer.eos_id] and tokenizer.traits.sentence_ends[tokenizer.eos_id]
    assert len(tokenizer.traits.word_starts) == tokenizer.vocabulary.base_size


def test_byte_ids_equal_those_of_byt5() -> None:
    seqio = pytest.importorskip("seqio")
    tokenizer, reference = ByteTokenizer(100), seqio.ByteVocabulary(extra_ids=100)
    for text in ("abc", "Grüße, 世界 \n\t", ""):
        assert tokenizer.encode(text) == list(reference.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.sentinel_id(0) == reference.vocab_size - 1
    assert tokenizer.vocab_size == reference.vocab_size + 3


def test_trained_ids_equal_those_of_seqio(model: bytes, trained: Tokenizer, tmp_path: Path) -> None:
    seqio = pytest.importorskip("seqio")
    path = tmp_path / "m.model"
    path.write_bytes(model)
    reference = seqio.SentencePieceVocabulary(str(path), extra_ids=20)
    for text in TEXTS[:3]:
        assert trained.encode(text) == list(reference.encode(text))
    assert trained.vocabulary.base_size == 330
    assert [trained.sentinel_id(i) for i in (0, 19)] == [reference.vocab_size - 1, 330]
    names = [reference.decode([trained.sentinel_id(i)]).strip() for i in (0, 19)]
    assert names == ["<extra_id_0>", "<extra_id_19>"]
    assert trained.mode_id("R") == 350 and trained.vocab_size == 353


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60))
def test_trained_vocabulary_is_lossless(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(3 <= token < trained.vocabulary.base_size for token in ids)
    cut = len(ids) // 2
    assert trained.to_bytes(ids[:cut]) + trained.to_bytes(ids[cut:]) == text.encode()


@pytest.mark.parametrize("text", ["<extra_id_0> and [R] </s><pad><unk>", "[S]"])
def test_text_never_becomes_a_reserved_id(trained: Tokenizer, text: str) -> None:
    for tokenizer in (trained, ByteTokenizer(5)):
        ids = tokenizer.encode(text)
        assert all(3 <= token < tokenizer.vocabulary.base_size for token in ids)
        assert tokenizer.decode(ids) == text


def test_marked_text_becomes_reserved_ids(trained: Tokenizer) -> None:
    ids = trained.encode_marked("[S] the <extra_id_1>text")
    assert ids[0] == trained.mode_id("S") and ids.count(trained.sentinel_id(1)) == 1
    assert trained.decode(ids) == "[S] the <extra_id_1>text"
    with pytest.raises(DataError, match="found <extra_id_20>, expected a sentinel below 20"):
        trained.encode_marked("<extra_id_20>")


@needs_t5_vocabulary
def test_vocabulary_file_of_t5_gives_its_ids() -> None:
    """The file has an extra `<s>` at 2, which T5 has not: all of its ids but pad and EOS are one above T5's."""
    tokenizer = load_tokenizer(TokenizerConfig(path=str(T5_VOCABULARY)), T5_VOCABULARY)
    vocabulary = tokenizer.vocabulary
    assert (vocabulary.base_size, vocabulary.num_sentinels) == (32000, 100)
    assert (tokenizer.sentinel_id(0), tokenizer.sentinel_id(99)) == (32099, 32000)
    assert (tokenizer.mode_id("R"), tokenizer.vocab_size) == (32100, 32103)
    # As in the model cards of T5: "translate English to German: That is good."
    ids = tokenizer.encode("translate English to German: That is good.")
    assert ids == [13959, 1566, 12, 2968, 10, 466, 19, 207, 5]
    assert tokenizer.decode(ids) == "translate English to German: That is good."
    spelled = tokenizer.encode("x <extra_id_0> y")
    assert max(spelled) < 32000 and tokenizer.unk_id in spelled  # T5 has no piece for "<"


@needs_t5_vocabulary
def test_vocabulary_file_of_t5_with_and_without_its_extra_ids(tmp_path: Path) -> None:
    bare = sentencepiece_proto.without(T5_VOCABULARY.read_bytes(), lambda entry: "<extra_id_" in entry.piece)
    path = tmp_path / "bare.model"
    path.write_bytes(bare)
    with_own = load_tokenizer(TokenizerConfig(), T5_VOCABULARY)
    with_ours = load_tokenizer(TokenizerConfig(), path)
    assert with_own.fingerprint == with_ours.fingerprint
    assert load_tokenizer(TokenizerConfig(num_sentinels=128), path).sentinel_id(0) == 32127
    with pytest.raises(ConfigError, match=r"num_sentinels: found 128, expected at most the 100 <extra_id_\*> pieces"):
        load_tokenizer(TokenizerConfig(num_sentinels=128), T5_VOCABULARY)


def with_extra_ids(model: bytes, count: int) -> bytes:
    """Return the model with `<extra_id_*>` pieces after its own, in descending order as in T5's file."""
    for index in reversed(range(count)):
        piece = f"▁<extra_id_{index}>".encode()
        entry = b"\x0a" + bytes([len(piece)]) + piece + b"\x18\x04"
        model += b"\x0a" + bytes([len(entry)]) + entry
    return model


def test_store_keeps_the_sentinels_of_its_vocabulary_file(model: bytes, tmp_path: Path) -> None:
    path = tmp_path / "own.model"
    path.write_bytes(with_extra_ids(model, 8))
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    data = DataConfig(
        corpus=CorpusConfig(files=(str(tmp_path / "text.txt"),)),
        tokenizer=TokenizerConfig(path=str(path), num_sentinels=5),
        layout="causal_lm",
        mixture=(CausalLM(),),
        inputs_length=8,
        targets_length=8,
        store_dir=str(tmp_path / "stores"),
    )
    (store,) = prepare(data, report=lambda line: None)
    given = load_tokenizer(data.tokenizer, path)
    assert given.vocabulary == store.vocabulary == store.tokenizer.vocabulary
    assert (given.sentinel_id(0), given.mode_id("R")) == (337, 338)
    assert store.tokenizer.fingerprint == given.fingerprint == store.info["tokenizer_fingerprint"]


@needs_t5_vocabulary
def test_pieces_equal_those_read_by_sentencepiece() -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(T5_VOCABULARY))
    pieces = sentencepiece_proto.pieces(T5_VOCABULARY.read_bytes())
    assert [entry.piece for entry in pieces] == [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    assert [entry.holds_text for entry in pieces[:5]] == [False, False, False, False, True]


def test_fingerprint_depends_on_pieces_and_sentinels(model: bytes, trained: Tokenizer) -> None:
    again = SentencePieceTokenizer(train_sentencepiece(TEXTS, 330), 20, "test")
    assert again.fingerprint == trained.fingerprint
    assert SentencePieceTokenizer(model, 21, "test").fingerprint != trained.fingerprint
    other = SentencePieceTokenizer(train_sentencepiece(TEXTS, 331), 20, "test")
    assert other.fingerprint != trained.fingerprint


def test_vocabulary_size_that_does_not_fit_the_corpus_is_refused() -> None:
    with pytest.raises(DataError, match=r"vocab_size: found 20000, expected at most \d+"):
        train_sentencepiece(TEXTS, 20_000)
    with pytest.raises(DataError, match=r"vocab_size: found 200, expected more than \d+"):
        train_sentencepiece(TEXTS, 200)
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_sentencepiece(["\n \n"], 300)


@pytest.mark.parametrize("content", [b"", b"no model at all", bytes(range(256)), b"\x0a\x03\x0a\x01a"])
def test_file_that_is_not_a_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"m.model: found no SentencePiece model"):
        load_tokenizer(TokenizerConfig(), path)
    with pytest.raises(DataError, match="unreadable"):
        load_tokenizer(TokenizerConfig(), tmp_path / "absent.model")


def test_panics_of_the_tokenizers_library_are_errors_that_name_the_file(tmp_path: Path) -> None:
    """Its code panics at contradictions in a file; the exception of a panic is no Exception."""
    word_level = {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 1, "a": 2}, "unk_token": "<unk>"}
    sound = {"version": "1.0", "added_tokens": [], "model": word_level}
    path = tmp_path / "tokenizer.json"
    broken = sound | {"model": {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": ["a </s>"]}}
    path.write_text(json.dumps(broken))
    with pytest.raises(DataError, match=r"found no tokenizer \(it panicked: "):
        load_published(path, 0)
    path.write_text(json.dumps(sound | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}))
    with pytest.raises(DataError, match=r"found no tokenizer \(it panicked: chunk size"):
        load_published(path, 0)
    path.write_text(json.dumps(sound | {"model": word_level | {"unk_token": "[UNK]"}}))
    tokenizer = load_published(path, 0)
    with pytest.raises(DataError, match="tokenizer.json: the tokenizers library failed"):
        tokenizer.encode_batch(["b"])


@pytest.mark.parametrize("descending", [True, False])
def test_sentinels_that_count_up_are_refused_with_advice(tmp_path: Path, descending: bool) -> None:
    """The published tokenizers of T5 count down; transformers 5 makes a new one that counts up."""
    names = [f"<extra_id_{number}>" for number in sorted(range(3), reverse=descending)]
    vocab = {name: i for i, name in enumerate(["<unk>", "</s>", "a", *names])}
    document = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    if descending:
        assert load_published(path, 3).vocabulary.num_sentinels == 3
    else:
        with pytest.raises(ConfigError, match="found 3, expected 0, .* counting down; set it to 0, with an objective"):
            load_published(path, 3)


def kept_document(special: list[str], config: dict[str, Any]) -> bytes:
    """Return the contents of `HuggingFaceTokenizer.model` for byte-level BPE with these tokens."""
    model = {"type": "BPE", "vocab": {name: i for i, name in enumerate([*special, "a", "b", "ab"])}, "merges": ["a b"]}
    document = {"tokenizer": {"version": "1.0", "added_tokens": [], "model": model}, "config": config}
    return json.dumps(document).encode()


_NO_FIELDS = {"eos_token": None, "pad_token": None, "bos_token": None, "model_max_length": 9}


@pytest.mark.parametrize("config", [{}, _NO_FIELDS], ids=["absent", "null"])
@pytest.mark.parametrize(
    ("special", "fingerprint", "vocabulary"),
    [
        (["<|endoftext|>"], "8bea4b6552f553b04522fbc2c243efbe", Vocabulary(4, 0, 0, 0, None, 0, has_modes=False)),
        (
            ["<|padding|>", "<|endoftext|>"],
            "3bcd6d1d2f458f55a7b67386d860f9fe",
            Vocabulary(5, 0, 0, 1, None, 0, has_modes=False),
        ),
        (
            ["<|endoftext|>", "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"],
            "2e09ab48ed539543d52b12544667ad9b",
            Vocabulary(9, 0, 4, 3, 1, 2, own_mask_id=5, has_modes=False),
        ),
    ],
    ids=["gpt2", "neox", "modernbert"],
)
def test_tokenizers_kept_without_special_tokens_are_read_as_before(
    special: list[str], fingerprint: str, vocabulary: Vocabulary, config: dict[str, Any]
) -> None:
    """The version that kept an empty tokenizer_config.json made the same fingerprints, which runs and stores name."""
    published = TokenizerConfig(kind="published", num_sentinels=0)
    tokenizer = tokenizer_from_model(published, kept_document(special, config), "store")
    assert tokenizer.fingerprint == fingerprint and tokenizer.vocabulary == vocabulary
    assert tokenizer.byte_ids is None


def test_sentencepiece_models_kept_as_published_tokenizers_are_refused(model: bytes) -> None:
    with pytest.raises(DataError, match=r"^store: found a SentencePiece model that an earlier version kept, expected"):
        tokenizer_from_model(TokenizerConfig(kind="published", num_sentinels=0), model, "store")


def test_long_texts_are_cut_between_pieces(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(TEXTS) + "w" * 300 + " and so on" * 40
    whole = trained.encode(text)
    monkeypatch.setattr(sentencepiece, "_MAX_CHARACTERS", 200)
    monkeypatch.setattr(sentencepiece, "_GROUP_CHARACTERS", 700)
    assert trained.decode(trained.encode(text)) == text
    lines = text[: text.index("www")]
    assert trained.encode(lines) == whole[: len(trained.encode(lines))]
    together = trained.encode_batch([text, "", "short", lines])
    assert [ids.tolist() for ids in together] == [trained.encode(t) for t in (text, "", "short", lines)]
