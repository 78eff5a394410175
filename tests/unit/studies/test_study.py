"""Studies: what is valid, what a budget pays for, the runs, and what is refused before anything is trained."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import types
from pathlib import Path
from typing import Any

import pytest
from helpers.config_examples import example

from t5x_like import run_directory
from t5x_like.config import EvaluationConfig, InitializeFrom, ScheduleConfig
from t5x_like.config.overrides import apply_overrides
from t5x_like.config.serialization import to_json
from t5x_like.errors import EXIT_OK, EXIT_REFUSED, EXIT_RESUMABLE, ConfigError, UserError
from t5x_like.evaluation.results_store import EVALUATIONS
from t5x_like.interop.warm_start import plan_mapping
from t5x_like.models.factory import abstract_model
from t5x_like.planning.estimate.flops import executed_flops, training_flops
from t5x_like.planning.estimate.scaling_laws import ScalingFit
from t5x_like.studies.budgets import TOLERANCE, cost_of_step, study_runs
from t5x_like.studies.plan import arm_cost, arm_differences, print_plan
from t5x_like.studies.runs import evaluated, finished_result, require_unchanged, train_runs
from t5x_like.studies.study import (
    Arm,
    Budget,
    BudgetUnit,
    Prediction,
    StepsTo,
    Study,
    StudyRun,
    Summary,
    require_valid,
)
from t5x_like.studies.study_file import find_study, load_study, shipped_studies, study_folder
from t5x_like.utils.console import Console
from t5x_like.utils.jsonl import encode_records

SCORED = EvaluationConfig(continuation=(8, 8))
RUN = dataclasses.replace(example(), evaluation=SCORED)
TWICE = dataclasses.replace(
    RUN, training=dataclasses.replace(RUN.training, global_batch_size=2 * RUN.training.global_batch_size)
)
STUDY = Study(question="Are large batches better?", arms=(Arm("small", RUN), Arm("large", TWICE)), seeds=(0, 1))
FROM_FOLDER = dataclasses.replace(RUN, initialize_from=InitializeFrom(directory="study"))
FAMILY = Study(
    question="What does a parent save?",
    arms=(
        Arm("child", FROM_FOLDER, parent="parent"),
        Arm("parent", RUN, budget=Budget("steps", 40)),
        Arm("other", RUN),
    ),
    seeds=(0, 1),
    budget=Budget("steps", 10),
)


@pytest.mark.parametrize("unit", ["executed_flops", "model_flops", "loss_tokens", "raw_tokens"])
def test_arms_of_a_budget_cost_the_same(unit: BudgetUnit) -> None:
    budget = Budget(unit, 400 * cost_of_step(RUN, unit))
    runs = study_runs(dataclasses.replace(STUDY, budget=budget))
    assert [run.run.training.num_train_steps for run in runs] == [400, 200, 400, 200]
    for run in runs:
        spent = run.run.training.num_train_steps * cost_of_step(run.run, unit)
        assert abs(spent / budget.amount - 1) <= TOLERANCE


def test_costs_are_those_of_the_plan() -> None:
    assert cost_of_step(RUN, "executed_flops") == executed_flops(RUN)
    assert cost_of_step(RUN, "model_flops") == training_flops(RUN)
    assert cost_of_step(RUN, "steps") == 1


def test_a_budget_that_no_number_of_steps_meets_is_refused() -> None:
    """10.5 steps: 10 and 11 are both off by more than 1 %."""
    budget = Budget("raw_tokens", 10.5 * cost_of_step(RUN, "raw_tokens"))
    with pytest.raises(ConfigError, match=r"arm small.*expected a number of steps that costs the budget within 1%"):
        study_runs(dataclasses.replace(STUDY, budget=budget))


def test_runs_are_the_product_of_arms_and_seeds() -> None:
    runs = study_runs(STUDY)
    assert [run.name for run in runs] == ["small.seed-0", "large.seed-0", "small.seed-1", "large.seed-1"]
    assert all(run.run.data.seed == run.run.training.seed == run.seed for run in runs)
    assert [run.name for run in study_runs(STUDY, [7], ["large"])] == ["large.seed-7"]
    assert [run.name for run in study_runs(dataclasses.replace(STUDY, seeds=()))] == ["small", "large"]
    with pytest.raises(ConfigError, match="--seeds: found 7 7, expected different numbers"):
        study_runs(STUDY, [7, 7])
    with pytest.raises(ConfigError, match="found huge, expected arms of the study: small, large"):
        study_runs(STUDY, only=["huge"])


def test_runs_start_from_the_run_of_their_parent_with_the_same_seed() -> None:
    require_valid(FAMILY)
    runs = {run.name: run for run in study_runs(FAMILY)}
    for seed in (0, 1):
        child, parent = runs[f"child.seed-{seed}"], runs[f"parent.seed-{seed}"]
        assert child.parent == parent.name and parent.parent is None
        assert child.run.initialize_from == InitializeFrom(directory=f"study/parent.seed-{seed}")
        assert (child.run.training.num_train_steps, parent.run.training.num_train_steps) == (10, 40)
    assert [run.name for run in study_runs(FAMILY, [0], ["child"])] == ["child.seed-0", "parent.seed-0"]
    assert [run.name for run in study_runs(FAMILY, [0], ["other"])] == ["other.seed-0"]
    assert arm_differences([*runs.values()])["child"] == []
    assert arm_differences([runs["parent.seed-0"], runs["child.seed-0"]])["child"] == ["initialize_from parent.seed-0"]


@pytest.mark.parametrize(
    ("failing", "code", "trained"),
    [
        (
            {},
            EXIT_OK,
            ["parent.seed-0", "other.seed-0", "parent.seed-1", "other.seed-1", "child.seed-0", "child.seed-1"],
        ),
        (
            {"parent.seed-0": EXIT_REFUSED},
            EXIT_REFUSED,
            ["parent.seed-0", "other.seed-0", "parent.seed-1", "other.seed-1", "child.seed-1"],
        ),
        ({"other.seed-0": EXIT_RESUMABLE}, EXIT_RESUMABLE, ["parent.seed-0", "other.seed-0"]),
    ],
)
def test_parents_are_trained_first(
    failing: dict[str, int],
    code: int,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run whose parent has diverged is left out, and no run follows another error. All runs are counted together."""
    found: list[str] = []

    def run(arguments: list[str]) -> int:
        if arguments[0] == "eval":
            return EXIT_OK
        found.append(Path(arguments[3]).name)
        return failing.get(found[-1], EXIT_OK)

    monkeypatch.setattr("t5x_like.studies.runs.run_command", run)
    assert train_runs(study_runs(FAMILY), Path("w"))[0] == code
    assert found == trained
    order = [*(f"{arm}.seed-{seed}" for seed in (0, 1) for arm in ("parent", "other")), "child.seed-0", "child.seed-1"]
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 6: " in line]
    assert lines == [f"run {order.index(name) + 1} of 6: {name}" for name in trained]


