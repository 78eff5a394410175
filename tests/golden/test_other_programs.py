"""Programs that read exported directories: transformers' pipeline and Trainer, lm-eval's `hf` model, CTranslate2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the programs need the hf extra")
transformers = pytest.importorskip("transformers", reason="the programs need the hf extra")

from helpers.published_models import TOPICS, write_model  # noqa: E402
from helpers.small_run import small_run  # noqa: E402

from t5x_like.cli.main import main  # noqa: E402
from t5x_like.config import CausalLM, CorpusConfig  # noqa: E402
from t5x_like.data.store.prepare import open_stores, prepare  # noqa: E402
from t5x_like.data.stream.row_stream import TrainingStream  # noqa: E402
from t5x_like.export.huggingface_directory import export_directory  # noqa: E402
from t5x_like.interop.huggingface.checkpoint import import_directory  # noqa: E402
from t5x_like.model_loading import open_model  # noqa: E402
from t5x_like.models.factory import bind_params  # noqa: E402
from t5x_like.trainer.train import train  # noqa: E402

pytestmark = pytest.mark.hf
PROMPTS = ["The function returns", "A class is"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a trained decoder and its exported directory."""
    root = tmp_path_factory.mktemp("run")
    corpus = CorpusConfig(packages=False, max_documents=200, validation_fraction=0.1)
    run = small_run(root, "causal_lm", (CausalLM(),), corpus=corpus, lengths=(64, 0), training={"num_train_steps": 40})
    prepare(run.data, report=lambda line: None)
    assert train(run, root / "run") == 0
    export_directory(root / "run", root / "out", report=lambda line: None)
    return root / "run", root / "out"


def test_pipeline_continues_prompts_as_generate_does(exported, tmp_path, capsys):
    run, out = exported
    generator = transformers.pipeline("text-generation", str(out))
    for prompt in PROMPTS:
        capsys.readouterr()
        assert main(["generate", str(run), "--prompt", prompt, "--max-new-tokens", "12"]) == 0
        ours = capsys.readouterr().out.strip("\n")
        (theirs,) = generator(prompt, max_new_tokens=12, do_sample=False, return_full_text=False)
        assert theirs["generated_text"].strip("\n") == ours


def test_trainer_begins_at_the_loss_where_the_run_ended(exported, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    run, out = exported
    loaded = open_model(run)
    _, params = loaded.params()
    data = loaded.run.data
    stream = TrainingStream(open_stores(data), data, 8)
    graphdef = loaded.program.spec.graphdef
    # The rows after those that the run has read.
    steps = [stream.batch(40 + step)["main"] for step in range(12)]

    def loss(batch: Any) -> float:
        log_p = jax.nn.log_softmax(bind_params(graphdef, params)({k: v for k, v in batch.items() if "input" in k}))
        targets = batch["decoder_target_tokens"]
        return float(-np.take_along_axis(np.asarray(log_p), targets[..., None], -1).mean())

    rows = []
    for batch in steps:
        assert (batch["decoder_loss_weights"] == 1).all()
        for inputs, targets in zip(batch["decoder_input_tokens"], batch["decoder_target_tokens"], strict=True):
            # transformers shifts the labels itself.
            ids = [*inputs.tolist(), int(targets[-1])]
            rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    arguments = transformers.TrainingArguments(
        str(tmp_path / "trainer"), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=True, lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=Rows(), data_collator=transformers.default_data_collator
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(loss(steps[0]), rel=1e-4)
    # It learns from there: without training the later rows would cost as much as they do at the run's end.
    assert np.mean(losses[6:]) < np.mean([loss(batch) for batch in steps[6:]])


@pytest.mark.harness
def test_scores_of_the_hf_model_of_lm_eval_equal_ours(exported, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra harness is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from t5x_like.evaluation.lm_eval_adapter import T5xLikeLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run, out = exported
    ours = T5xLikeLM(str(run), cache="no")
    options = {"tokenizer": str(out), "device": "cpu", "dtype": "float32", "batch_size": 2, "max_length": 64}
    theirs = HFLM(pretrained=str(out), **options)

    def asked(model: Any, kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return getattr(model, kind)([Instance(kind, {}, each, 0) for each in arguments])  # type: ignore[arg-type]

    pairs = [(PROMPTS[0], " a list"), (PROMPTS[1], " something else"), ("Set the state", " of x.")]
    for (one, greedy), (other, greedy_too) in zip(
        asked(ours, "loglikelihood", pairs), asked(theirs, "loglikelihood", pairs), strict=True
    ):
        assert one == pytest.approx(other, rel=1e-5) and greedy == greedy_too
    prompts = [(prompt, {"max_gen_toks": 8, "until": ["\n\n"], "do_sample": False}) for prompt in PROMPTS]
    assert asked(ours, "generate_until", prompts) == asked(theirs, "generate_until", prompts)
    # Perplexities of whole texts count the token that rows begin with, unless it is left to lm-eval.
    without = HFLM(pretrained=str(out), add_bos_token=False, **options)
    # Texts of one window: longer ones are divided by rules of their own.
    texts = [("The following classes are sequences. ",), ("Return a list.",)]
    found = [asked(model, "loglikelihood_rolling", texts) for model in (ours, without)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def moved(folder: Path, name: str) -> Any:
    """Move the weights of a directory off their initial values, so that each has an effect; return the model."""
    model = getattr(transformers, name).from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model.eval()


def converted(folder: Path) -> str:
    """Export a directory of transformers by this package, convert the result by CTranslate2, and return its path."""
    converters = pytest.importorskip("ctranslate2.converters", reason="CTranslate2 is not installed")
    import_directory(folder, folder / "imported", report=lambda line: None)
    export_directory(folder / "imported", folder / "exported", report=lambda line: None)
    converters.TransformersConverter(str(folder / "exported")).convert(str(folder / "ct2"))
    return str(folder / "ct2")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_ctranslate2_generates_the_tokens_of_transformers(kind, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="CTranslate2 is not installed")
    tokenizer = write_model(tmp_path, kind)
    model = moved(tmp_path, "AutoModelForSeq2SeqLM" if kind == "t5" else "AutoModelForCausalLM")
    folder, ids = converted(tmp_path), tokenizer(TOPICS[0][:40])["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    with torch.no_grad():
        lengths = {"max_new_tokens": 10, "min_new_tokens": 10}
        (expected,) = model.generate(torch.tensor([ids]), do_sample=False, **lengths).tolist()
    if kind == "t5":
        translator = ctranslate2.Translator(folder, compute_type="float32")
        (answer,) = translator.translate_batch([tokens], beam_size=1, max_decoding_length=10, min_decoding_length=10)
        assert tokenizer.convert_tokens_to_ids(answer.hypotheses[0]) == expected[1:]
        return
    generator = ctranslate2.Generator(folder, compute_type="float32")
    options = {"max_length": 10, "min_length": 10, "include_prompt_in_result": False}
    (answer,) = generator.generate_batch([tokens], beam_size=1, **options)
    assert answer.sequences_ids[0] == expected[len(ids) :]


def test_ctranslate2_computes_the_states_of_a_bert(tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="CTranslate2 is not installed")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=40,
        max_position_embeddings=64,
    )  # fmt: skip
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(35))]
    transformers.BertModel(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(names) + "\n")
    model, ids = moved(tmp_path, "BertModel"), [[2, 7, 8, 9, 3], [2, 30, 12, 20, 3]]
    encoder = ctranslate2.Encoder(converted(tmp_path), compute_type="float32")
    found = np.array(encoder.forward_batch(ids).last_hidden_state)
    with torch.no_grad():
        expected = model(torch.tensor(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-4)
