"""The commands of docs/continue.md on an encoder, a decoder and an encoder-decoder, with Python's own documentation."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers", reason="the models are written by transformers (the hf extra)")

from helpers.published_models import (  # noqa: E402
    ODD,
    TOPICS,
    save_bpe,
    sentencepiece_reference,
    write_model,
    write_sentencepiece,
)

from t5x_like.cli.main import main  # noqa: E402
from t5x_like.data.store.prepare import open_stores  # noqa: E402
from t5x_like.data.stream.row_stream import TrainingStream  # noqa: E402
from t5x_like.model_loading import open_model  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.slow]
PAGE = Path(__file__).parents[2] / "docs" / "continue.md"
SMALL = "--data.inputs-length 24 --data.targets-length 24 --training.global-batch-size 8 --monitoring.log-every-steps 1"


def commands_of_the_page() -> list[str]:
    return re.findall(r"^t5x-like (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("kind", ["modernbert", "llama", "t5gemma"])
def test_commands_of_the_page(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    reference = write_model(tmp_path / "MODEL_DIR", kind)
    (tmp_path / "texts").mkdir()
    for number, topic in enumerate(TOPICS):
        (tmp_path / "texts" / f"{number}.txt").write_text(topic, encoding="utf-8")
    train, generate, convert = commands_of_the_page()
    lengths = SMALL if kind != "modernbert" else SMALL.replace("targets-length 24", "targets-length 0")
    command = f"{train} {lengths} --data.store-dir stores".replace("2000", "2")
    assert main(shlex.split(command)) == 0
    output = capsys.readouterr().out
    assert "tokens per word" in output and "parameters of MODEL_DIR" in output

    loaded = open_model("RUN")
    tokenizer, model = loaded.tokenizer, loaded.model
    stream = TrainingStream(open_stores(loaded.run.data), loaded.run.data, 8)
    (features,) = stream.batch(0).values()
    if kind == "llama":
        row = features["decoder_input_tokens"][0]
        assert row[0] == reference.bos_token_id
        text = reference.decode(features["decoder_target_tokens"][0][:20], clean_up_tokenization_spaces=False)
        assert text.split("</s>")[0] in "\n".join(TOPICS)
    if kind == "t5gemma":
        assert (features["decoder_input_tokens"][:, 0] == reference.bos_token_id).all()
        assert tokenizer.sentinel_id(0) in features["encoder_input_tokens"]
        assert model.vocab_size == len(reference) + 103
    if kind == "modernbert":
        changed = features["encoder_input_tokens"] != features["encoder_target_tokens"]
        assert (features["encoder_input_tokens"][changed] == reference.mask_token_id).mean() > 0.5

    # Neither the text nor the store is needed from here on.
    shutil.rmtree("stores")
    shutil.rmtree("texts")
    if kind != "modernbert":
        assert main([*shlex.split(generate), "--max-new-tokens", "4"]) == 0
        assert main(shlex.split(convert)) == 0
        written = transformers.AutoTokenizer.from_pretrained("OUT")
        assert written(TOPICS[0])["input_ids"] == reference(TOPICS[0])["input_ids"]
    else:
        assert main(shlex.split(convert)) == 0
    exported = open_model("OUT")
    _, params = exported.params()
    _, trained = loaded.params()
    for one, other in zip(*(sorted_leaves(tree) for tree in (params, trained)), strict=True):
        np.testing.assert_array_equal(one, other)


PUBLISHED = {"gpt2": "GPT2LMHeadModel", "t5": "T5ForConditionalGeneration", "umt5": "UMT5ForConditionalGeneration"}
PUBLISHED["deberta"] = "DebertaV2ForMaskedLM"


@pytest.mark.parametrize("kind", PUBLISHED)
def test_models_with_the_files_that_they_were_published_with(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte-level BPE without tokenizer_config.json, and SentencePiece models; no tokenizer.json. With a learning rate
    of nearly 0, an export after two steps has the published parameters."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("MODEL_DIR"), kind)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        Path("MODEL_DIR", name).unlink(missing_ok=True)
    if kind == "gpt2":
        save_bpe(Path("MODEL_DIR"), ["<|endoftext|>"])
        reference = transformers.AutoTokenizer.from_pretrained("MODEL_DIR")
    else:
        write_sentencepiece(Path("MODEL_DIR"), {"umt5": "t5"}.get(kind, kind))
        reference = sentencepiece_reference(Path("MODEL_DIR"))
    Path("text.txt").write_text("\n".join([*TOPICS[:8], *ODD]), encoding="utf-8")
    lengths = SMALL if kind != "deberta" else SMALL.replace("targets-length 24", "targets-length 0")
    train = f"train --from MODEL_DIR --workdir RUN --data.corpus.files text.txt --data.store-dir stores {lengths}"
    rates = "--training.num-train-steps 2 --training.schedule.learning-rate 1e-30"
    assert main(shlex.split(f"{train} {rates}")) == 0
    assert main(["convert", "--to", "hf", "RUN", "OUT"]) == 0
    assert "not written" not in capsys.readouterr().out

    tokenizer = open_model("RUN").tokenizer
    written = transformers.AutoTokenizer.from_pretrained("OUT")
    for text in ODD:
        ids = reference(text)["input_ids"]
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False)["input_ids"], text
        assert written(text)["input_ids"] == ids, text
    architecture = getattr(transformers, PUBLISHED[kind])
    model, report = architecture.from_pretrained("OUT", output_loading_info=True)
    assert not any(report.values()), report
    before = architecture.from_pretrained("MODEL_DIR").state_dict()
    for name, tensor in model.state_dict().items():
        # A token table has grown by sentinels and mode tokens.
        np.testing.assert_allclose(tensor[: len(before[name])].numpy(), before[name].numpy(), rtol=1e-7, atol=1e-20)


def sorted_leaves(tree: object) -> list[np.ndarray]:
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