def test_the_plan_of_a_study_fits_80_columns() -> None:
    runs = study_runs(dataclasses.replace(STUDY, arms=(Arm("an_arm_of_18_letter", RUN), Arm("small", RUN))))
    text = io.StringIO()
    print_plan(runs, Path("runs/x"), "cpu", Console(file=text, width=80))
    assert "…" not in text.getvalue()
    assert {"parameters", "steps", "executed", "small"} <= set(text.getvalue().split())


def test_the_directory_of_a_study_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of its files are in the configurations of its runs, which must not change."""
    monkeypatch.chdir(tmp_path)
    spellings = ("runs/x", "./runs/x", "runs/../runs/x/", str(tmp_path / "runs/x"))
    assert {study_folder(Path(one)) for one in spellings} == {Path("runs/x")}
    assert study_folder(Path("..") / "x") == tmp_path.parent / "x"
    assert study_folder(tmp_path / "..x/y") == Path("..x/y")


def test_the_words_of_a_recipe_give_the_configuration_of_a_run() -> None:
    study = dataclasses.replace(STUDY, arms=(Arm("a", RUN, ("smoke",)),), budget=Budget("steps", 30))
    for run in study_runs(study):
        assert run.recipe[0] == "smoke" and apply_overrides(RUN, run.recipe[1:]) == run.run


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms": ()}, "no arm"),
        ({"arms": (Arm("a b", RUN),)}, "'a b', expected letters"),
        ({"arms": (Arm("a", RUN), Arm("a", TWICE))}, "'a' more than once"),
        ({"seeds": (1, 1)}, "expected different numbers"),
        ({"budget": Budget("steps", 0)}, "expected a number above 0"),
        ({"predictions": (Prediction("", "a guess", "huge", low=0),)}, "'huge', expected one of small, large"),
        ({"predictions": (Prediction("", "a guess", "small"),)}, "expected a range with a finite end"),
        ({"predictions": (Prediction("", "a guess", "small", low=1, high=0),)}, "expected a range with a finite end"),
        ({"predictions": (Prediction("", " ", "small", low=0),)}, "where the prediction comes from"),
        ({"predictions": (Prediction("", "a guess", "small", low=1, is_ratio=True),)}, "the divisor of the ratio"),
        ({"steps_to": (StepsTo("steps", "loss", "huge"),)}, "'huge', expected one of small, large"),
        ({"summaries": (Summary("small", ("large",), dict),)}, "another name than those of arms"),
        ({"summaries": (Summary("fit", ("huge",), dict),)}, "found huge, expected names of arms: small, large"),
        ({"summaries": (Summary("fit", (), dict),)}, "summaries.0.arms: found no arm, expected names of arms: small"),
        (
            {"summaries": (Summary("fit", ("small",), dict),) * 2},
            "summaries.1.name: found 'fit', expected another name",
        ),
        ({"steps_to": (StepsTo("small", "loss", 1.0),)}, "steps_to.0.name: found 'small', expected another name"),
        ({"steps_to": (StepsTo("steps", "loss", 1.0),) * 2}, "steps_to.1.name: found 'steps', expected another name"),
        ({"arms": (Arm("a", RUN, budget=Budget("steps", 0)),)}, "arm a: budget.amount: found 0"),
        ({"arms": (Arm("a", FROM_FOLDER, parent="b"),)}, "'b', expected the name of an arm without a parent"),
        ({"arms": (Arm("a", FROM_FOLDER, parent="a"),)}, "'a', expected the name of an arm without a parent"),
        ({"arms": (Arm("a", RUN), Arm("b", RUN, parent="a"))}, "arm b: initialize_from: found None"),
        ({"arms": (Arm("a", RUN), Arm("b", FROM_FOLDER, ("smoke",), parent="a"))}, "None for an arm with a recipe"),
        ({"arms": (Arm("a", example()),)}, "evaluation.continuation: found None"),
        (
            {
                "arms": (
                    Arm("a", RUN),
                    Arm("b", dataclasses.replace(RUN, evaluation=EvaluationConfig(continuation=(8, 9)))),
                )
            },
            r"\(8, 9\), expected \(8, 8\) as in arm a",
        ),
        (
            {"arms": (Arm("a", dataclasses.replace(RUN, plugins=("mine.py",))),)},
            "an arm of a study is handed to `train` as a configuration without code",
        ),
    ],
)
def test_problems_of_a_study_are_listed(fields: dict[str, Any], message: str) -> None:
    require_valid(STUDY)
    with pytest.raises(ConfigError, match=message):
        require_valid(dataclasses.replace(STUDY, **fields))


def test_a_changed_arm_is_refused_with_the_difference(tmp_path: Path) -> None:
    runs = study_runs(STUDY)
    require_unchanged(runs, tmp_path)
    directory = tmp_path / "small.seed-1"
    (directory / run_directory.CHECKPOINTS / "10").mkdir(parents=True)
    (directory / run_directory.CONFIG).write_text(to_json(runs[2].run))
    require_unchanged(runs, tmp_path)
    changed = dataclasses.replace(RUN, training=dataclasses.replace(RUN.training, z_loss=0.5))
    other = study_runs(dataclasses.replace(STUDY, arms=(Arm("small", changed), *STUDY.arms[1:])))
    with pytest.raises(ConfigError, match=r"small\.seed-1: training\.z_loss: found 0\.5, expected 0\.0001"):
        require_unchanged(other, tmp_path)
    # What is evaluated does not change what was trained.
    scored = dataclasses.replace(RUN, evaluation=dataclasses.replace(SCORED, num_batches=3))
    require_unchanged(study_runs(dataclasses.replace(STUDY, arms=(Arm("small", scored),))), tmp_path)


def test_a_run_goes_on_to_a_later_step_but_does_not_end_earlier(tmp_path: Path) -> None:
    def runs_of(steps: int) -> list[StudyRun]:
        schedule = ScheduleConfig(kind="constant")
        training = dataclasses.replace(RUN.training, schedule=schedule, num_train_steps=steps)
        arm = Arm("small", dataclasses.replace(RUN, training=training))
        return study_runs(dataclasses.replace(STUDY, arms=(arm,)))

    directory = tmp_path / "small.seed-0"
    directory.mkdir()
    (directory / run_directory.CONFIG).write_text(to_json(runs_of(20)[0].run))
    # Without records, `train` replaces the configuration.
    require_unchanged(runs_of(10), tmp_path)
    (directory / run_directory.METRICS).write_text("{}\n")
    require_unchanged(runs_of(30), tmp_path)
    with pytest.raises(ConfigError, match=r"small\.seed-0: training\.num_train_steps: found 10, expected 20"):
        require_unchanged(runs_of(10), tmp_path)


def test_a_run_with_steps_left_has_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it has ended without an error, at the step that was its last one before."""
    run = study_runs(dataclasses.replace(STUDY, budget=Budget("steps", 20)))[0]
    (tmp_path / run_directory.EXIT).write_text('{"code": 0}')
    for step, is_finished in ((10, False), (20, True)):
        found: Any = types.SimpleNamespace(step=step, path=tmp_path)
        monkeypatch.setattr("t5x_like.studies.runs.evaluated", lambda *_, found=found: found)
        assert (finished_result(tmp_path, run) is found) == is_finished


