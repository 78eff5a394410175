"""Recipes: the sources that they are loaded from, the errors for unreadable ones, and overrides of single fields."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.config_examples import REPOSITORY, changed, example, shipped_recipes
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.config import (
    AdafactorConfig,
    AdamWConfig,
    FreezeConfig,
    LoraConfig,
    OptaxOptimizer,
    RopeScalingConfig,
    TaskHeadConfig,
)
from t5x_like.config.objectives import Layout
from t5x_like.config.overrides import _fields, apply_overrides
from t5x_like.config.recipes import load_recipe
from t5x_like.config.serialization import diff_configs, from_json, to_json
from t5x_like.config.validation import validate
from t5x_like.errors import ConfigError, ConfigProblem, UserError

RECIPE = """
from t5x_like.config import *
import beside

def recipe():
    stack = StackConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64)
    return RunConfig(
        name="mine",
        model=ModelConfig(encoder=stack, decoder=stack, vocab_size=beside.VOCABULARY),
        data=DataConfig(layout="encoder_decoder", mixture=ul2(), inputs_length=64, targets_length=64),
        training=TrainingConfig(num_train_steps=10, global_batch_size=8),
    )

def ill_typed():
    run = recipe()
    training = TrainingConfig(num_train_steps=1.5, global_batch_size="8", optimizer=AdamWConfig(b1="high"))
    return RunConfig(name="mine", model=run.model, data=run.data, training=training)

def not_plain():
    run = recipe()
    return RunConfig(name=object(), model=run.model, data=run.data, training=run.training)

def number():
    return 5

def raises():
    return recipe().learning_rate

