"""Recipes that start from a model: `--from MODEL_DIR` on the command line, and the shipped ones of fine-tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.config_examples import changed, example

from t5x_like.cli.arguments import configured_run
from t5x_like.cli.main import parse
from t5x_like.config import MaskedLM, Preference, RunConfig
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
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
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
    # Such a head has no parameters that could keep their initial values.
    assert run.initialize_from is not None and run.initialize_from.reinit == ()
    assert not any(isinstance(objective, MaskedLM) for objective in run.data.mixture)


def test_preferences_start_from_a_model_that_is_their_reference(folder: Path) -> None:
    files = ["--data.corpus.files", "pairs.jsonl"]
    for base, layout in (("base", "encoder_decoder"), ("decoder", "causal_lm")):
        run = configured("finetune:dpo", "--from", base, *files, "--data.mixture.0.beta", "0.5")
        assert run.data.layout == layout and run.data.preference == Preference(beta=0.5)
        assert run.initialize_from is not None and run.initialize_from.directory == base
        assert all(stack.dropout_rate == 0 for stack in run.model.stacks.values())
        run = configured("finetune:chat_dpo", "--from", base, *files)
        assert run.data.preference == Preference(dialogues=base == "decoder")
        assert run.data.corpus.messages_as == ("dialogue" if base == "decoder" else "turns")
    with pytest.raises(ConfigError, match="found an encoder alone"):
        configured("finetune:dpo", "--from", "encoder", *files)


def test_adapters_take_the_place_of_initial_values(folder: Path) -> None:
    dpo = ["finetune:dpo", "--from", "decoder", "--data.corpus.files", "pairs.jsonl", "--training.lora.base", "decoder"]
    with pytest.raises(ConfigError, match="--initialize-from None removes it"):
        configured(*dpo)
    run = configured(*dpo, "--initialize-from", "None", "--training.lora.rank", "4")
    assert run.initialize_from is None and run.training.lora is not None and run.training.lora.rank == 4


def test_the_model_of_a_teacher_is_read_from_its_directory(folder: Path) -> None:
    run = configured("mine.py", "--from", "decoder", "--training.distillation.teacher", "decoder")
    assert run.training.distillation is not None
    assert run.training.distillation.model == example("causal_lm").model
    assert run.training.distillation.weight == 0.5
    with pytest.raises(
        ConfigError, match=r"training.distillation.model.architecture: found 'encoder', expected 'decoder'"
    ):
        configured("mine.py", "--from", "decoder", "--training.distillation.teacher", "encoder")
    with pytest.raises(ConfigError, match="found a teacher beside a task head, a generator or preference pairs"):
        dpo = ["finetune:dpo", "--from", "decoder", "--data.corpus.files", "pairs.jsonl"]
        configured(*dpo, "--training.distillation.teacher", "decoder")