def test_scores_of_windows_of_other_lengths_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = study_runs(STUDY)[0]
    (tmp_path / run.name).mkdir()
    record = {"step": 20, "continuation": {"given": 3, "scored": 5}}
    (tmp_path / run.name / EVALUATIONS).write_text("".join(f"{line}\n" for line in encode_records([record])))
    found: Any = types.SimpleNamespace(step=20, path=tmp_path / run.name, draws={"loss": [1.0]})
    monkeypatch.setattr("t5x_like.studies.runs.comparison.read_checkpoint", lambda _: found)
    for continuation, is_result in ((None, True), ((3, 5), True), ((4, 4), False)):
        evaluation = dataclasses.replace(run.run.evaluation, continuation=continuation)
        changed = dataclasses.replace(run, run=dataclasses.replace(run.run, evaluation=evaluation))
        assert (evaluated(tmp_path, changed) is found) == is_result


def test_files_of_studies_are_found_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def study(tier, folder):\n    return tier, folder\n")
    assert find_study(str(file)) == file
    with pytest.raises(ConfigError, match="a value of type tuple, expected a Study"):
        load_study(file, "cpu", tmp_path)
    file.write_text("def study(tier, folder):\n    raise KeyError(tier)\n")
    with pytest.raises(UserError, match="the study .* raised KeyError at .*mine.py:2"):
        load_study(file, "cpu", tmp_path)
    file.write_text("def stduy(tier, folder):\n    pass\n")
    with pytest.raises(ConfigError, match="no function 'study'.*perhaps .*:stduy"):
        load_study(file, "cpu", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="perhaps exposure"):
        find_study("exposur")