def _hidden():
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a working directory with recipes in configs/runs."""
    runs = tmp_path / "configs/runs"
    runs.mkdir(parents=True)
    (runs / "mine.py").write_text(RECIPE)
    (runs / "beside.py").write_text("VOCABULARY = 5000\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("reference", shipped_recipes())
def test_shipped_recipes_are_sound(reference: str) -> None:
    run = load_recipe(reference)
    assert validate(run) == []
    assert from_json(to_json(run), source="config.json") == run


def test_shipped_recipes_have_names_of_their_own() -> None:
    names = [load_recipe(reference).name for reference in shipped_recipes()]
    assert len(names) == len(set(names)) >= 4


def test_a_recipe_by_file_function_name_and_json(folder: Path) -> None:
    run = load_recipe("configs/runs/mine.py")
    assert run.name == "mine" and run.model.vocab_size == 5000
    assert load_recipe("configs/runs/mine.py:recipe") == load_recipe("mine") == load_recipe("mine:recipe") == run
    (folder / "config.json").write_text(to_json(run))
    assert load_recipe("config.json") == run


def test_shipped_recipes_are_found_from_anywhere(folder: Path) -> None:
    shipped = load_recipe(str(REPOSITORY / "configs/runs/smoke.py"))
    assert load_recipe("smoke") == load_recipe("configs/runs/smoke.py") == shipped
    (folder / "smoke").mkdir()
    assert load_recipe("smoke") == shipped


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("configs/runs/mini.py", "perhaps configs/runs/mine.py"),
        ("mien", "perhaps configs/runs/mine.py"),
        ("elsewhere/xyz.py", "configs/runs/mine.py"),
        ("confg.json", "no such recipe"),
        ("configs/runs", "found a directory"),
        ("mine:recipes", "perhaps configs/runs/mine.py:recipe"),
        ("mine:zzz", "functions there: recipe, ill_typed, not_plain, number, raises"),
        ("mine:number", "found a value of type int, expected a RunConfig"),
        ("mine:raises", "AttributeError at configs/runs/mine.py:27: 'RunConfig' object has no attribute"),
        ("mine:not_plain", "not JSON serializable"),
    ],
)
def test_unreadable_recipes_are_refused(folder: Path, reference: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(reference)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_recipe_that_leaves_the_process_is_refused(folder: Path) -> None:
    (folder / "leaves.py").write_text("import sys\n\n\ndef recipe():\n    sys.exit(0)\n")
    with pytest.raises(UserError, match=r"leaves.py raised SystemExit at .*leaves.py:5"):
        load_recipe("leaves.py")


def test_shipped_recipes_are_suggested_if_configs_has_no_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text("")
    with pytest.raises(ConfigError, match=r"perhaps .*configs/runs/smoke.py"):
        load_recipe("smokee")


def test_a_recipe_with_a_syntax_error(folder: Path) -> None:
    (folder / "broken.py").write_text("def recipe():\n    return (\n")
    with pytest.raises(UserError, match=r"SyntaxError at .*broken.py:2"):
        load_recipe("broken.py")


def test_error_for_a_directory_with_a_configuration_names_it(folder: Path) -> None:
    (folder / "config.json").write_text(to_json(example()))
    with pytest.raises(ConfigError, match="config.json"):
        load_recipe(str(folder))


def test_wrong_types_in_a_recipe_are_all_listed(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("mine:ill_typed")
    assert {problem.where.partition(": ")[2] for problem in caught.value.problems} == {
        "training.num_train_steps",
        "training.global_batch_size",
        "training.optimizer.b1",
    }


@pytest.mark.parametrize(
    ("arguments", "path", "value"),
    [
        ("--training.num-train-steps 200", "training.num_train_steps", 200),
        ("--training.num_train_steps=200", "training.num_train_steps", 200),
        ("--data.corpus.files texts/*.jsonl b.txt", "data.corpus.files", ("texts/*.jsonl", "b.txt")),
        ("--data.corpus.files a=b.txt c.txt", "data.corpus.files", ("a=b.txt", "c.txt")),
        ("--data.mixture.2.rate 3", "data.mixture.2.rate", 3.0),
        ("--training.optimizer.decay-rate 0.9", "training.optimizer.decay_rate", 0.9),
        ("--training.max-gradient-norm None", "training.max_gradient_norm", None),
        ("--sharding.data -1", "sharding.data", -1),
        ("--monitoring.writers jsonl_twice", "monitoring.writers", ("jsonl_twice",)),
        ("--model.decoder.positions rope", "model.decoder.positions", "rope"),
        ("--data.mixture.0.mode None", "data.mixture.0.mode", None),
        (
            "--sharding.parameter-rules embed tensor mlp fsdp",
            "sharding.parameter_rules",
            (("embed", "tensor"), ("mlp", "fsdp")),
        ),
    ],
)
def test_overrides_are_typed(arguments: str, path: str, value: Any) -> None:
    assert apply_overrides(example(), arguments.split()) == changed(example(), path, value)


def test_overrides_keep_the_class_that_the_recipe_chose() -> None:
    run = changed(example(), "training.optimizer", AdamWConfig())
    assert apply_overrides(run, ["--training.optimizer.b1", "0.5"]).training.optimizer == AdamWConfig(b1=0.5)


@pytest.mark.parametrize(
    ("arguments", "suggestions"),
    [
        ("--training.num-train-step 3", ["--training.num-train-steps"]),
        ("--training.learnin-rate 3", ["--training.schedule.learning-rate"]),
        ("--optim.lr 1", ["--training.schedule.learning-rate"]),
        ("optim.lr=1", ["--training.schedule.learning-rate"]),
        ("--learning_rate=1", ["--training.schedule.learning-rate"]),
        ("--batchsize 3", ["--training.global-batch-size"]),
        ("training.global_batch_size=3", ["--training.global-batch-size 3"]),
        ("--seed 3", ["--data.seed", "--training.seed"]),
        ("--data.mixture.9.rate 3", ["no entry 9 of data.mixture", "up to 7"]),
        ("--training.optimizer adafactor", ["--training.optimizer.decay-rate"]),
        ("--worker-dir x", ["--workdir"]),
    ],
)
def test_mistyped_keys_are_refused_with_a_suggestion(arguments: str, suggestions: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(example(), arguments.split(), options=["--workdir"])
    (problem,) = caught.value.problems
    assert all(suggestion in str(problem) for suggestion in suggestions), problem


def test_all_mistyped_keys_at_once() -> None:
    arguments = "x=3 --a.b 1 --training.global-batch-size 8 stray --data.sed 2 --data.seed 4"
    with pytest.raises(ConfigError) as caught:
        apply_overrides(example(), arguments.split())
    assert [problem.where for problem in caught.value.problems] == ["x", "--a.b", "stray", "--data.sed"]


def test_unknown_names_wrong_types_and_wrong_values_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--training.global-batch-size many --data.layout=rows --data.sed 2 --data.seed -1 "
    arguments += "--training.max-gradient-norm x"
    with pytest.raises(ConfigError) as caught:
        apply_overrides(example(), arguments.split())
    problems = {problem.where: problem for problem in caught.value.problems}
    assert set(problems) == {
        "--data.sed", "training.global_batch_size", "data.layout", "training.max_gradient_norm", "data.seed",
    }  # fmt: skip
    batch = problems["training.global_batch_size"]
    assert (batch.found, batch.expected) == ("'many'", "a whole number")
    assert problems["data.layout"].expected == "one of encoder_decoder, prefix_lm, causal_lm, encoder"
    assert problems["training.max_gradient_norm"].expected == "a number or None"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--training.lora.rank", "--training.lora.base: found nothing, expected a text; LoraConfig has no default"),
        ("--training.lora.ranks", "found no such field, expected a field of LoraConfig: base, rank, alpha, base-type"),
        ("--model.task-head.kind", "found '1', expected one of classification, token_classification, regression, emb"),
        ("--training.optimizer.kind", "found '1', expected one of adafactor, adamw, lamb, muon"),
        ("--data.mixture.7.rate", "--data.mixture.7.kind: found nothing, expected one of span_corruption, prefix_lm"),
        ("--training.freeze.2.paths", "found no entry 2 of training.freeze, expected an index up to 0, the next one"),
        ("--training.optimizer.factory", "expected a field of AdafactorConfig, which this recipe has chosen: kind, "),
    ],
)
def test_fields_of_another_class_and_of_no_section_are_explained(argument: str, message: str) -> None:
    run = changed(example(), "training.optimizer", AdafactorConfig())
    with pytest.raises(ConfigError, match=message):
        apply_overrides(run, [argument, "1"])


@pytest.mark.parametrize(
    ("arguments", "path", "value"),
    [
        (
            "--model.task-head.labels yes no --model.task-head.kind=classification --model.task-head.transform True",
            "model.task_head",
            TaskHeadConfig(kind="classification", labels=("yes", "no"), transform=True),
        ),
        ("--training.optimizer.kind adamw --training.optimizer.b1 0.8", "training.optimizer", AdamWConfig(b1=0.8)),
        (
            "--training.optimizer.kind optax --training.optimizer.factory lion",
            "training.optimizer",
            OptaxOptimizer(factory="lion"),
        ),
        ("--training.lora.rank 4 --training.lora.base runs/a", "training.lora", LoraConfig(base="runs/a", rank=4)),
        (
            "--training.freeze.0.paths a b --training.freeze.1.paths c --training.freeze.0.until-step 3",
            "training.freeze",
            (FreezeConfig(paths=("a", "b"), until_step=3), FreezeConfig(paths=("c",))),
        ),
        (
            "--model.encoder.rope-scaling.factor 2 --model.encoder.rope-scaling.kind linear",
            "model.encoder.rope_scaling",
            RopeScalingConfig(kind="linear", factor=2.0),
        ),
    ],
)
def test_sections_that_the_recipe_leaves_out_are_created(arguments: str, path: str, value: Any) -> None:
    """Optional sections, other kinds of a union, entries of tuples and sections within sections."""
    assert apply_overrides(example(), arguments.split()) == changed(example(), path, value)


def test_an_optional_section_can_be_removed() -> None:
    run = changed(example(), "training.lora", LoraConfig(base="runs/a"))
    assert apply_overrides(run, ["--training.lora", "None"]) == example()


def test_the_help_names_the_sections_that_a_recipe_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        apply_overrides(example(), ["--help"])
    assert "--training.lora.FIELD with one of the fields base, rank, alpha, base-type, paths" in capsys.readouterr().out


def test_problems_that_differ_in_their_place_only_are_one_line() -> None:
    problems = [ConfigProblem(f"layer.{i}", "3", "4") for i in range(9)] + [ConfigProblem("a", "1", "2")]
    assert str(ConfigError(problems)).splitlines() == [
        "found 10 problems:", "  - layer.0, layer.1 and 7 others: found 3, expected 4", "  - a: found 1, expected 2",
    ]  # fmt: skip
    assert str(ConfigError(problems[-1:])) == "a: found 1, expected 2"


@pytest.mark.parametrize("layout", ["encoder_decoder", "causal_lm", "encoder"])
def test_known_fields_are_those_of_the_help(layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    """Our list of fields, which suggestions are drawn from, against tyro's own."""
    run = changed(example(layout), "training.optimizer", AdamWConfig())
    if layout == "encoder":
        run = changed(run, "model.generator", run.model.encoder)
    with pytest.raises(SystemExit) as caught:
        apply_overrides(run, ["--help"])
    assert caught.value.code == 0
    listed = set(re.findall(r"^\W*(--[a-z][a-z0-9.-]+)(?!.*FIELD)", capsys.readouterr().out, flags=re.MULTILINE))
    expected = {f"--{path}".replace("_", "-") for path, _ in _fields(run)}
    assert listed - {"--help"} == expected


def value_at(run: Any, path: str) -> Any:
    for name in path.split("."):
        run = run[int(name)] if isinstance(run, tuple) else getattr(run, name)
    return run


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_number_can_be_overridden_and_comes_back_from_json(data: st.DataObject) -> None:
    run = example()
    numbers = [path for path, _ in _fields(run) if type(value_at(run, path)) in (int, float)]
    paths = data.draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=3, unique=True))
    expected, arguments = run, []
    for path in paths:
        integer = isinstance(value_at(run, path), int)
        value = data.draw(st.integers(-9, 10**9) if integer else st.floats(allow_nan=False, allow_infinity=False))
        expected = changed(expected, path, value)
        arguments.append(f"--{path}={value!r}")
    found = apply_overrides(run, arguments)
    assert found == expected
    assert from_json(to_json(found), source="config.json") == expected
    assert diff_configs(run, found).keys() <= set(paths)
