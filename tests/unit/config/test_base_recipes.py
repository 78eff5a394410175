"""Recipes that start from a model: `--from MODEL_DIR` on the command line, and the shipped ones of fine-tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.config_examples import changed, example

from t5x_like.cli.arguments import configured_run
from t5x_like.cli.main import parse
from t5x_like.config import MaskedLM, RunConfig
from t5x_like.config.recipes import load_recipe
from t5x_like.config.serialization import to_json
from t5x_like.errors import ConfigError

RECIPE = """
from pathlib import Path
from t5x_like.config.recipes import load_recipe

def recipe(base: Path):
    return load_recipe(str(base / "config.json"))

def alone():
    return load_recipe("base/config.json")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RECIPE)
    for name, run in (("base", example()), ("encoder", example("encoder")), ("decoder", example("causal_lm"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(to_json(run))
    rows = ["text\tlabel", *(f"a text of number {i}\t{'even' if i % 2 == 0 else 'odd'}" for i in range(20))]
    (tmp_path / "train.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def configured(*arguments: str) -> RunConfig:
    return configured_run(*parse(["train", *arguments]))


def test_the_function_of_a_recipe_gets_the_model(folder: Path) -> None:
    assert load_recipe("mine.py@base") == example()
    assert configured("mine.py", "--from", "base", "--data.seed", "3") == changed(example(), "data.seed", 3)
    with pytest.raises(ConfigError, match="found no model, expected the directory .* name it by --from MODEL_DIR"):
        load_recipe("mine.py")
    with pytest.raises(ConfigError, match="found a function without parameters, with --from base"):
        load_recipe("mine.py:alone@base")


def test_a_classifier_gets_the_encoder_and_the_labels_of_the_files(folder: Path) -> None:
    run = configured("finetune:classify", "--from", "base", "--data.corpus.files", "train.tsv")
    assert run.model.architecture == "encoder" and run.data.layout == "encoder"
    assert run.model.task_head is not None
    assert run.model.task_head.labels == run.data.corpus.labels == ("even", "odd")
    assert run.data.tokenizer == example().data.tokenizer
    assert run.initialize_from is not None and run.initialize_from.reinit == ("head/.*",)
    named = ["--data.corpus.labels", "odd", "even", "neither"]
    run = configured("finetune:classify", "--from", "decoder", "--data.corpus.files", "train.tsv", *named)
    assert run.model.task_head is not None and run.model.task_head.labels == ("odd", "even", "neither")
    assert run.model.task_head.pooling == "last" and run.data.layout == "causal_lm"


def test_labels_of_words_are_collected_word_by_word(folder: Path) -> None:
    rows = ["text\tlabel", "Ada sees\tB-PER O", "a b Ada Eve\tO O B-PER I-PER"]
    (folder / "tags.tsv").write_text("\n".join(rows) + "\n")
    run = configured("finetune:tag", "--from", "encoder", "--data.corpus.files", "tags.tsv")
    assert run.data.corpus.labels == ("B-PER", "I-PER", "O")


def test_text_to_text_needs_a_decoder(folder: Path) -> None:
    fields = [
        "--data.corpus.files",
        "train.tsv",
        "--data.corpus.inputs-field",
        "text",
        "--data.corpus.text-field",
        "label",
    ]
    for base, layout in (("base", "encoder_decoder"), ("decoder", "causal_lm")):
        run = configured("finetune:text_to_text", "--from", base, *fields)
        assert run.data.layout == layout and run.data.example_mode == "documents"
    with pytest.raises(ConfigError, match="found an encoder alone, expected a model with a decoder"):
        configured("finetune:text_to_text", "--from", "encoder", *fields)


def test_the_former_task_of_the_model_is_left_out(folder: Path) -> None:
    run = configured("finetune:embed", "--from", "encoder", "--data.corpus.files", "train.tsv")
    assert run.model.task_head is not None and run.model.task_head.kind == "embedding"
    assert not any(isinstance(objective, MaskedLM) for objective in run.data.mixture)