@pytest.mark.parametrize("tier", ["cpu", "gpu"])
@pytest.mark.parametrize("name", shipped_studies())
def test_shipped_studies_are_valid_and_keep_their_budgets(name: str, tier: Any, tmp_path: Path) -> None:
    study = load_study(shipped_studies()[name], tier, tmp_path)
    runs = study_runs(study)
    assert len(study.seeds) >= 3 and study.cannot_show and study.predictions
    assert all(
        prediction.claim and math.isfinite(min(abs(prediction.low), abs(prediction.high)))
        for prediction in study.predictions
    )
    for run in runs:
        if (budget := study.arm(run.arm).budget or study.budget) is not None:
            cost = run.run.training.num_train_steps * cost_of_step(run.run, budget.unit)
            assert abs(cost / budget.amount - 1) <= TOLERANCE


def test_arms_of_the_adaptation_study_have_a_source_for_each_parameter(tmp_path: Path) -> None:
    """All parameters are the decoder's, but for those of a new cross-attention."""
    study = load_study(shipped_studies()["adaptation"], "cpu", tmp_path)
    decoder = abstract_model(study.arm("decoder").run.model)
    fresh = {}
    for arm in study.arms:
        if arm.parent is not None and arm.run.initialize_from is not None:
            mapping = plan_mapping(arm.run.initialize_from, decoder, abstract_model(arm.run.model))
            fresh[arm.name] = {path for path, source in mapping.items() if source is None}
    assert {name for name, paths in fresh.items() if paths} == {"new", "new_alone"}
    assert all("/cross_attention" in path for path in fresh["new"]) and len(fresh) == 6


