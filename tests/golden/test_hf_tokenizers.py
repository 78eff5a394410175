"""Exported tokenizer files, read by transformers: the same ids on real texts."""

import io
import pydoc_data.topics

import pytest
import sentencepiece
from helpers import t5_vocabulary

from t5x_like.config.tokenizer import TokenizerConfig
from t5x_like.data.tokenizers.bytes import ByteTokenizer
from t5x_like.data.tokenizers.loading import tokenizer_from_model
from t5x_like.data.tokenizers.sentencepiece import SentencePieceTokenizer
from t5x_like.data.tokenizers.train_vocabulary import train_sentencepiece
from t5x_like.interop.huggingface.tokenizer_export import write_tokenizer

transformers = pytest.importorskip("transformers", reason="tokenizers of transformers need the hf extra")

pytestmark = pytest.mark.hf
TOPICS = list(pydoc_data.topics.topics.values())
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
    "https://example.org/a_b?c=d&e=%20#f" * 3,
    "     " * 40,
    "=" * 100 + "\n" + "-" * 77,
    "العربية עברית ไทย हिन्दी Ελληνικά Русский",
]
MARKED = [
    "Thank you <extra_id_0> me to your party <extra_id_1> week.",
    "[S] The function <extra_id_3><extra_id_4>\nreturns [R][X]",
    "<extra_id_19>",
    " <extra_id_0> ",
]


def of_t5():
    """Return T5's own tokenizer."""
    config = TokenizerConfig(kind="sentencepiece", num_sentinels=100)
    return tokenizer_from_model(config, t5_vocabulary.PATH.read_bytes(), str(t5_vocabulary.PATH))


def trained():
    model = train_sentencepiece(TOPICS[:40], 1500)
    return SentencePieceTokenizer(model, 20, "trained here")


def of_words():
    """Train a model as T5's was trained: a space in front, one space for many, NFKC, no bytes."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for topic in TOPICS for line in topic.split("\n") if line),
        model_writer=out, vocab_size=1500, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return SentencePieceTokenizer(out.getvalue(), 20, "trained here")


@pytest.fixture(
    scope="module",
    params=[
        trained,
        of_words,
        lambda: ByteTokenizer(20),
        pytest.param(of_t5, marks=t5_vocabulary.needs_t5_vocabulary),
    ],
)
def case(request, tmp_path_factory):
    """Return (our tokenizer, transformers' tokenizer of the files that we wrote)."""
    original = request.param()
    directory = tmp_path_factory.mktemp("tokenizer")
    assert write_tokenizer(directory, original, "encoder_decoder") == []
    if isinstance(original, SentencePieceTokenizer):
        file = sentencepiece.SentencePieceProcessor(str(directory / "spiece.model"))
        assert (file.pad_id(), file.eos_id(), file.unk_id()) == (0, 1, 2)
        assert file.vocab_size() == original.vocabulary.base_size
        assert file.encode(TOPICS[0]) == original.encode(TOPICS[0])
    return original, transformers.AutoTokenizer.from_pretrained(directory)


def test_ids_of_real_texts_are_equal(case):
    original, reference = case
    lines = [line for topic in TOPICS for line in topic.split("\n\n")]
    texts = [text for text in ODD + TOPICS[::8] + lines[::3] if "▁" not in text or not original._strip_first_space]
    expected = [ids.tolist() for ids in original.encode_batch(texts)]
    found = reference(texts, add_special_tokens=False)["input_ids"]
    differ = [(text, e, f) for text, e, f in zip(texts, expected, found, strict=True) if e != f]
    # Equal scores, as in rows of dashes: see the module.
    others = [(text, e, f) for text, e, f in differ if sorted(e) != sorted(f)]
    assert not others, (len(others), len(texts), others[0])
    assert len(differ) < 0.02 * len(texts)


def test_ids_of_special_tokens_are_equal(case):
    original, reference = case
    for text in MARKED:
        assert reference(text)["input_ids"] == [*original.encode_marked(text), original.eos_id], text
    assert len(reference) == original.vocab_size
    assert (reference.pad_token_id, reference.eos_token_id, reference.unk_token_id) == (0, 1, 2)
    for token in range(original.vocabulary.base_size, original.vocab_size):
        assert reference.convert_tokens_to_ids(original.vocabulary.special_name(token)) == token
    assert reference.convert_tokens_to_ids("[R]") == original.mode_id("R")


def test_text_for_a_decoder_begins_with_its_start_and_does_not_end(tmp_path):
    original = trained()
    assert write_tokenizer(tmp_path, original, "decoder") == []
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [TOPICS[0], "", *MARKED]:
        assert reference(text)["input_ids"] == [0, *original.encode_marked(text)]
    assert (reference.bos_token_id, reference.eos_token_id) == (0, 1)


def test_decoded_texts_are_equal(case):
    original, reference = case
    for text in ["def f(x):\n    return x\n", "The function returns a list.", "naïve café"]:
        ids = original.encode(text)
        if 2 not in ids:
            assert reference.decode([*ids, 1], skip_special_tokens=True) == original.decode(ids)
