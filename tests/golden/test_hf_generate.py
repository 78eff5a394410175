"""`generate` with imported models and their own tokenizers, compared with transformers."""

import json

import pytest

from t5x_like.checkpoints.model_dir import read_model
from t5x_like.cli.main import main
from t5x_like.data.tokenizers.loading import load_directory_tokenizer
from t5x_like.data.tokenizers.tokenizer import pieces
from t5x_like.decoding.infill_prompts import queries, split_at_gaps
from t5x_like.decoding.prompted_model import ends_in_eos, formats_of
from t5x_like.errors import EXIT_OK, EXIT_USAGE
from t5x_like.interop.huggingface.checkpoint import import_directory
from t5x_like.model_loading import open_model

torch = pytest.importorskip("torch", reason="parity with transformers needs the hf extra")
transformers = pytest.importorskip("transformers", reason="parity with transformers needs the hf extra")

pytestmark = pytest.mark.hf
TEXTS = ["the cat sat on the mat", "über der naïve Straße, 日本語 too", "def f(x):\n    return x + 1\n"] * 20
SENTINELS = [f"<extra_id_{index}>" for index in reversed(range(10))]


def make_tokenizer(folder, *, sentinels):
    """Return a byte-level BPE that adds BOS before the text, or EOS after it and sentinels in T5's order."""
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


def imported(root, reference):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    reference.eval().save_pretrained(root / "huggingface")
    import_directory(root / "huggingface", root / "imported")
    return root / "imported"


def test_decoder_generates_like_transformers(tmp_path, capsys):
    fast = make_tokenizer(tmp_path / "huggingface", sentinels=False)
    size = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
    ids = {"vocab_size": len(fast) + 5, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **ids, num_key_value_heads=2))
    imported_dir = imported(tmp_path, reference)
    prompts = ["the cat sat", "über 日本", "def f("]
    (tmp_path / "in.txt").write_text("\n".join(prompts))
    capsys.readouterr()
    unsaid = [0, 2, *range(len(fast), len(fast) + 5)]
    assert (
        main(["generate", str(imported_dir), "--input", str(tmp_path / "in.txt"), "--max-new-tokens", "9"]) == EXIT_OK
    )
    found = [json.loads(line)["output"] for line in capsys.readouterr().out.splitlines()]
    for prompt, output in zip(prompts, found, strict=True):
        given = fast(prompt, return_tensors="pt").input_ids
        answer = reference.generate(given, max_new_tokens=9, do_sample=False, suppress_tokens=unsaid)[
            0, given.shape[1] :
        ]
        assert output == fast.decode(answer, skip_special_tokens=True)
    assert len(set(found)) == 3
    assert main(["generate", str(imported_dir), "--prompt", "a", "--mode", "S"]) == EXIT_USAGE

    # The bytes of any text are those of its pieces joined, even where a token ends within a character.
    tokenizer = load_directory_tokenizer(imported_dir / "huggingface", read_model(imported_dir)[0])
    for text in TEXTS[:3]:
        assert b"".join(pieces(tokenizer, tokenizer.encode(text))) == text.encode()


def test_t5_sentinels_mark_gaps(tmp_path, capsys):
    fast = make_tokenizer(tmp_path / "huggingface", sentinels=True)
    reference = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=24, d_kv=6, d_ff=40, num_layers=1, num_heads=4, vocab_size=len(fast), decoder_start_token_id=0
        )
    )
    imported_dir = imported(tmp_path, reference)
    loaded = open_model(imported_dir)
    tokenizer, formats = loaded.tokenizer, formats_of(loaded, None)
    text = split_at_gaps("the <mask> sat on <mask>")
    (query,) = queries(text, ends_in_eos(tokenizer, formats.gaps), tokenizer)
    capsys.readouterr()
    assert list(query.ids) == fast("the <extra_id_0> sat on <extra_id_1>").input_ids
    assert main(["generate", str(imported_dir), "--prompt", "the cat", "--max-new-tokens", "5"]) == EXIT_OK
    plain = capsys.readouterr().out
    answer = reference.generate(fast("the cat", return_tensors="pt").input_ids, max_new_tokens=5, suppress_tokens=[0])
    assert plain.strip("\n") == fast.decode([t for t in answer[0] if t > 2], skip_special_tokens=False)
