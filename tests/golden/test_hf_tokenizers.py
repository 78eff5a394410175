"""The tokenizer files that we write, read by transformers: the same ids on real texts."""

import io
import os
import pathlib
import pydoc_data.topics

import pytest
import sentencepiece

from t5x_like.config.corpora import TokenizerConfig
from t5x_like.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, from_model, train_sentencepiece
from t5x_like.interop.huggingface.tokenizer import write_tokenizer

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
    """T5's own vocabulary, where its file is at hand."""
    path = os.environ.get("T5_VOCABULARY")
    if path is None:
        pytest.skip("T5_VOCABULARY names no file of T5's vocabulary")
    return from_model(TokenizerConfig(kind="sentencepiece", num_sentinels=100), pathlib.Path(path).read_bytes(), path)


def trained():
    model = train_sentencepiece(TOPICS[:40], 1500)
    return SentencePieceTokenizer(model, 20, "trained here")


def of_words():
    """As T5's was made: a space in front, one space for many, NFKC, no bytes."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for topic in TOPICS for line in topic.split("\n") if line),
        model_writer=out, vocab_size=1500, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return SentencePieceTokenizer(out.getvalue(), 20, "trained here")


@pytest.fixture(scope="module", params=[trained, of_words, lambda: ByteTokenizer(20), of_t5])
def case(request, tmp_path_factory):
    """(our tokenizer, transformers' of the files that we wrote)."""
    ours = request.param()
    directory = tmp_path_factory.mktemp("tokenizer")
    assert write_tokenizer(directory, ours) == []
    if isinstance(ours, SentencePieceTokenizer):
        file = sentencepiece.SentencePieceProcessor(str(directory / "spiece.model"))
        assert (file.pad_id(), file.eos_id(), file.unk_id()) == (0, 1, 2)
        assert file.vocab_size() == ours.vocabulary.base_size
        assert file.encode(TOPICS[0]) == ours.encode(TOPICS[0])
    return ours, transformers.AutoTokenizer.from_pretrained(directory)


def test_the_same_ids_of_real_texts(case):
    ours, theirs = case
    lines = [line for topic in TOPICS for line in topic.split("\n\n")]
    texts = [text for text in ODD + TOPICS[::8] + lines[::3] if "▁" not in text or not ours._strip_first_space]
    expected = [ids.tolist() for ids in ours.encode_batch(texts)]
    found = theirs(texts, add_special_tokens=False)["input_ids"]
    differ = [(text, e, f) for text, e, f in zip(texts, expected, found, strict=True) if e != f]
    # Equal scores, as in rows of dashes: see the module.
    others = [(text, e, f) for text, e, f in differ if sorted(e) != sorted(f)]
    assert not others, (len(others), len(texts), others[0])
    assert len(differ) < 0.02 * len(texts)


def test_the_same_ids_of_special_tokens(case):
    ours, theirs = case
    for text in MARKED:
        assert theirs(text)["input_ids"] == [*ours.encode_marked(text), ours.eos_id], text
    assert len(theirs) == ours.vocab_size
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    for token in range(ours.vocabulary.base_size, ours.vocab_size):
        assert theirs.convert_tokens_to_ids(ours.vocabulary.special_name(token)) == token
    assert theirs.convert_tokens_to_ids("[R]") == ours.mode_id("R")


def test_the_same_text_of_ids(case):
    ours, theirs = case
    for text in ["def f(x):\n    return x\n", "The function returns a list.", "naïve café"]:
        ids = ours.encode(text)
        if 2 not in ids:
            assert theirs.decode([*ids, 1], skip_special_tokens=True) == ours.decode(ids)