def test_texts_of_the_question_study_have_one_answer_in_each_order(tmp_path: Path) -> None:
    """And no text is held out that is trained on."""
    study = load_study(shipped_studies()["question_place"], "cpu", tmp_path)
    assert study.write_files is not None
    study.write_files(tmp_path)
    for order in ("kvq", "vkq", "qkv", "qvk"):
        lines = (tmp_path / f"{order}.validation.jsonl").read_text().splitlines()
        for line in lines:
            row = json.loads(line)
            question = row["text"][-1] if order.endswith("q") else row["text"][1]
            pairs = row["text"].replace(f"?{question}", "")
            facts = [(pairs[at], pairs[at + 1]) for at in range(0, len(pairs), 2)]
            digits = dict(facts) if "kv" in order else {key: value for value, key in facts}
            assert digits[question] == row["answer"] and len({*digits.values()}) == len(digits) == 2
        trained = {*(tmp_path / f"{order}.train.jsonl").read_text().splitlines()}
        assert not trained & {*lines} and len(lines) == 1_000


def test_the_scaling_study_recovers_the_law_that_its_results_follow(tmp_path: Path) -> None:
    """And predicts its largest run, which it does not fit."""
    study = load_study(shipped_studies()["scaling"], "cpu", tmp_path)
    law = ScalingFit(1.2, 40.0, 300.0, 0.35, 0.45, "made up")
    results: Any = {}
    for arm in study.arms:
        cost = arm_cost(arm.run)
        bits = law.loss(cost.parameters, cost.raw_tokens)
        results[arm.name] = types.SimpleNamespace(values={"continuation_bits_per_byte": bits})
    assert len(study.summaries) == 2 and len({*study.summaries[0].arms} & {*study.summaries[1].arms}) == 0
    for summary in study.summaries:
        found = summary.compute({name: results[name] for name in summary.arms})
        assert found["alpha"] == pytest.approx(law.alpha, rel=0.01)
        assert found["beta"] == pytest.approx(law.beta, rel=0.01)
        assert abs(found["error_of_largest"]) < 1e-4
