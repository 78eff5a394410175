"""`generate` with imported models and the tokenizers that they came with, beside transformers."""

import json

import pytest

from t5x_like.cli import main
from t5x_like.config import EXIT_OK, EXIT_USAGE
from t5x_like.decoding.infilling import gapped, queries
from t5x_like.decoding.models import ends_in_eos, formats_of
from t5x_like.decoding.spelling import of_directory, pieces
from t5x_like.interop.huggingface.directories import import_directory
from t5x_like.interop.imported import read_model

torch = pytest.importorskip("torch", reason="parity with transformers needs the hf extra")
transformers = pytest.importorskip("transformers", reason="parity with transformers needs the hf extra")

pytestmark = pytest.mark.hf
TEXTS = ["the cat sat on the mat", "über der naïve Straße, 日本語 too", "def f(x):\n    return x + 1\n"] * 20
SENTINELS = [f"<extra_id_{index}>" for index in reversed(range(10))]


def tokenizer(folder, *, sentinels):
    """A byte-level BPE with BOS in front, or with EOS behind and sentinels in T5's order."""
    import tokenizers as library

    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    special = ["<pad>", "</s>", "<s>"]
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, library.trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    made.add_special_tokens(SENTINELS if sentinels else [])
    single = "$A </s>" if sentinels else "<s> $A"
    made.post_processor = library.processors.TemplateProcessing(single=single, special_tokens=[("</s>", 1), ("<s>", 2)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )
    fast.save_pretrained(folder)
    return fast


def imported(place, theirs):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    theirs.eval().save_pretrained(place / "theirs")
    import_directory(place / "theirs", place / "ours")
    return place / "ours"


def test_a_decoder_goes_on_as_transformers_does(tmp_path, capsys):
    fast = tokenizer(tmp_path / "theirs", sentinels=False)
    size = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
    ids = {"vocab_size": len(fast) + 5, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **ids, num_key_value_heads=2))
    ours = imported(tmp_path, theirs)
    prompts = ["the cat sat", "über 日本", "def f("]
    (tmp_path / "in.txt").write_text("\n".join(prompts))
    capsys.readouterr()
    unsaid = [0, 2, *range(len(fast), len(fast) + 5)]
    assert main(["generate", str(ours), "--input", str(tmp_path / "in.txt"), "--max-new-tokens", "9"]) == EXIT_OK
    found = [json.loads(line)["output"] for line in capsys.readouterr().out.splitlines()]
    for prompt, output in zip(prompts, found, strict=True):
        given = fast(prompt, return_tensors="pt").input_ids
        said = theirs.generate(given, max_new_tokens=9, do_sample=False, suppress_tokens=unsaid)[0, given.shape[1] :]
        assert output == fast.decode(said, skip_special_tokens=True)
    assert len(set(found)) == 3
    assert main(["generate", str(ours), "--prompt", "a", "--mode", "S"]) == EXIT_USAGE

    # Bytes of the pieces: any text is theirs put together, whatever characters its tokens are cut in.
    speller = of_directory(ours / "huggingface", read_model(ours)[0])
    for text in TEXTS[:3]:
        assert b"".join(pieces(speller, speller.encode(text))) == text.encode()


def test_t5s_sentinels_stand_in_gaps(tmp_path, capsys):
    fast = tokenizer(tmp_path / "theirs", sentinels=True)
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=24, d_kv=6, d_ff=40, num_layers=1, num_heads=4, vocab_size=len(fast), decoder_start_token_id=0
        )
    )
    ours = imported(tmp_path, theirs)
    speller, formats = of_directory(ours / "huggingface", read_model(ours)[0]), formats_of(ours, None)
    text = gapped("the <mask> sat on <mask>")
    (query,) = queries(text, ends_in_eos(speller, formats.gaps), speller)
    capsys.readouterr()
    assert list(query.ids) == fast("the <extra_id_0> sat on <extra_id_1>").input_ids
    assert main(["generate", str(ours), "--prompt", "the cat", "--max-new-tokens", "5"]) == EXIT_OK
    plain = capsys.readouterr().out
    said = theirs.generate(fast("the cat", return_tensors="pt").input_ids, max_new_tokens=5, suppress_tokens=[0])
    assert plain.strip("\n") == fast.decode([t for t in said[0] if t > 2], skip_special_tokens=False)
